"""Chunks of a batch that a CPU computes one after another, in its cache.

Memory, not arithmetic, is what arrays of a whole batch wait for; GPUs and TPUs
have faster memory, and fuse what passes over it.
"""

from typing import Any

import jax

from vqt_jax.runtime import mesh

# Size of the largest array of a chunk: a fraction of a usual L3 cache.
CACHE_BYTES = 8 * 2**20


def count(batch: int, bytes_each: int, least: int) -> int:
  """Return in how many chunks of equal size a batch is computed.

  It is 1 on other devices than one CPU, for a batch of unknown size
  (`jax.export` may leave it symbolic), and if no divisor of its size fits.

  Args:
    batch: number of examples.
    bytes_each: size of the largest array for one example.
    least: examples in a chunk, at least.
  """
  if mesh.backend() != "cpu" or mesh.axis_size("data") > 1:
    return 1
  if jax.export.is_symbolic_dim(batch):
    return 1
  fewest = max(-(-batch * bytes_each // CACHE_BYTES), 1)
  candidates = range(fewest, batch // least + 1)
  return next((n for n in candidates if batch % n == 0), 1)


def split(x: jax.Array, count: int) -> jax.Array:
  """Split a batch (B, ...) into (count, B / count, ...)."""
  return x.reshape(count, -1, *x.shape[1:])


def join(tree: Any) -> Any:
  """Join chunks: leaves (count, b, ...) become (count * b, ...)."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
