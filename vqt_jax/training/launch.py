"""The start of a run: joining other processes, opening workdir and log."""

from collections.abc import Iterator
import contextlib
import os
import sys
import threading
from typing import TextIO

import jax
from ml_collections import ConfigDict

from vqt_jax import errors
from vqt_jax.runtime import devices
from vqt_jax.runtime import files
from vqt_jax.runtime import logfile
from vqt_jax.runtime import mirror
from vqt_jax.runtime import processes
from vqt_jax.training import workdir as workdir_lib

# What follows "the same command".
RESUMES = "resumes from the last training checkpoint, if there is one."

NOTICE_SECONDS = 10  # Waiting for longer is mentioned.


@contextlib.contextmanager
def open_run(
  config: ConfigDict,
  workdir: str,
  coordinator: str | None,
  *others: int | None,
) -> Iterator[tuple[files.Path, TextIO]]:
  """Join the other processes, if any, open the workdir, and open the log.

  Inside, all that libraries print goes to the log. `coordinator` and `others`
  are as for `processes.connect`; coordinator "none": this process is alone.

  Yields:
    The log file of this process, and the screen.

  Raises:
    UserError: processes cannot be joined, or the workdir cannot be opened.
  """
  place = files.path(workdir)
  joined = not processes.is_alone(coordinator) and _join(coordinator, *others)
  with logfile.redirect_output(os.devnull, jax_crash_message()):
    devices.find_devices()  # Before the workdir is touched.
  on_all = processes.raise_on_all if joined else contextlib.nullcontext
  with contextlib.ExitStack() as opened:
    with logfile.redirect_output(os.devnull), on_all():
      if not joined or processes.is_first():
        name = "log.txt"
        opened.enter_context(workdir_lib.open_workdir(config, place))
      else:
        name = f"log_{jax.process_index()}.txt"
      logs = mirror.MirroredFolder(place, name)
    log = logs.folder / name
    with logfile.redirect_output(log, crash_message(log)) as screen:
      try:
        yield log, screen
      finally:
        # A run need not fail because its log cannot be copied to a bucket.
        with contextlib.suppress(errors.UserError):
          logs.close()


def _join(coordinator: str | None, *others: int | None) -> bool:
  """Join the other processes; return whether there are any."""
  hint = ""
  if coordinator is None:  # For example in the shell of a Slurm step.
    hint = " If there are none, add --coordinator=none to run alone."
  # JAX aborts the process if the others do not come.
  aborted = (
    f"The other processes did not come within {processes.CONNECT_SECONDS} s:"
    " start the same command on all of them, and check that each reaches the"
    f" first one (coordinator {coordinator or 'of the platform'}).{hint}"
  )
  with (
    logfile.redirect_output(os.devnull, aborted) as screen,
    _notice_if_slow(screen, f"Waiting for the other processes.{hint}"),
  ):
    return processes.connect(coordinator, *others)


@contextlib.contextmanager
def _notice_if_slow(screen: TextIO, text: str) -> Iterator[None]:
  """Print a line if the body takes long."""
  timer = threading.Timer(NOTICE_SECONDS, print, [text], {"file": screen})
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    timer.join()  # It must not print after the screen is closed.


def crash_message(log: files.Path) -> str:
  """Message for a process that ends without an exception of Python."""
  if not processes.is_connected():
    return (
      f"The program crashed or was killed; see the end of {log}. Fix the cause;"
      f" the same command {RESUMES}"
    )
  return (
    "This process ended without saving: most likely another process of this"
    f" run is gone (see the end of {log}). Fix the cause; the same command on"
    f" all of them {RESUMES}"
  )


def jax_crash_message() -> str:
  """Message for a process that JAX aborts before there is a log."""
  given = {
    "XLA_FLAGS": devices.given_xla_flags(),
    "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS"),
  }
  flags = [f"{name}={value}" for name, value in given.items() if value]
  hint = (
    f" {' and '.join(flags)} may have a flag that it does not know."
    if flags
    else ""
  )
  return (
    f"JAX crashed, or this process was killed.{hint} To see whether JAX works:"
    f" {sys.executable} -c"
    " 'import jax; jax.devices()'"
  )
