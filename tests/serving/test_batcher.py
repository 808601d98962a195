"""Batches of what is asked at once."""

import queue
import threading

import pytest

from vqt_jax.serving import batcher as batcher_lib


class Gate:
  """Squares numbers, when it is let; tells what it was asked together."""

  def __init__(self):
    self.began, self.let = queue.Queue(), threading.Semaphore(0)

  def __call__(self, items):
    self.began.put(items)
    self.let.acquire()
    if None in items:
      raise RuntimeError("no number")
    return [item**2 for item in items]


@pytest.fixture
def gate():
  return Gate()


@pytest.fixture
def batcher(gate):
  batcher = batcher_lib.Batcher(gate, 3)
  yield batcher
  for _ in range(9):
    gate.let.release()
  batcher.close()


def test_what_comes_meanwhile_is_a_batch(gate, batcher):
  futures = [batcher.submit(1)]
  assert gate.began.get(timeout=9) == [1]
  futures += [batcher.submit(i) for i in (2, 3, 4, 5, 6)]
  for expected in ([2, 3, 4], [5, 6]):
    gate.let.release()
    assert gate.began.get(timeout=9) == expected
  gate.let.release()
  found = [future.result(timeout=9) for future in futures]
  assert found == [1, 4, 9, 16, 25, 36]


def test_an_error_is_that_of_its_batch_only(gate, batcher):
  bad = batcher.submit(None)
  gate.began.get(timeout=9)
  good = batcher.submit(7)
  gate.let.release()
  with pytest.raises(RuntimeError, match="no number"):
    bad.result(timeout=9)
  gate.let.release()
  assert good.result(timeout=9) == 49


def test_what_nobody_waits_for_is_left_out(gate, batcher):
  batcher.submit(1)
  gate.began.get(timeout=9)
  left, stayed = batcher.submit(2), batcher.submit(3)
  assert left.cancel()
  gate.let.release()
  assert gate.began.get(timeout=9) == [3]
  gate.let.release()
  assert stayed.result(timeout=9) == 9


def test_the_end_comes_after_all_answers(gate):
  batcher = batcher_lib.Batcher(gate, 3)
  futures = [batcher.submit(i) for i in range(7)]
  for _ in range(9):
    gate.let.release()
  batcher.close()
  assert [future.result(timeout=0) for future in futures] == [
    i**2 for i in range(7)
  ]
