"""Redirection of everything that libraries print to a file."""

from collections.abc import Iterator
import contextlib
import faulthandler
import io
import logging
import os
import subprocess
import sys
from typing import Any, TextIO

from vqt_jax import errors
from vqt_jax.runtime import files

# The terminal, while `redirect_output` is in effect.
_screen: TextIO | None = None


class LossyStream:
  """A text stream that drops what it cannot write.

  A run goes on when its terminal or pipe is closed or the disk of its log is
  full. Characters that the encoding lacks are replaced.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream
    self._encoding = getattr(stream, "encoding", None) or "utf-8"

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    text = text.encode(self._encoding, "replace").decode(self._encoding)
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._stream.close()


def screen() -> LossyStream:
  """Standard error as it was before `redirect_output`."""
  return LossyStream(_screen or sys.stderr or io.StringIO())


def print_to_stderr(text: str) -> None:
  """Print a line to standard error, if anybody can still read it."""
  print(errors.printable(text), file=LossyStream(sys.stderr), flush=True)


def print_to_stdout(text: str) -> None:
  """Print to standard output, of which `head` or `less` may not read all."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def reopen_closed_streams() -> None:
  """Open the null device in place of standard streams that are closed.

  Otherwise the next file that is opened gets the number of one of them, and
  whatever libraries print ends up in it.
  """
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
      opened = os.open(os.devnull, os.O_RDWR)
      if opened != number:
        os.dup2(opened, number)
        os.close(opened)
      mode = "w" if number else "r"
      setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


@contextlib.contextmanager
def redirect_output(
  path: str | os.PathLike, if_killed: str = ""
) -> Iterator[TextIO]:
  """Append to a file all that is printed, logged or warned in the block.

  This includes what C++ code writes to the process's standard output and
  error. A `Console` made in the block prints to the screen.

  Args:
    path: the file.
    if_killed: printed to the screen if the process dies in the block, even in
      C++ code.

  Yields:
    The screen.

  Raises:
    UserError: the file cannot be written.
  """
  global _screen
  try:
    file = open(path, "ab", buffering=0, opener=files.refuse_link)
  except OSError as e:
    raise errors.UserError(
      f"Cannot write {path}: {e.strerror}. Choose another place."
    ) from e
  log = LossyStream(io.TextIOWrapper(file, "utf-8", write_through=True))
  saved = sys.stdout, sys.stderr, logging.root.handlers, logging.root.level
  stdout, stderr = os.dup(1), os.dup(2)
  _screen = LossyStream(open(stderr, "w", 1, sys.stderr.encoding))
  for stream in saved[:2]:
    LossyStream(stream).flush()
  os.dup2(file.fileno(), 1)
  os.dup2(file.fileno(), 2)
  sys.stdout = sys.stderr = log
  handler = logging.StreamHandler(log)
  handler.setFormatter(
    logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
  )
  logging.root.handlers = [handler]
  logging.root.setLevel(logging.INFO)
  logging.captureWarnings(True)
  try:
    with _print_if_killed(_screen, if_killed):
      yield _screen
  finally:
    logging.captureWarnings(False)
    sys.stdout, sys.stderr, logging.root.handlers, level = saved
    logging.root.setLevel(level)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    _screen.close()
    _screen = None
    log.close()


@contextlib.contextmanager
def _print_if_killed(screen: TextIO, message: str) -> Iterator[None]:
  """Print a message if the process dies in the block.

  JAX aborts the process from C++ when another one is lost, and the kernel
  kills it when memory runs out; then only another process can still say what
  happened. A shell waits for the end of this one.
  """
  if not message:
    yield
    return
  script = 'read -r done || printf "%s\\n" "error: $0" >&2'
  with subprocess.Popen(
    ["/bin/sh", "-c", script, message],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=screen,
    start_new_session=True,
  ) as shell:
    # Looking at threads that are still running can crash.
    faulthandler.enable(2, all_threads=False)
    try:
      yield
    finally:
      faulthandler.disable()
      with contextlib.suppress(BrokenPipeError):
        shell.communicate(b"done\n")
