"""How much memory there is to plan with, and how much a run has taken."""

import contextlib
import ctypes
import gc
import pathlib
import re

import jax
import psutil

_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


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


class PeakMemory:
  """The most memory held from its making on: by a device, or by this process.

  Of an accelerator, what its allocator gave out; on CPUs the resident memory of
  the process, interpreter and libraries included.
  """

  def __init__(self):
    """Forgets the high-water mark so far, if the system lets it."""
    gc.collect()
    # What an earlier run freed goes back to the system first (glibc).
    with contextlib.suppress(AttributeError, OSError, TypeError):
      ctypes.CDLL(None).malloc_trim(0)
    self.start = _bytes_held("VmRSS", "bytes_in_use")
    self._forgotten = _reset_peak()
    self._mark = _bytes_held("VmHWM", "peak_bytes_in_use")
    self._found = 0

  def include(self, found: int | None) -> None:
    """Counts in what another process found for its part of the run, bytes."""
    self._found = max(self._found, found or 0)

  def bytes(self) -> int | None:
    """The peak; None if an earlier run's mark stands higher, so it is unknown.

    An accelerator's mark cannot be reset: only a run that raises it knows it.
    """
    mark = _bytes_held("VmHWM", "peak_bytes_in_use")
    if mark and (self._forgotten or mark > self._mark):
      self.include(mark)
    return self._found or None


def _bytes_held(of_process: str, of_device: str) -> int | None:
  """Bytes by the name of a mark; of several devices the most."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  if any(of_device in each for each in stats):
    return max(each.get(of_device, 0) for each in stats)
  with contextlib.suppress(OSError):
    status = pathlib.Path("/proc/self/status").read_text()
    if match := re.search(rf"{of_process}:\s+(\d+) kB", status):
      return int(match[1]) * 1024
  return None


def _reset_peak() -> bool:
  """Resets the process's high-water mark to what it holds now (Linux)."""
  if jax.default_backend() != "cpu":
    return False
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return True
  return False
