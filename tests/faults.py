"""Has one step of a write fail, in this process."""

import contextlib
import errno
import os
import resource
import sys

import pytest

# Steps of a write -> the error that they end with here.
STEPS = {
  "open": errno.ENOSPC,
  "os.rename": errno.EIO,
  "os.mkdir": errno.EACCES,
  "os.remove": errno.EACCES,
  "fsync": errno.EIO,
}


class Faults:
  """Counts the steps of writing below a folder; one of them fails.

  Attributes:
    count: steps since `below`.
  """

  def __init__(self):
    self.count, self._root, self._fail = 0, None, 0
    sys.addaudithook(self._see)

  @contextlib.contextmanager
  def below(self, root, fail=0):
    """Counts in the block; the step with the number `fail` fails."""
    self.count, self._fail, self._root = 0, fail, str(root)
    fsync = os.fsync

    def checked(fd):
      self._see("fsync", [os.readlink(f"/proc/self/fd/{fd}")])
      fsync(fd)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(os, "fsync", checked)
      try:
        yield
      finally:
        self._root = None

  def _see(self, event, args):
    if self._root is None or event not in STEPS:
      return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
      return
    path = args[0] if isinstance(args[0], str | os.PathLike) else ""
    if os.fspath(path).startswith(self._root):
      self.count += 1
      if self.count == self._fail:
        error = STEPS[event]
        raise OSError(error, os.strerror(error), str(path))


FAULTS = Faults()  # One, as hooks stay.


@contextlib.contextmanager
def largest_file(size):
  """No file grows beyond it, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
