"""Locks of files and folders, between processes and within one."""

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

# In a folder that one process has for itself: its number, and its machine.
LOCK = ".vqt_jax.lock"
# Those that the code that is running has for itself.
_held = contextvars.ContextVar("_held", default=frozenset[files.Path]())


def is_at(file: IO[bytes], place: pathlib.Path) -> bool:
  """Whether an open file still has that name; while one waits it may change."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(file.fileno()), place.stat())
  return False


def lock(file: IO[bytes]) -> bool:
  """Locks a file until it is closed, unless somebody else has.

  Raises:
    OSError: files cannot be locked there.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


@contextlib.contextmanager
def alone_in(folder: files.Path) -> Iterator[None]:
  """Keeps other processes out of a folder, until this ends or the process does.

  What runs within may do the same again. Nobody is kept out where files cannot
  be locked: of buckets, some network file systems, and folders that cannot be
  written.

  Raises:
    UserError: another process is there.
  """
  place = files.absolute(folder)
  if files.in_bucket(place) or place in _held.get():
    yield
    return
  file = _lock_file(folder)
  before = _held.set(_held.get() | {place})
  try:
    yield
  finally:
    _held.reset(before)
    if file:
      with file, contextlib.suppress(OSError):
        (place / LOCK).unlink()


def _lock_file(folder: pathlib.Path) -> IO[bytes] | None:
  """The lock of a folder, taken; None where that cannot be."""
  path = folder / LOCK
  try:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
      with contextlib.ExitStack() as closing:
        file = closing.enter_context(open(path, "a+b", buffering=0))
        if not lock(file):
          file.seek(0)
          owner = file.read(200).decode(errors="replace")
          break
        if is_at(file, path):  # Else whoever had it has just removed it.
          with contextlib.suppress(OSError):  # On a full disk it stays empty.
            file.truncate(0)
            me = f"process {os.getpid()} on {socket.gethostname()}"
            file.write(me.encode())
          closing.pop_all()
          return file
  except OSError:
    return None
  raise errors.UserError(
    f"Another run is already in {folder}{f' ({owner})' if owner else ''}."
    " Wait until it ends, or choose another --workdir."
  )
