"""Number of trials whose memory fits on the devices."""

import math

import jax

from vqt_jax.models import editors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import memory
from vqt_jax.runtime import processes

# Share of the devices' memory for trials; the rest is for data and backbone.
MEMORY_SHARE = 0.4


def bytes_per_trial(
  tuner: tuner_lib.Tuner, batch_size: float, remat: bool = False
) -> float:
  """Estimate the bytes that a training step holds for one trial, per device.

  With `batch_size` images a device, they are parameters, gradients and moments;
  features and their gradients; and what the gradient of reading keeps or, with
  an editor, that of the stream.
  """
  trainable = tuner.shapes()
  numbers = 6 * sum(math.prod(x.shape) for x in jax.tree.leaves(trainable))
  if tuner.reader.init or tuner.editor:  # Else all trials share features.
    numbers += 4 * batch_size * tuner.num_features
  numbers += batch_size * tuner.reader.gradient_numbers(tuner)
  if tuner.editor:
    numbers += batch_size * _stream_numbers(tuner, remat)
  return 4 * numbers


def _stream_numbers(tuner: tuner_lib.Tuner, remat: bool) -> int:
  """Numbers per image that the gradient through the stream keeps."""
  c, editor = tuner.config, editors.EDITORS[tuner.editor]
  tokens = c.num_tokens
  if editor.has_prompts:
    tokens += tuner.options.num_prompts
  per_token = 16 * c.width + 5 * c.mlp_dim + 5 * c.num_heads * tokens
  if editor.scales_outputs:
    per_token += 7 * c.width + c.mlp_dim
  if not remat:
    return c.depth * tokens * per_token
  return c.depth * tokens * 2 * c.width + tokens * per_token


def weights_at_once(tuner: tuner_lib.Tuner) -> int:
  """Number of trials, at least one, whose weights fit on each device."""
  numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(tuner.shapes()))
  available = processes.all_reduce_min(MEMORY_SHARE * memory.device_memory())
  return max(1, int(available / (4 * numbers)))


def trials_at_once(
  tuner: tuner_lib.Tuner,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  remat: bool = False,
  device_memory: int | None = None,
) -> int:
  """Number of trials, at least one, that should train side by side.

  A step has `batch_size` images over all devices of the mesh.

  On a CPU trials of an editor train one by one: they share nothing but the
  images, so together they would need more memory, and miss its caches.
  """
  if tuner.editor and mesh.devices.flat[0].platform == "cpu":
    return 1
  size = device_memory or memory.device_memory()
  available = processes.all_reduce_min(MEMORY_SHARE * size)
  local = batch_size / mesh.shape["data"]
  return max(1, int(available / bytes_per_trial(tuner, local, remat)))
