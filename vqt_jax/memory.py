"""How much memory there is to plan with."""

import pathlib

import jax
import psutil

_LIMITS = ("/sys/fs/cgroup/memory.max",
           "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # fmt: skip


def host_memory() -> int:
  """Bytes of the machine, or of the container if that has less."""
  sizes = [psutil.virtual_memory().total]
  for path in map(pathlib.Path, _LIMITS):
    try:
      sizes.append(int(path.read_text()))
    except (OSError, ValueError):  # No such limit, or "max".
      continue
  return min(sizes)


def device_memory() -> int:
  """Bytes of one device; on CPUs its share of the host's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  return limit or host_memory() // jax.local_device_count()
