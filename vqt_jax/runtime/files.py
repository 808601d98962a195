"""Files of a run, in a folder or in a bucket (`gs://`); the difference is here.

Paths in both are joined, named and listed alike: a folder's is a
`pathlib.Path`, a bucket's an `epath.Path`. An object in a bucket appears whole
and at once, but it cannot grow, and folders there cannot get another name.
"""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any
import uuid

import numpy as np

from vqt_jax import errors

PathLike = str | os.PathLike
# What `path` gives; an `epath.Path` is a `PurePath` too.
Path = pathlib.PurePath

# What is wrong with a bucket, told from an exception's type, code and text.
_DENIED = (
  r"Forbidden|HttpError 40[13]|Unauthorized|Auth\w*Error|CredentialsError"
  r"|RefreshError|PERMISSION_DENIED|UNAUTHENTICATED"
)
_UNREACHABLE = (
  r"Client\w*Error|ServerDisconnected|Connection|Timeout|ServiceUnavailable"
  r"|HttpError (429|5..)|UNAVAILABLE|DEADLINE_EXCEEDED"
)


def path(place: PathLike) -> Path:
  """The path of a folder or file, here (`~` expanded) or in a bucket.

  Raises:
    UserError: it is an address of something else, or of somebody unknown, or
      libraries would take it for another one.
  """
  text = os.fspath(place)
  if not re.match(r"\w+:/", text):
    return _local_path(text)
  if not re.match(r"gs://[^/]", text):
    raise errors.UserError(
      f"Cannot use {text}: expected a folder, or gs://BUCKET/FOLDER."
    )
  if found := re.search(r"[][*?#]", text):  # To gcsfs, a pattern or a version.
    raise errors.UserError(
      f"Cannot use {text}: tools for buckets do not take {found[0]!r}"
      " literally. Choose another name."
    )
  _prepare_for_buckets()
  from etils import epath

  return epath.Path(text)


def _local_path(text: str) -> pathlib.Path:
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    raise errors.UserError(
      f"Cannot use {text}: the home folder of {text.split('/')[0]} is not"
      f" known. Give the whole path, or ./{text} for a name with a ~."
    )
  # TensorStore takes a backslash for a slash, and Orbax gs: for a bucket.
  if found := re.search(r"\\|gs:(?=/)", os.path.realpath(expanded)):
    raise errors.UserError(
      f"Cannot use {text}: libraries do not take {found[0]} in a path"
      " literally. Choose another name."
    )
  # Orbax and TensorFlow are told of it in UTF-8.
  if re.search("[\ud800-\udfff]", os.path.abspath(expanded)):
    raise errors.UserError(
      f"Cannot use {os.path.abspath(expanded)!a}: expected a name in UTF-8,"
      f" found one that Python reads as {sys.getfilesystemencoding()}."
      " Choose another one; if that is UTF-8, set PYTHONUTF8=1."
    )
  local = pathlib.Path(expanded)
  # ./~ has lost its dot, and must not be expanded the next time.
  return local.absolute() if str(local).startswith("~") else local


@functools.cache
def _prepare_for_buckets() -> None:
  import fsspec

  # Orbax writes past gcsfs, and so do other processes: it must look each time.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  # They tell of every failure with its traceback, and of every read.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
  logging.getLogger("fsspec").setLevel(logging.WARNING)


def cache_folder() -> pathlib.Path:
  """Folder of what can be made again: $VQT_JAX_CACHE, or ~/.cache/vqt_jax.

  Raises:
    UserError: nothing tells where the home folder is.
  """
  given = os.environ.get("VQT_JAX_CACHE") or "~/.cache/vqt_jax"
  try:
    return pathlib.Path(given).expanduser()
  except RuntimeError as e:
    raise errors.UserError(
      f"Cannot keep files in {given}: this user has no home folder. Set"
      " VQT_JAX_CACHE to another folder."
    ) from e


def in_bucket(place: PathLike) -> bool:
  return os.fspath(place).startswith("gs://")


def absolute(place: Path) -> Path:
  """The same place whatever the current folder is; no `..` or link in it."""
  return place if in_bucket(place) else place.resolve()


def make_folder(place: Path) -> None:
  """Makes a folder and those it is in; buckets have none."""
  if not in_bucket(place):
    place.mkdir(parents=True, exist_ok=True)


def exists(place: Path) -> bool:
  """Whether there is such a file, or anything in such a folder.

  Raises:
    UserError: it cannot be told.
  """
  with explain_read_errors(place):
    return place.exists()


def list_names(folder: Path) -> list[str]:
  """Names in a folder, sorted; none if there is no such folder.

  Raises:
    UserError: it cannot be read.
  """
  none = FileNotFoundError, NotADirectoryError
  with explain_read_errors(folder), contextlib.suppress(*none):
    return sorted(each.name for each in folder.iterdir())
  return []


def read(file: Path) -> bytes:
  """All of a file.

  Raises:
    FileNotFoundError: there is none.
    UserError: it cannot be read.
  """
  with explain_read_errors(file):
    return file.read_bytes()


@contextlib.contextmanager
def local_copy(file: Path) -> Iterator[pathlib.Path]:
  """The file itself, or, while this lasts, a copy of one in a bucket.

  Raises:
    FileNotFoundError: there is none in the bucket.
    UserError: it cannot be read from there.
  """
  if not in_bucket(file):
    yield file
    return
  with tempfile.NamedTemporaryFile(prefix="vqt_jax_") as copy:
    copy.write(read(file))
    copy.flush()
    yield pathlib.Path(copy.name)


def write(file: Path, content: bytes) -> None:
  """Writes a file at once, also its folder: under another name if need be.

  Raises:
    UserError: it cannot be written; an old file is left as it was.
  """
  with explain_write_errors(file):
    if in_bucket(file):
      _write_object(file, content)
      return
    # A name of its own: other processes may begin runs in the same workdir.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.new")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
      os.replace(temporary, file)
    except OSError:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise


def _write_object(file: Path, content: bytes) -> None:
  """Writes it in one request.

  Not through a file of gcsfs: a refusal there leaves a `BytesIO` in a cycle
  with its buffer, at which the garbage collector of CPython 3.12.0 and 3.12.1
  dies.
  """
  import fsspec

  try:
    fsspec.filesystem("gcs").pipe_file(os.fspath(file), content)
  except FileNotFoundError as e:
    raise errors.UserError(
      f"Cannot write {file}: there is no such bucket, or you may not see it."
    ) from e


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
  """Writes a folder that appears at once; one with the same files is replaced.

  In a bucket, where that cannot be, its files appear in their order: the folder
  is whole if the last one is there.

  Raises:
    UserError: it cannot be written, or holds other files.
  """
  if others := sorted({*list_names(folder)} - {*contents}):
    raise errors.UserError(
      f"Cannot write {folder}: it holds other things ({others[0]}), which"
      " would be lost. Choose another place."
    )
  if in_bucket(folder):
    remove_folder(folder)
    for name, content in contents.items():
      write(folder / name, content)
    return
  place = absolute(folder)  # It needs a name, unlike `.`.
  unique = f"{place.name}.{uuid.uuid4().hex}"
  new, old = place.with_name(f"{unique}.new"), place.with_name(f"{unique}.old")
  with explain_write_errors(folder):
    left_over = rf"{re.escape(place.name)}\.[0-9a-f]{{32}}\.(new|old)"
    for name in list_names(place.parent):
      if re.fullmatch(left_over, name):
        remove_folder(place.with_name(name))
    new.mkdir(parents=True)
    for name, content in contents.items():
      write(new / name, content)
    if place.is_dir():  # Not a file.
      place.rename(old)
    new.rename(place)
    remove_folder(old)


def remove_folder(folder: Path) -> None:
  """Removes a folder; what cannot be removed stays."""
  if not in_bucket(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with contextlib.suppress(errors.UserError), explain_write_errors(folder):
    folder.rmtree()


@contextlib.contextmanager
def explain_read_errors(place: PathLike) -> Iterator[None]:
  """Turns a failure to read into a `UserError`; a missing file stays one."""
  try:
    with _explain_bucket_errors("read", place):
      yield
  except FileNotFoundError:
    raise
  except OSError as e:
    raise errors.UserError(f"Cannot read {place}: {e.strerror}.") from e


@contextlib.contextmanager
def explain_write_errors(place: PathLike) -> Iterator[None]:
  """Turns a failure to write into a `UserError` that names the place."""
  try:
    with _explain_bucket_errors("write", place):
      yield
  except OSError as e:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    raise errors.UserError(
      f"Cannot write {place}: {e.strerror or e}."
      + (" Free some space there." if full else " Choose another place.")
    ) from e


@contextlib.contextmanager
def _explain_bucket_errors(what: str, place: PathLike) -> Iterator[None]:
  """Turns every failure into a `UserError`, if the place is in a bucket."""
  try:
    yield
  except Exception as e:  # Each of the libraries on the way has its own.
    if not in_bucket(place) or isinstance(e, errors.UserError):
      raise
    if what == "read" and isinstance(e, FileNotFoundError):
      raise
    raise errors.UserError(
      f"Cannot {what} {place}: {first_line(e)}"
      f" {bucket_advice(e) or 'When that is mended, the same command resumes.'}"
    ) from e


def bucket_advice(error: BaseException | None) -> str | None:
  """What to do if it is a bucket that said no, or nothing; else None."""
  while error:
    told = f"{type(error).__name__} {getattr(error, 'code', '')} {error}"
    if re.search(_DENIED, told):
      return (
        "Sign in with `gcloud auth application-default login`, or give this"
        " machine's service account the role Storage Admin there."
      )
    if re.search(_UNREACHABLE, told):
      return "See that the network is up; the same command resumes."
    error = error.__cause__ or error.__context__
  return None


def first_line(error: Exception) -> str:
  """The beginning of what an exception says, as a sentence."""
  line = str(error).strip().split("\n")[0][:200].rstrip(".")
  return f"{line or type(error).__name__}."


def write_json(file: PathLike, value: Any) -> None:
  """Writes a file of JSON at once, as `files.write`.

  Arrays become lists, and numbers that are not finite, which JSON lacks, null.

  Raises:
    UserError: it cannot be written; an old file is left as it was.
  """
  write(path(file), json_bytes(value))


def read_json(file: PathLike) -> Any:
  """Reads a file of JSON.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    content = read(path(file))
  except FileNotFoundError:
    raise errors.UserError(f"There is no {file}.") from None
  try:
    return json.loads(content)
  except ValueError as e:
    raise errors.UserError(f"Cannot read {file}: {e}: it is damaged.") from e


def json_bytes(value: Any) -> bytes:
  text = json.dumps(to_json_types(value), indent=2, ensure_ascii=False) + "\n"
  return text.encode()


def json_line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def to_json_types(value: Any) -> Any:
  """The same with nothing but what JSON knows."""
  match value:
    case dict():
      return {str(k): to_json_types(v) for k, v in value.items()}
    case list() | tuple():
      return [to_json_types(v) for v in value]
    case bool() | int() | str() | None:
      return value
    case float():
      return value if math.isfinite(value) else None
    case os.PathLike():
      return os.fspath(value)
  array = np.asarray(value)
  if array.ndim:
    return [to_json_types(v) for v in array]
  if array.dtype == np.float32:  # As short as float32 can be told apart.
    return to_json_types(float(str(array)))
  return to_json_types(array.item())
