"""Files in a folder or in a bucket (`gs://`), behind one set of functions.

Paths in both are joined, named and listed alike: those of a folder are
`pathlib.Path`, those of a bucket `epath.Path`. An object in a bucket appears
whole and at once, but it cannot grow, and folders there cannot be renamed.

What cannot be read or written is a `UserError` that names the place.
"""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import functools
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import types
import typing
from typing import IO, Any
import uuid

import numpy as np

from vqt_jax import errors

# Buckets are opened with gcsfs: epath would choose TensorFlow, which takes
# seconds to import, at its first use of any path. And with that class of gcsfs
# that does not ask over gRPC what kind of bucket it is, which waits for half a
# minute where only HTTP gets through.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

PathLike = str | os.PathLike
# Returned by `path`; an `epath.Path` is a `PurePath` too.
Path = pathlib.PurePath
T = typing.TypeVar("T")

# Failures of a bucket, by type, code and text of an exception: gcsfs, aiohttp,
# google.auth, TensorStore and TensorFlow have no class in common.
_DENIED = (
  r"Forbidden|HttpError 40[13]|Unauthorized|Auth\w*Error|CredentialsError"
  r"|RefreshError|PERMISSION_DENIED|UNAUTHENTICATED"
)
_UNREACHABLE = (
  r"Client\w*Error|ServerDisconnected|Connection|Timeout|ServiceUnavailable"
  r"|HttpError (429|5..)|UNAVAILABLE|DEADLINE_EXCEEDED"
)


def path(place: PathLike) -> Path:
  """Parse the path of a folder or file, local (`~` expanded) or in a bucket.

  Raises:
    UserError: it is an address of another kind, the home folder of an unknown
      user, or a path that one of the libraries does not take literally.
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
  set_up_buckets()
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
  # Orbax and TensorFlow are given it in UTF-8.
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
def set_up_buckets() -> None:
  """Configure the libraries that open buckets, before their first use."""
  import fsspec

  # Orbax writes past gcsfs, and so do other processes: it must look each time.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  # They log the traceback of every failure, and every read.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
  logging.getLogger("fsspec").setLevel(logging.WARNING)


def cache_folder() -> pathlib.Path:
  """Folder of files that can be made again: $VQT_JAX_CACHE, or in ~/.cache.

  Raises:
    UserError: the home folder is not known.
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
  """Make a path independent of the current folder, without `..` and links."""
  return place if in_bucket(place) else place.resolve()


def make_folder(place: Path) -> None:
  """Make a folder and its parents; buckets have none."""
  if not in_bucket(place):
    place.mkdir(parents=True, exist_ok=True)


def exists(place: Path) -> bool:
  """Return whether there is such a file, or anything in such a folder."""
  with explain_read_errors(place):
    return place.exists()


def list_names(folder: Path) -> list[str]:
  """Return the sorted names in a folder; none if there is no such folder."""
  none = FileNotFoundError, NotADirectoryError
  with explain_read_errors(folder), contextlib.suppress(*none):
    return sorted(each.name for each in folder.iterdir())
  return []


def below(root: Path, name: str) -> Path:
  """Return `root / name`, of a name that a file or a server has told.

  Args:
    root: folder that must hold it.
    name: a name, or several joined with "/".

  Raises:
    UserError: it is not made of plain names, or a link leads out of the folder.
  """
  place = root / name
  plain = name.isprintable() and "\\" not in name
  if not plain or {"", ".", ".."}.intersection(name.split("/")):
    raise errors.UserError(
      f"Cannot use the name {name!a} in {root}: expected one that stays in that"
      " folder. Is what names it from a source that you trust?"
    )
  if not in_bucket(root):
    found = pathlib.Path(os.path.realpath(place))
    if not found.is_relative_to(os.path.realpath(root)):
      raise errors.UserError(
        f"Cannot use {place}: a link there leads to {found}, out of that"
        " folder. Replace the link with what it leads to."
      )
  return place


def read(file: Path) -> bytes:
  """Read a file; raise `FileNotFoundError` if there is none."""
  with explain_read_errors(file):
    check_regular(file)
    return file.read_bytes()


def check_regular(file: Path) -> None:
  """Raise a `UserError` for a pipe or a device, which may never end."""
  if not in_bucket(file) and not (file.is_file() or file.is_dir()):
    if file.exists():
      raise errors.UserError(f"Cannot read {file}: it is not a regular file.")


@contextlib.contextmanager
def local_copy(file: Path) -> Iterator[pathlib.Path]:
  """Provide a file as a local one: itself, or a copy of one in a bucket."""
  if not in_bucket(file):
    check_regular(file)
    yield file
    return
  with tempfile.NamedTemporaryFile(prefix="vqt_jax_") as copy:
    copy.write(read(file))
    copy.flush()
    yield pathlib.Path(copy.name)


def refuse_link(file: PathLike, flags: int) -> int:
  """Open a file as an `opener` of `open`, unless it is a link or a pipe.

  Whoever can make a file where this program writes could otherwise have it
  write to any file of the user.
  """
  try:
    return os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
  except OSError as e:
    if e.errno != errno.ELOOP:
      raise
    raise errors.UserError(
      f"Cannot write {file}: it is a link, so that another file would change."
      " Replace it with a copy of that."
    ) from e


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
  """Open a file that appears, or replaces the old one, when it is complete.

  Its folder is made if need be. If it cannot be written the old one stays.
  """
  with explain_write_errors(file), contextlib.ExitStack() as closing:
    if in_bucket(file):
      content = io.BytesIO()
      yield content
      _write_object(file, content.getvalue())
      return
    # Other processes may begin runs in the same workdir.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.new")
    file.parent.mkdir(parents=True, exist_ok=True)
    closing.callback(temporary.unlink, missing_ok=True)
    with _new_file(temporary) as out:
      yield out
    os.replace(temporary, file)


@contextlib.contextmanager
def _new_file(file: pathlib.Path) -> Iterator[IO[bytes]]:
  """Open a file to write, which is on the disk at the end."""
  with open(file, "xb") as out:
    yield out
    out.flush()
    os.fsync(out.fileno())


def write(file: Path, content: bytes) -> None:
  """Write a file as `replacing` does."""
  with replacing(file) as out:
    out.write(content)


def _write_object(file: Path, content: bytes) -> None:
  """Write an object in one request.

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
  """Write a folder that appears at once; one with the same files is replaced.

  A folder with other files is refused. In a bucket files appear in their order,
  so the folder is complete if the last one is there.
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
    try:
      new.mkdir(parents=True)
      for name, content in contents.items():
        with _new_file(new / name) as out:
          out.write(content)
      if place.is_dir():  # Not a file.
        place.rename(old)
      new.rename(place)
    except Exception:
      remove_folder(new)
      if old.is_dir():
        old.rename(place)
      raise
    remove_folder(old)


def remove_folder(folder: Path) -> None:
  """Remove as much of a folder as can be removed."""
  if not in_bucket(folder):
    shutil.rmtree(folder, ignore_errors=True)
    return
  with contextlib.suppress(errors.UserError), explain_write_errors(folder):
    folder.rmtree()


@contextlib.contextmanager
def _explain_errors(
  verb: str, place: PathLike, elsewhere: str = "choose another place"
) -> Iterator[None]:
  """Turn failures to `verb` ("read", "write") a place into `UserError`.

  A file that is missing when read stays a `FileNotFoundError`. `elsewhere` is
  the advice on how to write to another place.
  """
  try:
    yield
  except Exception as e:
    if isinstance(e, errors.UserError):
      raise
    if verb == "read" and isinstance(e, FileNotFoundError):
      raise
    if in_bucket(place):  # Any of the libraries on the way may have failed.
      reason, advice = first_line(e), bucket_advice(e)
      advice = advice or "Once that is corrected, the same command resumes."
    elif isinstance(e, OSError):
      reason, advice = f"{e.strerror or e}.", ""
      if verb == "write":
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"{'Free some space there, or ' if full else ''}{elsewhere}."
        advice = advice[0].upper() + advice[1:]
    else:
      raise
    message = f"Cannot {verb} {place}: {reason} {advice}".rstrip()
    raise errors.UserError(message) from e


explain_read_errors = functools.partial(_explain_errors, "read")
explain_write_errors = functools.partial(_explain_errors, "write")
explain_temporary_errors = functools.partial(
  _explain_errors, "write", "a temporary file", "set TMPDIR to another folder"
)


@contextlib.contextmanager
def explain_damage(
  file: PathLike, advice: str = "It is damaged, or of another program."
) -> Iterator[None]:
  """Turn whatever is raised while a file is read into a `UserError`."""
  try:
    yield
  except errors.UserError:
    raise
  except FileNotFoundError as e:
    raise errors.UserError(f"There is no {file}.") from e
  except OSError as e:
    raise errors.UserError(f"Cannot read {file}: {e.strerror or e}.") from e
  except Exception as e:  # Parsers of damaged files raise every kind.
    reason = first_line(e)
    if not isinstance(e, ValueError) or isinstance(e, UnicodeError):
      reason = f"{type(e).__name__}: {reason}"
    raise errors.UserError(f"Cannot read {file}: {reason} {advice}") from e


def bucket_advice(error: BaseException | None) -> str | None:
  """Advice if a bucket denied access or could not be reached, else None."""
  while error:
    text = f"{type(error).__name__} {getattr(error, 'code', '')} {error}"
    if re.search(_DENIED, text):
      return (
        "Sign in with `gcloud auth application-default login`, or give this"
        " machine's service account the role Storage Admin there."
      )
    if re.search(_UNREACHABLE, text):
      return "See that the network is up; the same command resumes."
    error = error.__cause__ or error.__context__
  return None


def first_line(error: Exception) -> str:
  """First line of an exception's text, as a sentence without control codes."""
  line = str(error).strip().split("\n")[0][:200].rstrip(".")
  return f"{errors.printable(line) or type(error).__name__}."


def write_json(file: PathLike, value: Any) -> None:
  """Write a JSON file as `replacing` does, its value by `to_json_types`."""
  write(path(file), json_bytes(value))


def read_json(file: PathLike) -> Any:
  """Read a file that `write_json` wrote.

  Raises:
    UserError: it is missing or damaged, or holds numbers that are not finite or
      have more than 64 bits.
  """
  with explain_damage(file):
    return json.loads(
      read(path(file)),
      parse_int=lambda text: int(_finite(text)),
      parse_float=lambda text: float(_finite(text)),
      parse_constant=_finite,
    )


def _finite(number: str) -> str:
  if not abs(float(number)) < (
    math.inf if re.search("[.eE]", number) else 2**63
  ):
    raise ValueError(f"{number[:20]} is out of range")
  return number


def parse_json(content: bytes | str, kind: type = object) -> Any:
  """Parse JSON; raise a `ValueError` if its value is not of a type."""
  value = json.loads(content)
  if not isinstance(value, kind):
    raise ValueError(f"expected a {kind.__name__}")
  return value


def from_json(kind: type[T], value: Any) -> T:
  """Return a dataclass made of its fields as JSON has them.

  Raises:
    ValueError: the value is not a dict of some of its fields, or one of these
      is not of the type that the class declares.
  """
  if not isinstance(value, dict):
    raise ValueError(f"expected a dict, found {type(value).__name__}")
  declared = typing.get_type_hints(kind)
  for name, given in value.items():
    if name not in declared or not is_of(given, declared[name]):
      raise ValueError(f"{name!a} is unknown or of another type")
  return kind(**value)


def is_of(value: Any, kind: Any) -> bool:
  """Return whether a value of JSON has a type, e.g. `dict[str, list[float]]`.

  A whole number is a `float` too, but truth values are no numbers. A dict of
  types describes a dict that has at least these keys, those with None apart;
  a list describes lists of its one type, a tuple any of its types.
  """
  if isinstance(kind, dict):
    return isinstance(value, dict) and all(
      is_of(value.get(name), each) for name, each in kind.items()
    )
  if isinstance(kind, list):
    return isinstance(value, list) and all(is_of(each, *kind) for each in value)
  if isinstance(kind, tuple):
    return any(is_of(value, each) for each in kind)
  outer, inner = typing.get_origin(kind), typing.get_args(kind)
  if outer is types.UnionType:
    return any(is_of(value, each) for each in inner)
  if outer in (list, dict):
    within = value.values() if isinstance(value, dict) else value
    return isinstance(value, outer) and all(
      is_of(each, inner[-1]) for each in within
    )
  if kind is Any or kind in (None, types.NoneType) or value is None:
    return kind is Any or (value is None and kind in (None, types.NoneType))
  if isinstance(value, bool) and kind is not bool:
    return False
  return isinstance(value, (int, float) if kind is float else kind)


def json_bytes(value: Any) -> bytes:
  text = json.dumps(to_json_types(value), indent=2, ensure_ascii=False) + "\n"
  return text.encode()


def json_line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def to_json_types(value: Any) -> Any:
  """Convert to what JSON has: arrays to lists, NaN and infinity to None."""
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
  if array.dtype == np.float32:  # In as few digits as tell float32 apart.
    return to_json_types(float(str(array)))
  return to_json_types(array.item())
