"""Addresses of checkpoints, and local copies of what is there."""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
import re
from typing import Any
import urllib.parse

import fsspec

from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import download
from vqt_jax.errors import UserError
from vqt_jax.runtime import files

_GOOGLE = "https://storage.googleapis.com/"


def split_subtree(source: str) -> tuple[str, str]:
  """`PLACE:img` -> (PLACE, "img"); minds other colons in addresses."""
  if os.path.exists(os.path.expanduser(source)):
    return source, ""
  match = re.fullmatch(r"((?:\w+://[^/]+/|(?!\w+://)).+):(\w[\w/]*)", source)
  return (match[1], match[2]) if match else (source, "")


def local_path(source: str) -> str | None:
  """The source by its absolute path; None if it is no file or folder here."""
  place, subtree = split_subtree(source)
  path = pathlib.Path(place).expanduser()
  if "://" in place or not containers.resolve(path):
    return None
  return os.path.abspath(path) + (f":{subtree}" if subtree else "")


def fetch(
  address: str,
  cache_dir: str | os.PathLike[str] | None = None,
  progress: download.Progress | None = None,
) -> pathlib.Path:
  """The local copy of a remote checkpoint; downloads it if there is none.

  Args:
    address: https:// or gs:// address of an npz file, or gs:// address of a
      Big Vision checkpoint folder.
    cache_dir: where copies are kept; `files.cache_folder()` if not given.
    progress: told about every chunk that comes in.

  Returns:
    Path of a whole file or folder.

  Raises:
    UserError: there is nothing at the address, it cannot be reached, or what
      came is not what the server announced.
  """
  scheme, _, rest = address.replace(_GOOGLE, "gs://", 1).partition("://")
  if scheme not in ("https", "http", "gs"):
    raise UserError(
      f"Cannot read {address}: expected a path, a public name, or an https://"
      " or gs:// address."
    )
  cache = files.path(cache_dir) if cache_dir else files.cache_folder()
  host = "storage.googleapis.com/" if scheme == "gs" else ""
  parts = [urllib.parse.quote(part, " ") for part in f"{host}{rest}".split("/")]
  target = cache.joinpath(*(p for p in parts if p not in ("", ".", "..")))
  if target.exists():
    return target
  try:
    if scheme == "gs":
      return _fetch_from_bucket(rest, target, progress)
    download.file(_web(scheme), address, target, progress)
    return target
  except (download.NotFound, download.NotAllowed) as error:
    advice = "or sign in with `gcloud auth application-default login`"
    raise UserError(
      f"There is no file {address}, or you may not read it; check the address"
      f"{f', {advice}' if scheme == 'gs' else ''}."
    ) from error
  except ConnectionError as error:
    raise UserError(
      f"{address} cannot be reached: {error}. Try again."
    ) from error


def _web(scheme: str) -> Any:
  """File system for https://; heeds proxies, gives up on dead servers."""
  import aiohttp

  timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
  return fsspec.filesystem(
    scheme,
    client_kwargs={"trust_env": True, "timeout": timeout},
    # Compressed transfers have neither a length nor ranges.
    headers={"Accept-Encoding": "identity"},
  )


def _fetch_from_bucket(
  path: str, target: pathlib.Path, progress: download.Progress | None
) -> pathlib.Path:
  """`fetch` for gs://; asks for credentials only if the bucket does."""
  # The plain class: the extended one asks for credentials over gRPC first.
  from gcsfs.core import GCSFileSystem

  with _silenced("gcsfs"):  # It prints every failure with its traceback.
    try:
      anonymous = GCSFileSystem(token="anon", use_listings_cache=False)
      return _fetch_object(anonymous, path, target, progress)
    except download.NotAllowed:
      credentials = GCSFileSystem(use_listings_cache=False)
      return _fetch_object(credentials, path, target, progress)


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
  logger = logging.getLogger(name)
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  finally:
    logger.setLevel(level)


def _fetch_object(
  filesystem: Any,
  path: str,
  target: pathlib.Path,
  progress: download.Progress | None,
) -> pathlib.Path:
  """Fetches a file, a checkpoint folder, or the folder that `-LAST` names."""
  try:
    kind = download.ask(filesystem.info, path)["type"]
  except download.NotFound:
    step = download.ask(filesystem.cat_file, f"{path}-LAST").decode().strip()
    path, kind = f"{path}-{step}", "directory"
    target = target.with_name(f"{target.name}-{step}")
  if kind == "file":
    download.file(filesystem, path, target, progress)
  elif not target.exists():
    _fetch_folder(filesystem, path, target, progress)
  return target


def _fetch_folder(
  filesystem: Any,
  folder: str,
  target: pathlib.Path,
  progress: download.Progress | None,
) -> None:
  """Fetches the parameters' arrays of a Big Vision checkpoint folder."""
  partial = target.with_name(f"{target.name}.part")
  for file in sorted(download.ask(filesystem.find, folder)):
    name = file.removeprefix(f"{folder}/")
    # Two thirds of a training checkpoint are the optimiser's.
    if not re.match(r"chrono~|opt~(?!target~)", name):
      download.file(filesystem, file, partial / name, progress)
  if not partial.exists():
    raise download.NotFound(folder)
  with contextlib.suppress(OSError):  # Another process was faster.
    os.replace(partial, target)
