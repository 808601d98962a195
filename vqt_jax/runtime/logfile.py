"""Sends the noise of libraries to a file, so that the screen is ours."""

from collections.abc import Iterator
import contextlib
import faulthandler
import io
import logging
import os
import subprocess
import sys
from typing import TextIO

from vqt_jax import errors

# The terminal, while `quiet` sends the process's own streams to a file.
_screen: TextIO | None = None


def screen() -> TextIO:
  """Standard error as the person sees it; drops all where it is closed."""
  return _screen or sys.stderr or _Nobody()


def open_streams() -> None:
  """Opens the null device in place of standard streams that are closed.

  Else the next file that is opened would get the number of one of them, and
  what libraries write there.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
      opened = os.open(os.devnull, os.O_RDWR)
      if opened != number:
        os.dup2(opened, number)
        os.close(opened)
      mode = "w" if number else "r"
      setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def say(text: str) -> None:
  """Prints a line to standard error, if anybody can still read it."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(path: str | os.PathLike) -> Iterator[TextIO]:
  """Sends all that libraries print, log or warn to a file.

  This holds for what Python prints and for what C++ writes to the process's
  standard output and error. A `Console` made meanwhile prints to the screen.

  Args:
    path: the file; it is appended to.

  Yields:
    The screen.

  Raises:
    UserError: the file cannot be written.
  """
  global _screen
  try:
    log = _Lossy(
      open(path, "ab", buffering=0), "utf-8", "replace", write_through=True
    )
  except OSError as e:
    raise errors.UserError(
      f"Cannot write {path}: {e.strerror}. Choose another place."
    ) from e
  saved = sys.stdout, sys.stderr, logging.root.handlers, logging.root.level
  descriptors = os.dup(1), os.dup(2)
  with (
    log,
    _Lossy(
      open(descriptors[1], "wb"),
      sys.stderr.encoding,
      "backslashreplace",
      line_buffering=True,
    ) as screen,
  ):
    for saved_stream in saved[:2]:
      with contextlib.suppress(OSError):
        saved_stream.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    handler = logging.StreamHandler(log)
    handler.setFormatter(
      logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _screen = screen
    try:
      yield screen
    finally:
      _screen = None
      logging.captureWarnings(False)
      sys.stdout, sys.stderr, logging.root.handlers, level = saved
      logging.root.setLevel(level)
      log.flush()
      os.dup2(descriptors[0], 1)
      os.dup2(descriptors[1], 2)
      os.close(descriptors[0])


@contextlib.contextmanager
def last_words(screen: TextIO, words: str) -> Iterator[None]:
  """Has something said if the process dies meanwhile, even in C++ code.

  A small process of its own waits for this one's end; where in Python the
  thread was that died of it is written to standard error.

  Args:
    screen: where it is said.
    words: what.
  """
  waits = 'read -r done || printf "%s\\n" "error: $0" >&2'
  with subprocess.Popen(
    ["/bin/sh", "-c", waits, words],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=screen,
    start_new_session=True,
  ) as other:
    # Other threads may be running, and to look at one of these can crash.
    faulthandler.enable(2, all_threads=False)
    try:
      yield
    finally:
      faulthandler.disable()
      with contextlib.suppress(BrokenPipeError):
        other.communicate(b"done\n")


class _Nobody(io.StringIO):
  """Keeps nothing of what is written."""

  def write(self, text: str) -> int:
    return len(text)


class _Lossy(io.TextIOWrapper):
  """Drops what nobody reads or no disk has room for: a run goes on without."""

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      super().write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      super().flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):
      super().close()
