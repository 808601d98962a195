"""Decides what fits into memory: examples, and trials side by side."""

import math
import shutil

import jax
import ml_collections

from vqt_jax import errors
from vqt_jax.features import disk
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import memory
from vqt_jax.runtime import processes

# What data may take of the devices' memory (the rest is for the step), of the
# host's, and of the free space on the disk.
DEVICE_SHARE = 0.4
HOST_SHARE = 0.5
DISK_SHARE = 0.8
FEATURES = {
  "device": "in device memory",
  "host": "in host memory",
  "disk": "in a file",
}


def room(store_dir: str, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Bytes that data may take in each place, over all processes.

  Args:
    store_dir: where files of features go, as `disk.folder` takes it.
    mesh: devices that share the data.
  """
  mine = {
    "device": DEVICE_SHARE * memory.device_memory(),
    "host": HOST_SHARE * memory.host_memory(),
    "disk": DISK_SHARE * _free(store_dir),
  }
  parts = {"device": mesh.shape["data"], "host": jax.process_count()}
  return {
    place: int(processes.all_reduce_min(size)) * parts.get(place, 1)
    for place, size in mine.items()
  }


def _free(store_dir: str) -> int:
  """Bytes on the disk of a folder, or of the first one above that is there."""
  try:
    folder = disk.folder(store_dir)
    while not folder.exists():
      folder = folder.parent
    return shutil.disk_usage(folder).free
  except (OSError, errors.UserError):
    return 0  # None, or one that we may not look into: nobody has asked for it.


def choose(
  config: ml_collections.ConfigDict,
  stored: int,
  images: int,
  room: dict[str, int],
  backend: str,
) -> tuple[str, str]:
  """Where the examples of a split live, and why, for people.

  The first place that has room is taken. A CPU's memory is the host's, and any
  disk is faster than its backbone; an accelerator computes the stream again
  faster than a disk delivers it.

  Args:
    config: of the run.
    stored: bytes of their features.
    images: bytes of their images.
    room: of `room`.
    backend: "cpu", "gpu", "tpu".

  Returns:
    "device", "host" or "disk": features are kept there. "images" or "stream":
    the backbone runs in every step, on images that are kept on the devices, or
    read again in every epoch.
  """
  if config.features in FEATURES:
    return config.features, f"as features={config.features} says"
  why = f"as features={config.features} says"
  if not config.features:
    why = f"as data={config.data} says"
    if tuner_lib.parse(config.method)[1]:
      why = f"since {config.method} changes features in every step"
    elif config.embedding_dropout:
      why = "since embedding_dropout changes features in every step"
    elif not config.data:
      places = ("device", "disk" if backend == "cpu" else "host")
      for place in places:
        if stored <= room[place]:
          return place, f"which has room for {size(room[place])}"
      why = f"since features would take {size(stored)}"
  if config.data == "device" or (not config.data and images <= room["device"]):
    return "images", why
  return "stream", why


def size(count: int) -> str:
  """Bytes for people."""
  for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
    if count >= bytes_:
      return f"{count / bytes_:,.1f} {unit}"
  return f"{count / 2**10:,.1f} KiB"


# What runs may take of the devices' memory; the rest is for data and backbone.
MEMORY_SHARE = 0.4


def bytes_per_trial(
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


def weights_at_once(tuner: tuner_lib.Tuner) -> int:
  """The number of runs, at least one, whose weights fit on each device."""
  numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(tuner.shapes()))
  room = processes.all_reduce_min(MEMORY_SHARE * memory.device_memory())
  return max(1, int(room / (4 * numbers)))


def trials_at_once(
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
    remat: as in `bytes_per_trial`.
    device_memory: bytes; None: of the devices that are here.
  """
  if tuner.editor and mesh.devices.flat[0].platform == "cpu":
    return 1
  size = device_memory or memory.device_memory()
  room = processes.all_reduce_min(MEMORY_SHARE * size)
  local = batch_size / mesh.shape["data"]
  return max(1, int(room / bytes_per_trial(tuner, local, remat)))
