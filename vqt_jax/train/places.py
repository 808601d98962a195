"""Where examples live, chosen from their size."""

import shutil

import jax
import ml_collections

from vqt_jax import errors
from vqt_jax import memory
from vqt_jax import parallel
from vqt_jax import tuner as tuner_lib
from vqt_jax.train import disk

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
    place: int(parallel.smallest(size)) * parts.get(place, 1)
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
