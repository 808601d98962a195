"""Notices the signals by which a run is asked to stop."""

from collections.abc import Iterator
import contextlib
import signal
import threading

import jax

from vqt_jax.runtime import processes


class Stopped(BaseException):
  """The run was asked to stop, and saved itself first.

  It may come out of any line, as `KeyboardInterrupt`, and is no failure of it.
  """


class StopSignal:
  """Notes SIGTERM and SIGINT instead of dying of them; a context manager.

  Within another one, that one gets to know too: a run may take note of a signal
  too late to stop, but no further run must begin. In another thread than the
  main one it notes nothing: signals are the business of who owns that.

  Attributes:
    received: whether this process got one.
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
    if self.received and number == signal.SIGINT:  # Asked twice: now.
      raise KeyboardInterrupt
    self.received = True
    if not self._patient:
      raise Stopped

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """While there is nothing to save: a signal ends the work right away.

    Raises:
      Stopped: a signal came. (Of several processes each may get it elsewhere,
        so they go on until all can ask.)
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
    """Whether any process received one; all must ask together."""
    return processes.any_process(self.received)

  def __exit__(self, *unused):
    for number, handler in self._previous.items():
      signal.signal(number, handler)
      outer = getattr(handler, "__self__", None)
      if isinstance(outer, StopSignal):
        outer.received |= self.received
