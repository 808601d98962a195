"""Several processes of one run: joining, agreeing, ending together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import faulthandler
import functools
import glob
import importlib.util
import os
import re
import sys
import time
from typing import Any, NoReturn, TypeVar

from etils import epy
import numpy as np

from vqt_jax import errors

with epy.lazy_imports():  # Slow to import.
  import jax
  import orbax.checkpoint as ocp

  from vqt_jax.runtime import mesh as mesh_lib

T = TypeVar("T")

# Seconds to wait for another process: until it joins, until it ends, and, while
# it gives signs of life, until it takes part (it may hang in a file system).
CONNECT_SECONDS = 300
LEAVE_SECONDS = 30
HUNG_SECONDS = 1800
FIRST_SECONDS = 1  # By which the first process outlives the others.


def detect_cluster() -> dict[str, str | None] | None:
  """Find out from the environment whether this process may have others.

  It may if it is a task of a Slurm step or of mpirun with several tasks, a Pod
  of an Indexed Job where `kubernetes` is installed, or on a machine that is set
  up for TPUs. (JAX's own detection would leave a Slurm step of one task a
  single GPU.)

  Returns:
    Arguments for `jax.distributed.initialize`; None: there are no others.
  """
  number = lambda name: os.environ.get(name, "")
  several = lambda name: number(name).isdecimal() and int(number(name)) > 1

  def installed(name):
    found = importlib.util.find_spec(name)
    return found and found.origin  # A mere folder of that name has none.

  if several("SLURM_STEP_NUM_TASKS"):
    return {"cluster_detection_method": "slurm"}
  if several("OMPI_COMM_WORLD_SIZE"):
    return {"cluster_detection_method": "ompi"}
  if "JOB_COMPLETION_INDEX" in os.environ and installed("kubernetes"):
    return {}  # JAX has no name for it.
  if installed("libtpu"):
    gke = "TPU_WORKER_HOSTNAMES" in os.environ
    return {"cluster_detection_method": "gketpu" if gke else "gcetpu"}
  return None


def is_alone(coordinator: str | None) -> bool:
  """Return whether there is nothing to join.

  Args:
    coordinator: as of `connect`; "none": this process is alone.
  """
  if coordinator is None:
    return detect_cluster() is None
  return coordinator == "none"


def connect(
  coordinator: str | None,
  num_processes: int | None = None,
  process_id: int | None = None,
  lost_after: int = 60,
) -> bool:
  """Join the other processes; to be called before JAX finds its devices.

  Args:
    coordinator: host:port of the first process, the same on all; "auto": the
      platform (Cloud TPU, Slurm, ...) must tell; None: it may tell.
    num_processes: number of processes.
    process_id: number of this one, from 0.
    lost_after: seconds without a sign of life from a process after which JAX
      ends all others, whatever they are doing.

  Returns:
    False if there is nothing to join.

  Raises:
    UserError: the arguments make no sense, or no platform tells the address.
      (If the others do not come, JAX aborts the process.)
  """
  if coordinator is None:
    given = detect_cluster() or {}
  elif coordinator == "auto":
    given = {}
  elif not re.search(r".:\d+$", coordinator):
    raise errors.UserError(
      f"coordinator {coordinator!r}: expected HOST:PORT of the first process,"
      " or auto."
    )
  elif process_id is None or not 0 <= process_id < (num_processes or 0):
    raise errors.UserError(
      f"num_processes={num_processes}, process_id={process_id}: expected"
      " both, and an id of 0 to num_processes - 1."
    )
  else:
    given = dict(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
    )
  # Its handler of SIGTERM would replace ours.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=CONNECT_SECONDS,
      heartbeat_timeout_seconds=lost_after,
      shutdown_timeout_seconds=LEAVE_SECONDS,
    )
  except (OSError, RuntimeError, ValueError) as e:
    # Only the texts tell a process without a cluster from one that must not
    # run on alone.
    no_cluster = "coordinator_address should be" in str(e)
    # libtpu is installed, but there is no TPU; or JAX is in use already.
    no_tpu = isinstance(e, OSError) and not _tpu_devices()
    alone = no_cluster or no_tpu or "before any JAX" in str(e)
    if alone and "tpu" in given.get("cluster_detection_method", ""):
      return False
    if no_cluster:
      raise errors.UserError(
        "No cluster tells the address of the first process."
        " Give --coordinator=HOST:PORT, --num_processes and --process_id, or"
        " --coordinator=none to run alone."
      ) from e
    raise errors.UserError(
      "Cannot join the other processes (coordinator"
      f" {coordinator or 'as the platform tells'}): {e}"
    ) from e
  return True


def _tpu_devices() -> list[str]:
  """Device files of TPUs, usable or not."""
  return [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]


def is_connected() -> bool:
  """Return whether there are other processes that this one may wait for."""
  if "jax" not in sys.modules:  # Which joins them.
    return False
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Return whether this process writes files and prints."""
  return jax.process_index() == 0


def exit_now(status: int) -> NoReturn:
  """End this process without waiting for others, which may be gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def exit_together(status: int) -> NoReturn:
  """End this process when all have come to their end, the first one last.

  The first process runs JAX's coordination service. If it ended while another
  one still listens, JAX would abort that one, whatever its status.
  """
  barrier = ocp.multihost.get_barrier_sync_fn()
  with contextlib.suppress(Exception):  # The others may be gone.
    barrier(key="vqt_jax_end", timeout_ms=1000 * LEAVE_SECONDS)
  if is_first():
    time.sleep(FIRST_SECONDS)
  exit_now(status)


@contextlib.contextmanager
def exit_if_hung() -> Iterator[None]:
  """End this process if the block waits too long for another one.

  By faulthandler, since its timer runs even while a library holds the GIL; it
  also writes to the log where this process waits.
  """
  if jax.process_count() == 1:
    yield
    return
  faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True, file=2)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
  """Raise on all processes if the block raises a `UserError` on one."""
  error = None
  try:
    yield
  except errors.UserError as e:
    error = e
  raise_if_any(error, any_process(error is not None))


def raise_if_any(error: errors.UserError | None, failed: bool) -> None:
  """Raise this process's error, or if `failed` that another one has one."""
  if failed:
    raise error or errors.UserError(
      "Another process of this run failed; see its message, on its screen or in"
      " log.txt or log_N.txt of the workdir."
    )


def iterate_together(items: Iterable[T]) -> Iterator[T]:
  """Iterate on all processes at once; if one fails to get an item, all fail.

  Otherwise the others would wait for it in the next computation. Items are
  fetched one ahead, so asking whether all have theirs does not wait for what
  the devices do with the one before.
  """
  if jax.process_count() == 1:
    yield from items
    return
  iterator, end = iter(items), object()

  def get():
    item, error = end, None
    try:
      item = next(iterator, end)
    except errors.UserError as e:
      error = e
    return item, error, all_reduce_max_async(lambda: [error is not None])

  following = get()
  while True:
    item, error, failed = following
    following = get()  # Also behind the last one: all ask equally often.
    raise_if_any(error, failed().any())
    if item is end:
      return
    yield item


def to_host(tree: Any) -> Any:
  """Copy replicated arrays to numpy; numpy arrays are left alone."""
  local = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
  with exit_if_hung():
    return jax.tree.map(lambda x: np.asarray(local(x)), tree)


def any_process(flag: bool) -> bool:
  """Return whether the flag is set on any process; all must call together."""
  return bool(all_reduce_max_async(lambda: [flag])().any())


def all_reduce_min(value: float) -> float:
  """Return the smallest value of all processes; all must call together."""
  return -float(all_reduce_max_async(lambda: [-value])()[0])


def all_reduce_max_async(
  values: Callable[[], Sequence[float]],
) -> Callable[[], np.ndarray]:
  """Start to find the largest of each value over all processes.

  All must call together. The devices answer after the work that they were given
  before, so an answer that is fetched late delays nobody.

  Args:
    values: returns this process's values, which become float32. Called at once
      if there are several processes, else when the answer is fetched.

  Returns:
    Function that waits for the answer, (number of values,).
  """
  if jax.process_count() == 1:
    return lambda: np.array(values())
  mesh, largest = _all_reduce_max()
  mine = np.array([values()], np.float32)
  with exit_if_hung():
    found = largest(mesh_lib.from_process_local({"x": mine}, mesh)["x"])

  def answer():
    # From all devices: libraries then have printed what they have to say about
    # the connection, in a thread for each, before the screen is given back.
    with exit_if_hung():
      return np.asarray(jax.block_until_ready(found).addressable_data(0))

  return answer


@functools.cache
def _all_reduce_max() -> tuple[jax.sharding.Mesh, Callable[..., jax.Array]]:
  """Return a mesh (process, local device), and the maximum over processes."""
  mesh = mesh_lib.make_mesh(model=jax.local_device_count())
  return mesh, jax.jit(
    lambda x: x.max(0), out_shardings=mesh_lib.replicated_sharding(mesh)
  )
