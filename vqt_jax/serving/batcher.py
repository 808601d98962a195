"""Batches of what many threads ask at once, answered by one thread."""

from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import queue
import threading
from typing import Any


class Batcher:
  """A queue, and the thread that answers all that is in it, batch by batch.

  A batch is what has come while the one before it was answered, so nobody waits
  for a batch to fill up.
  """

  def __init__(
    self, answer: Callable[[list[Any]], Sequence[Any]], most: int
  ) -> None:
    """Start the thread.

    Args:
      answer: from up to `most` items to their answers; is called in the thread
        only.
      most: items in a batch.
    """
    self._answer, self._most = answer, most
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def submit(self, item: Any) -> futures.Future:
    """Queue an item; unless its future is cancelled, it will be answered.

    An error of the function is that of all in its batch.
    """
    future: futures.Future = futures.Future()
    self._queue.put((item, future))
    return future

  def close(self) -> None:
    """Wait until all is answered, and end the thread; submit nothing more."""
    self._queue.put(None)
    self._thread.join()

  def _work(self) -> None:
    open_ = True
    while open_:
      jobs = [self._queue.get()]
      with contextlib.suppress(queue.Empty):
        while len(jobs) < self._most:
          jobs.append(self._queue.get_nowait())
      open_ = None not in jobs
      jobs = [
        job for job in jobs if job and job[1].set_running_or_notify_cancel()
      ]
      if jobs:
        self._resolve(*zip(*jobs))

  def _resolve(self, items: tuple[Any], waiting: tuple[futures.Future]) -> None:
    try:
      answers = self._answer(list(items))
    except Exception as e:  # It is the askers', and this thread goes on.
      for future in waiting:
        future.set_exception(e)
      return
    for future, answer in zip(waiting, answers, strict=True):
      future.set_result(answer)
