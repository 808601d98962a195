"""How many runs fit into the devices' memory side by side."""

import math

import jax

from vqt_jax import memory
from vqt_jax import parallel
from vqt_jax import tuner as tuner_lib

# What runs may take of the devices' memory; the rest is for data and backbone.
MEMORY_SHARE = 0.4


def bytes_per_run(tuner: tuner_lib.Tuner, batch_size: float) -> float:
  """What a training step holds for one run, about; bytes on one device.

  Parameters, gradients and moments; features and their gradients; what the
  reading of each block keeps for its gradient (scores, the MLP's hidden units
  and a few tokens), and what it needs for a moment.

  Args:
    tuner: of the run.
    batch_size: images on the device.
  """
  c = tuner.config
  trained = jax.eval_shape(tuner.init, jax.random.key(0))
  numbers = 6 * sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
  numbers += 4 * batch_size * tuner.num_features
  if tuner.reads_blocks:
    kept = c.num_heads * c.num_tokens + c.mlp_dim + 4 * c.width
    passing = 2 * c.num_heads * c.width + 2 * c.mlp_dim
    numbers += batch_size * tuner.num_queries * (c.depth * kept + passing)
  return 4 * numbers


def runs_at_once(
    tuner: tuner_lib.Tuner, batch_size: int, mesh: jax.sharding.Mesh
) -> int:
  """The number of runs, at least one, that may train side by side."""
  room = parallel.smallest(MEMORY_SHARE * memory.device_memory())
  local = batch_size / mesh.shape["data"]
  return max(1, int(room / bytes_per_run(tuner, local)))
