"""How many runs fit into the devices' memory side by side."""

import math

import jax

from vqt_jax import memory
from vqt_jax import parallel
from vqt_jax import tuner as tuner_lib

# What runs may take of the devices' memory; the rest is for data and backbone.
MEMORY_SHARE = 0.4


def bytes_per_run(
  tuner: tuner_lib.Tuner, batch_size: float, remat: bool = False
) -> float:
  """What a training step holds for one run, about; bytes on one device.

  Parameters, gradients and moments; features and their gradients; what the
  reading of each block keeps for its gradient (scores, the MLP's hidden units
  and a few tokens), and what it needs for a moment. With an editor, the same of
  the stream.

  Args:
    tuner: of the run.
    batch_size: images on the device.
    remat: whether the stream keeps the blocks' inputs alone.
  """
  c = tuner.config
  trained = tuner.shapes()
  numbers = 6 * sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
  if tuner.has_queries or tuner.editor:  # Else all runs share theirs.
    numbers += 4 * batch_size * tuner.num_features
  if tuner.has_queries:
    kept = c.num_heads * c.num_tokens + c.mlp_dim + 4 * c.width
    passing = 2 * c.num_heads * c.width + 2 * c.mlp_dim
    numbers += batch_size * tuner.num_queries * (c.depth * kept + passing)
  if tuner.editor:
    numbers += batch_size * _stream_numbers(tuner, remat)
  return 4 * numbers


def _stream_numbers(tuner: tuner_lib.Tuner, remat: bool) -> int:
  """What the gradient through the stream keeps of an image, in numbers."""
  c, prompts = tuner.config, tuner.options.num_prompts
  tokens = c.num_tokens
  if tuner.editor.startswith("vpt_"):
    tokens += prompts
  of_token = 16 * c.width + 5 * c.mlp_dim + 5 * c.num_heads * tokens
  if tuner.editor == "ssf":  # What every operation gave before it was scaled.
    of_token += 7 * c.width + c.mlp_dim
  if not remat:
    return c.depth * tokens * of_token
  return c.depth * tokens * 2 * c.width + tokens * of_token


def held_at_once(tuner: tuner_lib.Tuner) -> int:
  """The number of runs, at least one, whose weights fit on each device."""
  numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(tuner.shapes()))
  room = parallel.smallest(MEMORY_SHARE * memory.device_memory())
  return max(1, int(room / (4 * numbers)))


def runs_at_once(
  tuner: tuner_lib.Tuner,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  remat: bool = False,
  device_memory: int | None = None,
) -> int:
  """The number of runs, at least one, that should train side by side.

  On a CPU runs of an editor go one by one: they share nothing but the images,
  so together they would only need the memory of all, and miss its caches.

  Args:
    tuner: of the runs.
    batch_size: images in a step, over all devices.
    mesh: its devices.
    remat: as in `bytes_per_run`.
    device_memory: bytes; None: of the devices that are here.
  """
  if tuner.editor and mesh.devices.flat[0].platform == "cpu":
    return 1
  size = device_memory or memory.device_memory()
  room = parallel.smallest(MEMORY_SHARE * size)
  local = batch_size / mesh.shape["data"]
  return max(1, int(room / bytes_per_run(tuner, local, remat)))
