"""Memory of the host and of the devices: how much there is, and its peak."""

import contextlib
import ctypes
import gc
import pathlib
import re

import jax
import psutil

_CONTAINER_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def host_memory() -> int:
  """Bytes of memory of this machine, or of its container if that is less."""
  sizes = [psutil.virtual_memory().total]
  for path in map(pathlib.Path, _CONTAINER_LIMITS):
    with contextlib.suppress(OSError, ValueError):  # No such limit, or "max".
      sizes.append(int(path.read_text()))
  return min(sizes)


def device_memory() -> int:
  """Bytes of memory of one device; of a CPU device its share of the host's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  return limit or host_memory() // jax.local_device_count()


class PeakMemory:
  """Peak of the memory in use since this object was made.

  On an accelerator, what its allocator has given out; on CPUs the resident
  memory of the process, interpreter and libraries included.

  Attributes:
    start: bytes in use at first, None if unknown.
  """

  def __init__(self):
    """Reset the high-water mark so far, if the system allows it."""
    gc.collect()
    # What an earlier run freed goes back to the system first (glibc).
    with contextlib.suppress(AttributeError, OSError, TypeError):
      ctypes.CDLL(None).malloc_trim(0)
    self.start = _bytes_of("VmRSS", "bytes_in_use")
    self._was_reset = _reset_peak()
    self._mark = _bytes_of("VmHWM", "peak_bytes_in_use")
    self._largest = 0

  def include(self, found: int | None) -> None:
    """Count in the peak of another process that ran a part of this run."""
    self._largest = max(self._largest, found or 0)

  def bytes(self) -> int | None:
    """The peak so far; None if an earlier run's mark hides it.

    An accelerator's mark cannot be reset: only a run that raises it knows it.
    """
    mark = _bytes_of("VmHWM", "peak_bytes_in_use")
    if mark and (self._was_reset or mark > self._mark):
      self.include(mark)
    return self._largest or None


def _bytes_of(process_field: str, device_field: str) -> int | None:
  """Largest value of a field over the devices, or that of this process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  if any(device_field in each for each in stats):
    return max(each.get(device_field, 0) for each in stats)
  with contextlib.suppress(OSError):
    status = pathlib.Path("/proc/self/status").read_text()
    if match := re.search(rf"{process_field}:\s+(\d+) kB", status):
      return int(match[1]) * 1024
  return None


def _reset_peak() -> bool:
  """Set the process's high-water mark to what it uses now (Linux, CPUs)."""
  if jax.default_backend() != "cpu":
    return False
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return True
  return False
