"""Downloading one file so that it is whole or not there at all.

A download that stops is taken up where it stopped. The file gets its name only
once its size, and its checksum where the server tells one, are right.
"""

import base64
from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import pathlib
import time
from typing import Any, NamedTuple

from vqt_jax.errors import UserError
from vqt_jax.runtime import locks

# Called with (bytes so far, bytes in all or None) while a file comes in.
Progress = Callable[[int, int | None], None]

_CHUNK = 8 << 20  # Bytes a request.
_ATTEMPTS = 5  # In a row without a single new byte.
_SECONDS = 1.0  # Before the second attempt; doubles each time.


class NotFound(Exception):
  """The server has no such file."""


class NotAllowed(Exception):
  """The server wants credentials that it was not shown."""


class _Remote(NamedTuple):
  """What a server tells about a file.

  Attributes:
    size: bytes, or None.
    version: differs once the file has changed.
    checksums: base64 digests, by name of the algorithm.
  """

  size: int | None
  version: str
  checksums: dict[str, str]


def file(
  filesystem: Any, path: str, target: pathlib.Path, progress: Progress | None
) -> None:
  """Downloads a file; tries again, from where it stopped, as long as it helps.

  Args:
    filesystem: an fsspec file system.
    path: the file on it.
    target: where to.
    progress: told about every chunk that comes in.

  Raises:
    NotFound, NotAllowed: the server says so.
    UserError: it cannot be reached or written, or sends something else than it
      announces.
  """
  failures, size = 0, -1
  while not target.exists():
    part = None
    try:
      remote = _describe(filesystem, path)
      part = target.with_name(f"{target.name}.{remote.version}.part")
      _resume(filesystem, path, remote, part, target, progress)
    except ConnectionError as error:
      reached = part.stat().st_size if part and part.exists() else 0
      failures = failures + 1 if reached <= size else 1
      size = max(size, reached)
      if failures == _ATTEMPTS:
        raise UserError(
          f"Downloading {path} failed: {error}. Try again; what has come so"
          " far is kept."
        ) from error
      time.sleep(_SECONDS * 2 ** (failures - 1))


def ask(question: Callable[..., Any], path: str, **kwargs: Any) -> Any:
  """Calls a file system; sorts refusals from failures that may pass.

  Raises:
    NotFound, NotAllowed: the server says so.
    ConnectionError: anything else; every back end has errors of its own.
  """
  try:
    return question(path, **kwargs)
  except Exception as error:
    # Over HTTP everything is "not found", with the reason as its cause.
    reason = error.__cause__ or error
    status = getattr(reason, "status", None) or getattr(reason, "code", None)
    if status in (401, 403) or str(error).startswith("Forbidden"):
      raise NotAllowed(path) from error
    if status in (404, 410) or type(reason) is FileNotFoundError:
      raise NotFound(path) from error
    text = str(reason).rstrip(".") or type(reason).__name__
    raise ConnectionError(text) from error


def _describe(filesystem: Any, path: str) -> _Remote:
  info = ask(filesystem.info, path)
  checksums = {
    "md5": info.get("md5Hash") or info.get("Content-MD5"),
    "crc32c": info.get("crc32c"),
  }
  for digest in info.get("Digest", "").split(","):
    algorithm, _, value = digest.strip().partition("=")
    checksums[algorithm.lower().replace("sha-", "sha")] = value
  known = {name: value for name, value in checksums.items() if value}
  tags = [info.get(k) for k in ("size", "ETag", "generation", "Last-Modified")]
  version = hashlib.sha256(repr((tags, known)).encode()).hexdigest()[:8]
  return _Remote(info.get("size"), version, known)


def _resume(
  filesystem: Any,
  path: str,
  remote: _Remote,
  part: pathlib.Path,
  target: pathlib.Path,
  progress: Progress | None,
) -> None:
  """Completes `part`, checks it and gives it its final name."""
  with _locked(part) as out:
    if target.exists():  # Another process was faster.
      part.unlink(missing_ok=True)
      return
    start = out.seek(0, os.SEEK_END)
    if remote.size is None:
      out.truncate(start := 0)
    for chunk in _chunks(filesystem, path, start, remote.size):
      start += _write(out, chunk)
      if progress:
        progress(start, remote.size)
    os.fsync(out.fileno())
    if problem := _problem(part, remote):
      part.unlink()
      raise ConnectionError(problem)
    os.replace(part, target)
    for stale in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
      stale.unlink(missing_ok=True)


def _chunks(
  filesystem: Any, path: str, start: int, size: int | None
) -> Iterator[bytes]:
  """The bytes of a remote file from `start` on."""
  if size is None:
    yield ask(filesystem.cat_file, path)
    return
  while start < size:
    end = min(start + _CHUNK, size)
    chunk = ask(filesystem.cat_file, path, start=start, end=end)
    if len(chunk) == size:  # A server that knows no ranges sends everything.
      chunk = chunk[start:]
    elif len(chunk) != end - start:
      raise ConnectionError(f"{len(chunk)} bytes came instead of {end - start}")
    start += len(chunk)
    yield chunk


@contextlib.contextmanager
def _locked(part: pathlib.Path) -> Iterator[Any]:
  """Opens a part for appending; one process at a time."""
  while True:
    try:
      part.parent.mkdir(parents=True, exist_ok=True)
      out = part.open("ab", buffering=0)
    except OSError as error:
      raise _unwritable(part.parent, error) from error
    with out:
      fcntl.flock(out, fcntl.LOCK_EX)
      if locks.is_at(out, part):  # Else it was completed, or given up.
        yield out
        return


def _write(out: Any, chunk: bytes) -> int:
  view = memoryview(chunk)
  try:
    while view:  # A nearly full disk takes a piece before it complains.
      view = view[out.write(view) :]
  except OSError as error:
    raise _unwritable(out.name, error) from error
  return len(chunk)


def _unwritable(place: os.PathLike[str], error: OSError) -> UserError:
  advice = "Free some space, or set" if error.errno == errno.ENOSPC else "Set"
  return UserError(
    f"{place} cannot be written: {error.strerror}. {advice} cache_dir, or"
    " VQT_JAX_CACHE, to another folder."
  )


def _problem(part: pathlib.Path, remote: _Remote) -> str:
  """Why a complete download is not what the server announced, or ""."""
  size = part.stat().st_size
  if remote.size not in (None, size):
    return f"{size} bytes came instead of {remote.size}"
  for algorithm, expected in remote.checksums.items():
    digest = _digest(part, algorithm)
    if digest and base64.b64encode(digest).decode() != expected:
      return f"its {algorithm} checksum is not the server's"
  return ""


def _digest(path: pathlib.Path, algorithm: str) -> bytes | None:
  """A file's digest, or None if the algorithm is unknown here."""
  if algorithm == "crc32c":
    import google_crc32c  # Comes with gcsfs, as does what it checks.

    digest = google_crc32c.Checksum()
  elif algorithm in hashlib.algorithms_guaranteed:
    digest = hashlib.new(algorithm)
  else:
    return None
  with path.open("rb") as content:
    while chunk := content.read(_CHUNK):
      digest.update(chunk)
  return digest.digest()
