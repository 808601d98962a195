"""Choice of the memory that holds the examples of a split."""

from collections.abc import Mapping
import shutil

import jax
import ml_collections

from vqt_jax import errors
from vqt_jax.features import disk
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import memory
from vqt_jax.runtime import processes
from vqt_jax.runtime import units

# Shares for data: of the devices' memory (the rest is for the step), of the
# host's memory, and of the free space on the disk.
DEVICE_SHARE = 0.4
HOST_SHARE = 0.5
DISK_SHARE = 0.8

# Storage of features -> its name in sentences.
FEATURE_STORAGE = {
  "device": "in device memory",
  "host": "in host memory",
  "disk": "in a file",
}


def available_bytes(store_dir: str, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Bytes available for data in each storage, over all processes."""
  own = {
    "device": DEVICE_SHARE * memory.device_memory(),
    "host": HOST_SHARE * memory.host_memory(),
    "disk": DISK_SHARE * _free_disk_bytes(store_dir),
  }
  shards = {"device": mesh.shape["data"], "host": jax.process_count()}
  return {
    name: int(processes.all_reduce_min(size)) * shards.get(name, 1)
    for name, size in own.items()
  }


def _free_disk_bytes(store_dir: str) -> int:
  """Free bytes on the disk of a folder, which need not exist yet."""
  try:
    folder = disk.folder(store_dir)
    while not folder.exists():
      folder = folder.parent
    return shutil.disk_usage(folder).free
  except (OSError, errors.UserError):
    return 0  # There is no such place, or it is not readable.


def choose(
  config: ml_collections.ConfigDict,
  tuner: tuner_lib.Tuner,
  feature_bytes: Mapping[str, int],
  image_bytes: int,
  available: dict[str, int],
  backend: str,
) -> tuple[str, str]:
  """Choose the storage of a split's examples.

  The first one that is large enough is taken. A CPU's memory is the host's, and
  any disk is faster than running the backbone on it; an accelerator computes
  the stream again faster than a disk delivers it.

  Args:
    config: of the run.
    tuner: of the run.
    feature_bytes: size of the split's features, by storage.
    image_bytes: size of its images.
    available: result of `available_bytes`.
    backend: "cpu", "gpu" or "tpu".

  Returns:
    The storage, and the reason in words. "device", "host" and "disk" hold
    features. With "images" and "stream" the backbone runs in every step, on
    images that stay in device memory, or are read in every epoch.
  """
  reason = f"as features={config.features} says"
  if config.features in FEATURE_STORAGE:
    return config.features, reason
  if not config.features:
    reason = f"as data={config.data} says"
    if tuner.editor:
      reason = f"since {config.method} changes features in every step"
    elif config.embedding_dropout:
      reason = "since embedding_dropout changes features in every step"
    elif not config.data:
      for name in ("device", "disk" if backend == "cpu" else "host"):
        if feature_bytes[name] <= available[name]:
          size = units.format_bytes(available[name])
          return name, f"which has room for {size}"
      size = units.format_bytes(feature_bytes["host"])
      reason = f"since features would take {size}"
  fits = not config.data and image_bytes <= available["device"]
  if config.data == "device" or fits:
    return "images", reason
  return "stream", reason
