"""Work that runs ahead of the results that are taken."""

import itertools
import threading

import jax
import jax.numpy as jnp
import pytest

from vqt_jax.runtime import ahead
from vqt_jax.runtime import mesh as mesh_lib


@pytest.fixture
def one_cpu(monkeypatch):
  monkeypatch.setattr(ahead.jax, "devices", lambda: [None])


def test_a_cpu_computes_two_at_a_time_in_order(one_cpu):
  together = threading.Barrier(2)

  def wait(i):
    together.wait(timeout=30)
    return i

  found = ahead.compute(wait, ((i,) for i in range(6)))
  assert list(found) == list(range(6))


def test_calls_are_read_only_a_little_ahead(one_cpu):
  taken = []
  calls = ((taken.append(i),) for i in itertools.count())
  found = ahead.compute(lambda _: None, calls)
  for _ in range(3):
    next(found)
  assert len(taken) <= 5


def test_a_failure_comes_in_the_place_of_its_result(one_cpu):
  def fail(i):
    if i == 2:
      raise ValueError("third")
    return i

  found = ahead.compute(fail, ((i,) for i in range(5)))
  assert [next(found), next(found)] == [0, 1]
  with pytest.raises(ValueError, match="third"):
    next(found)


def test_the_mesh_is_that_of_the_caller(one_cpu):
  count = len(jax.local_devices())
  assert count > 1
  mesh = mesh_lib.make_mesh(devices=jax.local_devices())
  seen = lambda: jnp.zeros(mesh_lib.axis_size("data"))
  with jax.set_mesh(mesh):
    found = list(ahead.compute(seen, [()] * 2))
  assert [x.shape for x in found] == [(count,)] * 2


def test_several_devices_take_calls_one_after_another():
  """Collectives of two programs at once could wait for each other."""
  threads = set()
  run = lambda: threads.add(threading.get_ident())
  assert list(ahead.compute(run, [()] * 3)) == [None] * 3
  assert threads == {threading.get_ident()}
