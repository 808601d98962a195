"""Batches of data on the devices, of data on the host, or streamed."""

from collections.abc import Callable, Iterator
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.features import store
from vqt_jax.runtime import ahead
from vqt_jax.runtime import mesh as mesh_lib

# Input of a call that takes S steps on batches of B examples: data on the
# devices, rows of it (S, B) int32, and a mask (S, B) float32 that is 0 where a
# row only fills up a batch.
Call = tuple[dict[str, jax.Array], np.ndarray, jax.Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class ResidentBatches:
  """Batches of data on the devices; an epoch is one call.

  Attributes:
    data: from `store.store_on_devices` or `images.images_on_devices`.
    rows: (n,) rows of `data` to train on.
    batch_size: examples in a step, over all devices.
    seed: decides the order, together with the epoch.
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

  def with_features(self, columns: np.ndarray) -> "ResidentBatches":
    """Return batches of some of the features of the head."""
    some = self.data["features"][:, columns]
    return dataclasses.replace(self, data={**self.data, "features": some})

  def epoch(self, epoch: int, start: int) -> Iterator[Call]:
    """Yield the epoch as one call, rotated so that step `start` comes first.

    So shapes, and the compiled program, do not depend on `start`.
    """
    if start < self.steps:
      shards = self.mesh.shape["data"]
      shuffle = (self.seed, epoch)
      index, mask = batch_order(self.rows, self.batch_size, shards, shuffle)
      yield self.data, np.roll(index, -start, 0), np.roll(mask, -start, 0)


@dataclasses.dataclass(frozen=True)
class HostBatches:
  """Batches of features on the host, sent ahead of use; a call is a step.

  Attributes:
    features: in memory, or in a file.
    label: (n,) int32, of all rows of `features`.
    rows: rows to train on.
    batch_size: examples in a step, over all devices.
    seed: decides the order, together with the epoch.
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
    """Steps in an epoch."""
    return -(-len(self.rows) // self.batch_size)

  def epoch(self, epoch: int, start: int) -> Iterator[Call]:
    """Yield an epoch from step `start` on."""
    return self.calls((self.seed, epoch), start)

  def calls(
    self, shuffle: tuple | None = None, start: int = 0
  ) -> Iterator[Call]:
    """Yield all batches from `start` on; without `shuffle` in stored order."""
    mesh = self.features.layout.mesh
    index, mask = batch_order(
      self.rows, self.batch_size, mesh.shape["data"], shuffle
    )
    batches = zip(index[start:], mask[start:])
    return ahead.prefetch(lambda batch: self._call(*batch), batches)

  def _call(self, rows: np.ndarray, mask: np.ndarray) -> Call:
    mesh = self.features.layout.mesh
    label = mesh_lib.place_array(
      self.label[rows], mesh_lib.replicated_sharding(mesh)
    )
    data = {**self.features.send(rows), "label": label}
    return data, np.arange(len(rows), dtype=np.int32)[None], mask[None]


@dataclasses.dataclass(frozen=True)
class StreamedBatches:
  """Batches read and decoded anew in every epoch; a call is a step.

  Attributes:
    read: (epoch, first step) -> this process's part of each batch.
    num_examples: in an epoch.
    batch_size: examples in a step, over all devices and processes.
    mesh: batches are sharded over its `data` axis.
  """

  read: Callable[[int, int], Iterator[dict[str, np.ndarray]]]
  num_examples: int
  batch_size: int
  mesh: jax.sharding.Mesh

  @property
  def steps(self) -> int:
    """Steps in an epoch."""
    return -(-self.num_examples // self.batch_size)

  def epoch(self, epoch: int, start: int) -> Iterator[Call]:
    """Yield an epoch from step `start` on."""
    for batch in self.read(epoch, start):
      yield call_of_batch(batch, self.mesh)


Batches = ResidentBatches | HostBatches | StreamedBatches


def call_of_batch(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> Call:
  """Place a batch of {"image", "label", "mask"} on the devices, as one step."""
  data = mesh_lib.from_process_local(batch, mesh)
  mask = data.pop("mask")
  order = np.arange(len(mask), dtype=np.int32)[None]
  return data, order, jnp.reshape(mask, (1, -1))


def batch_order(
  rows: np.ndarray, batch_size: int, shards: int, shuffle: tuple | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Divide rows into batches, every row exactly once.

  Args:
    rows: (n,) indices into the data.
    batch_size: examples in a batch; the last one may hold fewer.
    shards: each batch is filled up to a multiple of this.
    shuffle: (seed, epoch) of the order; None keeps it.

  Returns:
    (S, B) int32 rows and (S, B) float32 mask, 0 where a row only fills up.
  """
  if shuffle is not None:
    rows = np.random.default_rng(shuffle).permutation(rows)
  batch_size = min(batch_size, len(rows))
  steps = -(-len(rows) // batch_size)
  width = -(-batch_size // shards) * shards
  index = np.full((steps, width), rows[0], np.int32)
  mask = np.zeros((steps, width), np.float32)
  for step in range(steps):
    part = rows[step * batch_size : (step + 1) * batch_size]
    index[step, : len(part)] = part
    mask[step, : len(part)] = 1
  return index, mask
