"""File locks, between processes and within one.

`flock` itself, since the lock is on the data file: whoever waits for it finds
out whether that file was completed or removed meanwhile.
"""

from collections.abc import Iterator
import contextlib
import contextvars
import fcntl
import os
import pathlib
import socket
from typing import IO

from vqt_jax import errors
from vqt_jax.runtime import files

# Lock file of a folder; it holds the number and the machine of a process.
LOCK_NAME = ".vqt_jax.lock"
# Folders that the code of this context has locked.
_locked = contextvars.ContextVar("_locked", default=frozenset[files.Path]())


def try_lock(file: IO[bytes], wait: bool = False) -> bool:
  """Lock a file until it is closed; return False if another process has it.

  Raises:
    OSError: the file system has no locks.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  return True


def is_still_at(file: IO[bytes], path: pathlib.Path) -> bool:
  """Return whether an open file was neither renamed, replaced nor removed."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  return False


def open_locked(path: pathlib.Path, wait: bool) -> IO[bytes] | None:
  """Open a file for appending, unbuffered, and lock it until it is closed.

  With `wait`, wait for another process that has locked it.

  Returns:
    The file, or None if another process has locked it.

  Raises:
    OSError: the file cannot be opened, or the file system has no locks.
    UserError: it is a link.
  """
  while True:
    with contextlib.ExitStack() as closing:
      file = closing.enter_context(
        open(path, "ab", buffering=0, opener=files.refuse_link)
      )
      if not try_lock(file, wait):
        return None
      if is_still_at(file, path):
        closing.pop_all()
        return file


@contextlib.contextmanager
def lock_folder(folder: files.Path) -> Iterator[None]:
  """Keep other processes out of a folder while the block runs.

  Code that runs within may lock the folder again. Nobody is kept out where
  there are no locks: in buckets, on some network file systems, and in folders
  that cannot be written.

  Raises:
    UserError: another process is in the folder.
  """
  place = files.absolute(folder)
  if files.in_bucket(place) or place in _locked.get():
    yield
    return
  file = _lock_file(folder)
  before = _locked.set(_locked.get() | {place})
  try:
    yield
  finally:
    _locked.reset(before)
    if file:
      with file, contextlib.suppress(OSError):
        (place / LOCK_NAME).unlink()


def _lock_file(folder: pathlib.Path) -> IO[bytes] | None:
  """Lock a folder's lock file; None where that is impossible."""
  path, owner = folder / LOCK_NAME, ""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if file := open_locked(path, wait=False):
      with contextlib.suppress(OSError):  # On a full disk it stays empty.
        file.truncate(0)
        me = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(me.encode())
      return file
  except OSError:
    return None
  with contextlib.suppress(OSError):
    owner = path.read_bytes()[:200].decode(errors="replace")
  raise errors.UserError(
    f"Another run is already in {folder}{f' ({owner})' if owner else ''}."
    " Wait until it ends, or choose another --workdir."
  )
