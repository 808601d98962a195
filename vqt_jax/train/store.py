"""Examples on the devices: as images, or as what readers need of them.

Without augmentation the stream of an image never changes, so it is computed
once and kept: LN_0(z_m) of every block and the final feature.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax import parallel
from vqt_jax import tuner as tuner_lib


def bytes_per_image(tuner: tuner_lib.Tuner) -> int:
  """Size of one stored image: L * N * D numbers, and the final feature."""
  c = tuner.config
  tokens = c.depth * c.num_tokens * c.width if tuner.reads_blocks else 0
  return tokens * jnp.dtype(c.dtype).itemsize + c.width * 4


def _write(tuner, params, store, images, start):
  """Writes what readers need of `images` at row `start` of the store."""
  stream = tuner_lib.run_backbone(tuner, params, images)
  seen = {"final": stream.final, "tokens": stream.tokens}
  write = jax.lax.dynamic_update_slice_in_dim
  return {
      name: write(held, seen[name], start, 1 if name == "tokens" else 0)
      for name, held in store.items()
  }


def _cut(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], *axes: int
) -> jax.sharding.NamedSharding:
  """Shares out over `data` by the first of these axes that can be.

  Resident data is cut across examples rather than between them where possible:
  then every device finds its part of any row, and putting a batch together is
  one exchange of the batch, not one of all that is held.
  """
  shards = mesh.shape["data"]
  axis = next(axis for axis in axes if shape[axis] % shards == 0)
  return parallel.batch_sharding(mesh, axis)


def extract(
    tuner: tuner_lib.Tuner,
    params: Any,
    examples: dict[str, np.ndarray],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, jax.Array]:
  """Runs the backbone once over all images.

  Args:
    tuner: decides what is kept.
    params: the frozen backbone, on the devices.
    examples: {"image": (n, h, w, 3) float32, "label": (n,)}, on the host.
    mesh: the store is spread over its `data` axis.
    batch_size: images at a time, over all devices.
    progress: told how many images are done.

  Returns:
    {"tokens": (L, m, N, D) if read, "final": (m, D), "label": (m,)} with m >= n
    to fill all devices alike; rows from n on are never used.
  """
  images, label = examples["image"], examples["label"]
  c, shards = tuner.config, mesh.shape["data"]
  size = -(-min(batch_size, len(images)) // shards) * shards
  rows = -(-len(images) // size) * size
  images = _pad(images, rows)
  shardings = {"final": parallel.replicated(mesh)}
  store = {
      "final": jnp.zeros((rows, c.width), device=shardings["final"])
  }
  if tuner.reads_blocks:
    shape = (c.depth, rows, c.num_tokens, c.width)
    shardings["tokens"] = _cut(mesh, shape, 3, 1)
    store["tokens"] = jnp.zeros(shape, c.dtype, device=shardings["tokens"])
  write = jax.jit(
      functools.partial(_write, tuner),
      donate_argnums=1,
      out_shardings=shardings,
  )
  for start in range(0, rows, size):
    batch = images[start : start + size]
    batch = parallel.from_host(batch, parallel.batch_sharding(mesh))
    store = write(params, store, batch, start)
  label = parallel.from_host(_pad(label, rows), parallel.replicated(mesh))
  return {**store, "label": label}


def resident(
    examples: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Images on the devices, spread over `data`, for training through the ViT."""
  shards = mesh.shape["data"]
  rows = -(-len(examples["image"]) // shards) * shards
  images = _pad(examples["image"], rows)
  label = _pad(examples["label"], rows)
  return {
      "image": parallel.from_host(images, _cut(mesh, images.shape, 1, 2, 0)),
      "label": parallel.from_host(label, parallel.replicated(mesh)),
  }


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
  missing = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, missing) if rows > len(array) else array


def device_memory() -> int:
  """Bytes that one device may hold; on a CPU the machine's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  import psutil  # pylint: disable=g-import-not-at-top

  return psutil.virtual_memory().total // jax.local_device_count()


def order(
    rows: np.ndarray, batch_size: int, shards: int, shuffle: tuple | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of resident data in batches, every row exactly once.

  Args:
    rows: (n,) indices into the data.
    batch_size: examples in a batch; the last one may hold fewer.
    shards: each batch is filled up to a multiple of this.
    shuffle: (seed, epoch) decide the order; None keeps it.

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
