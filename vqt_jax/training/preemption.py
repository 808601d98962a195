"""Signals that ask a run to stop."""

from collections.abc import Iterator
import contextlib
import signal
import threading

import jax

from vqt_jax.runtime import processes


class Stopped(BaseException):
  """Raised when a run was asked to stop and has saved its state.

  Like `KeyboardInterrupt` it can be raised by any line, and is not an error.
  """


class StopSignal:
  """Context manager that records SIGTERM and SIGINT instead of ending on them.

  A signal that an inner context records too late to stop is passed to the outer
  one, so that no further run begins. In a thread other than the main one
  nothing is recorded: signals belong to whoever owns the main thread.

  Attributes:
    received: whether this process received a signal.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __enter__(self) -> "StopSignal":
    self.received = False
    self._patient = True
    self._previous = {}
    if threading.current_thread() is threading.main_thread():
      self._previous = {s: signal.signal(s, self._note) for s in self.SIGNALS}
    return self

  def _note(self, number, frame):
    del frame
    # The second Ctrl-C ends it at once.
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = True
    if not self._patient:
      raise Stopped

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Let a signal end the work at once, where there is nothing to save yet.

    Raises:
      Stopped: a signal came. (Not if there are several processes: each may get
        it at another point, so they go on until they can agree.)
    """
    self._patient = jax.process_count() > 1
    try:
      if self:
        raise Stopped
      yield
    finally:
      self._patient = True
    if self:
      raise Stopped

  def __bool__(self) -> bool:
    """Return whether any process received a signal; a collective call."""
    return processes.any_process(self.received)

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
      outer = getattr(handler, "__self__", None)
      if isinstance(outer, StopSignal):
        outer.received |= self.received
