"""Where a step's examples come from: the devices, the host, or the data set."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.features import store
from vqt_jax.runtime import mesh as mesh_lib

Chunk = tuple[dict[str, jax.Array], np.ndarray, jax.Array | np.ndarray]
T = TypeVar("T")
AHEAD = 2  # Batches on their way to the devices while one is used.


@dataclasses.dataclass(frozen=True)
class Resident:
  """Rows of data that sit on the devices; an epoch is one chunk.

  Attributes:
    data: as `store.on_devices` or `store.resident` give it.
    rows: (n,) rows of `data` to train on.
    batch_size: examples in a step, over all devices.
    seed: with the epoch decides the order.
    mesh: batches are filled up to a multiple of its `data` axis.
  """

  data: dict[str, jax.Array]
  rows: np.ndarray
  batch_size: int
  seed: int
  mesh: jax.sharding.Mesh

  @property
  def num_examples(self) -> int:
    return len(self.rows)

  @property
  def steps(self) -> int:
    """Steps in an epoch."""
    return -(-len(self.rows) // self.batch_size)

  def epoch(self, epoch: int, start: int) -> Iterator[Chunk]:
    """An epoch as data, order, mask, its step `start` first.

    The steps before it come last: of an epoch begun anywhere the shapes, and so
    the compiled program, are the same.
    """
    if start < self.steps:
      shards = self.mesh.shape["data"]
      shuffle = (self.seed, epoch)
      index, mask = store.order(self.rows, self.batch_size, shards, shuffle)
      yield self.data, np.roll(index, -start, 0), np.roll(mask, -start, 0)


@dataclasses.dataclass(frozen=True)
class Stored:
  """Rows of features that lie on the host; batches are sent ahead of use.

  Attributes:
    features: in memory, or in a file.
    label: (n,) int32, of all rows of `features`.
    rows: those to train on.
    batch_size: examples in a step, over all devices.
    seed: with the epoch decides the order.
  """

  features: store.HostStore
  label: np.ndarray
  rows: np.ndarray
  batch_size: int
  seed: int

  @property
  def num_examples(self) -> int:
    return len(self.rows)

  @property
  def steps(self) -> int:
    return -(-len(self.rows) // self.batch_size)

  def epoch(self, epoch: int, start: int) -> Iterator[Chunk]:
    return self.chunks((self.seed, epoch), start)

  def chunks(self, shuffle: tuple | None = None, start: int = 0):
    """A chunk a step; without `shuffle` in stored order."""
    mesh = self.features.layout.mesh
    index, mask = store.order(
      self.rows, self.batch_size, mesh.shape["data"], shuffle
    )
    batches = zip(index[start:], mask[start:])
    return ahead(lambda batch: self._chunk(*batch), batches)

  def _chunk(self, rows: np.ndarray, mask: np.ndarray) -> Chunk:
    mesh = self.features.layout.mesh
    label = mesh_lib.place_array(
      self.label[rows], mesh_lib.replicated_sharding(mesh)
    )
    data = {**self.features.send(rows), "label": label}
    return data, np.arange(len(rows), dtype=np.int32)[None], mask[None]


def ahead(
  function: Callable[..., T], items: Iterable, count: int = AHEAD
) -> Iterator[T]:
  """Maps in another thread, `count` items ahead of what is taken."""
  with futures.ThreadPoolExecutor(1) as pool:
    queue = collections.deque()
    for item in items:
      queue.append(pool.submit(function, item))
      if len(queue) > count:
        yield queue.popleft().result()
    while queue:
      yield queue.popleft().result()


def behind(items: Iterable[T]) -> Iterator[T]:
  """Gives each item when the next is there: started, on the devices."""
  queue = collections.deque()
  for item in items:
    queue.append(item)
    if len(queue) > 1:
      yield queue.popleft()
  yield from queue


@dataclasses.dataclass(frozen=True)
class Streamed:
  """Batches read and decoded again every epoch, one step a call.

  Attributes:
    read: (epoch, first step) -> this process's part of each batch.
    num_examples: in an epoch.
    batch_size: examples in a step, over all devices and processes.
    mesh: batches are spread over its `data` axis.
  """

  read: Callable[[int, int], Iterator[dict[str, np.ndarray]]]
  num_examples: int
  batch_size: int
  mesh: jax.sharding.Mesh

  @property
  def steps(self) -> int:
    return -(-self.num_examples // self.batch_size)

  def epoch(self, epoch: int, start: int) -> Iterator[Chunk]:
    for batch in self.read(epoch, start):
      yield on_devices(batch, self.mesh)


Source = Resident | Stored | Streamed


def on_devices(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> Chunk:
  """One batch of {"image", "label", "mask"} as a chunk of one step."""
  data = mesh_lib.from_process_local(batch, mesh)
  mask = data.pop("mask")
  order = np.arange(len(mask), dtype=np.int32)[None]
  return data, order, jnp.reshape(mask, (1, -1))
