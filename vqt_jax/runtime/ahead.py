"""Work that runs ahead of the results that are taken, in order."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, TypeVar

import jax

from vqt_jax.runtime import mesh as mesh_lib

T = TypeVar("T")
PREFETCH = 2  # Batches on their way to the devices while one is used.


def prefetch(
  function: Callable[..., T],
  items: Iterable,
  count: int = PREFETCH,
  threads: int = 1,
) -> Iterator[T]:
  """Map in other threads, `count` items ahead of the one that is taken."""
  with futures.ThreadPoolExecutor(threads) as pool:
    queue = collections.deque()
    for item in items:
      queue.append(pool.submit(function, item))
      if len(queue) > count:
        yield queue.popleft().result()
    while queue:
      yield queue.popleft().result()


def compute(
  function: Callable[..., T], calls: Iterable[tuple[Any, ...]]
) -> Iterator[T]:
  """Yield the result of a compiled function for each call's arguments.

  The devices compute one while the one before it is looked at. On a CPU two are
  computed at a time, by two threads: XLA divides every operation among the
  cores and waits for all of them, and one call fills the gaps of the other.
  """
  if mesh_lib.backend() != "cpu" or len(jax.devices()) > 1:
    yield from _delay_by_one(function(*call) for call in calls)
    return
  mesh = jax.sharding.get_mesh()

  def call_and_wait(call):
    with jax.set_mesh(mesh):  # It is set for each thread separately.
      return jax.block_until_ready(function(*call))

  yield from prefetch(call_and_wait, calls, count=1, threads=2)


def _delay_by_one(items: Iterable[T]) -> Iterator[T]:
  """Yield each item after the next one is started."""
  queue = collections.deque()
  for item in items:
    queue.append(item)
    if len(queue) > 1:
      yield queue.popleft()
  yield from queue
