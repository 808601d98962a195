"""Mesh, shardings, and what several processes must agree on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import faulthandler
import functools
import glob
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from typing import Any, NoReturn, TypeVar

from etils import epy
import jax
import numpy as np

from vqt_jax import errors
from vqt_jax.runtime import mesh as mesh_lib

with epy.lazy_imports():  # Slow to import.
  import orbax.checkpoint as ocp

T = TypeVar("T")

# For the same bits each time; and cuBLAS's products, as Triton's would have
# parameters that nobody tried.
GPU_FLAGS = (
  "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
)

# Seconds to wait for a process: until it comes, until it ends, and, while it
# gives signs of life, until it does its part (it may hang in a file system).
CONNECT_SECONDS = 300
LEAVE_SECONDS = 30
HUNG_SECONDS = 1800
FIRST_SECONDS = 1  # That the first process stays longer than the others.


def set_gpu_flags() -> None:
  """Has XLA make GPU programs that give the same bits each time.

  To be called before JAX finds its devices. What is fastest is then not found
  by trying, which is most of what compiling for a GPU takes otherwise. What the
  environment's XLA_FLAGS say wins; a file of flags is left alone. Without JAX's
  support of GPUs nothing is done.
  """
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  given = os.environ.get("XLA_FLAGS", "").strip()
  if (
    any(re.match("xla_(cuda|rocm)", plugin.name) for plugin in plugins)
    and re.match("-|$", given)
    and GPU_FLAGS not in given
  ):
    os.environ["XLA_FLAGS"] = f"{GPU_FLAGS} {given}".strip()


def given_xla_flags() -> str:
  """Flags of XLA that the environment had, without our own."""
  return os.environ.get("XLA_FLAGS", "").replace(GPU_FLAGS, "").strip()


def find_devices() -> None:
  """Has JAX find the devices of this machine, if it has not done so yet.

  Raises:
    UserError: those that the environment asks for are not there.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:
    # JAX has no words for a platform of GPUs where it sees none.
    why = str(e).partition(" (set JAX_PLATFORMS")[0] or "it sees no GPU"
    for name in ("JAX_PLATFORM_NAME", "JAX_PLATFORMS"):
      if asked := os.environ.get(name):
        raise errors.UserError(
          f"{name}={asked}: JAX finds no such device here"
          f" ({why.rstrip('.')}). Unset {name}, so that it takes the best"
          " that there is, or install what it lacks."
        ) from e
    raise errors.UserError(f"JAX finds no devices: {why}") from e


def detect_cluster() -> dict[str, str | None] | None:
  """How JAX finds the other processes, if this one may have some.

  Decided from the environment: a task of a Slurm step or of mpirun that has
  several, a Pod of an Indexed Job where `kubernetes` is installed, or a machine
  that is set up for TPUs. (Always to ask JAX would not do: to a Slurm step of
  one task it leaves one GPU.)

  Returns:
    Arguments for `jax.distributed.initialize`; None: it is alone.
  """
  count = lambda name: os.environ.get(name, "")
  several = lambda name: count(name).isdecimal() and int(count(name)) > 1

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


def connect(
  coordinator: str | None,
  num_processes: int | None = None,
  process_id: int | None = None,
  lost_after: int = 60,
) -> bool:
  """Joins the other processes; comes before anything else asks for devices.

  Args:
    coordinator: host:port of the first process, the same on all; "auto" where
      the cluster tells (Cloud TPU, Slurm, ...), which must be there; None: if
      it is there.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    lost_after: seconds without a sign of life from a process after which JAX
      ends all others, wherever they wait for it.

  Returns:
    Whether there was anything to join.

  Raises:
    UserError: these make no sense, or there is no cluster that tells. (Where
      the others do not come, JAX ends the process.)
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
  # Its handler would take SIGTERM away from ours.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=CONNECT_SECONDS,
      heartbeat_timeout_seconds=lost_after,
      shutdown_timeout_seconds=LEAVE_SECONDS,
    )
  except (OSError, RuntimeError, ValueError) as e:
    nobody = "coordinator_address should be" in str(e)
    # There is libtpu, but no TPU and nobody to ask for one; or JAX is in use.
    unasked = isinstance(e, OSError) and not _tpu_devices()
    alone = nobody or unasked or "before any JAX" in str(e)
    if alone and "tpu" in given.get("cluster_detection_method", ""):
      return False
    if nobody:
      raise errors.UserError(
        "There is no cluster that tells the address of the first process."
        " Give --coordinator=HOST:PORT, --num_processes and --process_id, or"
        " --coordinator=none to run alone."
      ) from e
    raise errors.UserError(
      "Cannot join the other processes (coordinator"
      f" {coordinator or 'as the platform tells'}): {e}"
    ) from e
  return True


def _tpu_devices() -> list[str]:
  """Device files of TPUs, whether or not anybody can use them."""
  return [*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")]


def is_connected() -> bool:
  """Whether this process has others to wait for."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def exit_now(status: int) -> NoReturn:
  """Ends this process at once, without waiting for others that may be gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def exit_together(status: int) -> NoReturn:
  """End this process when all have come to their end, the first one last.

  The first process serves what JAX's processes know of each other. Were it gone
  while another still listens, JAX would abort that one, whatever its status.
  """
  barrier = ocp.multihost.get_barrier_sync_fn()
  with contextlib.suppress(Exception):  # The others may be gone.
    barrier(key="vqt_jax_end", timeout_ms=1000 * LEAVE_SECONDS)
  if is_first():
    time.sleep(FIRST_SECONDS)
  exit_now(status)


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
  """What fails with a `UserError` on one process fails on all of them."""
  error = None
  try:
    yield
  except errors.UserError as e:
    error = e
  _raise_on_all(error, all_reduce_max_async(lambda: [error is not None]))


def _raise_on_all(
  error: errors.UserError | None, failed: Callable[[], np.ndarray]
) -> None:
  """Raises if any process has failed, as `all_reduce_max_async` tells."""
  if failed().any():
    raise error or errors.UserError(
      "Another process of this run failed; see what it says."
    )


def iterate_together(items: Iterable[T]) -> Iterator[T]:
  """The items of an iterable; if one process fails to get its, all fail.

  Else the others would wait for that process in the next computation. All must
  iterate together. Each gets its items one ahead, so that whether all have
  theirs is known without waiting for what the devices do with the one before.
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
    _raise_on_all(error, failed)
    if item is end:
      return
    yield item


def to_host(tree: Any) -> Any:
  """Whole numpy copies of replicated arrays; numpy stays as it is."""
  local = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
  with exit_if_hung():
    return jax.tree.map(lambda x: np.asarray(local(x)), tree)


@contextlib.contextmanager
def exit_if_hung() -> Iterator[None]:
  """Waits for other processes; ends this one if they take too long."""
  if jax.process_count() == 1:
    yield
    return
  faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True, file=2)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


def any_process(flag: bool) -> bool:
  """Whether the flag is up on any process; all must call it together."""
  return bool(all_reduce_max_async(lambda: [flag])().any())


def all_reduce_min(value: float) -> float:
  """The smallest value of all processes; all must call it together."""
  return -float(all_reduce_max_async(lambda: [-value])()[0])


def all_reduce_max_async(
  values: Callable[[], Sequence[float]],
) -> Callable[[], np.ndarray]:
  """Starts to find the largest of each value over all processes.

  All must ask together. The devices answer when they have done what they were
  given before, so an answer that is fetched late holds nobody up.

  Args:
    values: gives those of this process, which become float32. Called at once;
      by a process that is alone, when the answer is fetched.

  Returns:
    Waits for the answer, (number of values,).
  """
  if jax.process_count() == 1:
    return lambda: np.array(values())
  mesh, largest = _exchange()
  mine = mesh_lib.from_process_local(
    {"values": np.array([values()], np.float32)}, mesh
  )
  with exit_if_hung():
    found = largest(mine["values"])

  def answer():
    # From all devices, not from one: what libraries say of the exchange, in a
    # thread for each, is then said, before a screen is given back.
    with exit_if_hung():
      return np.asarray(jax.block_until_ready(found).addressable_data(0))

  return answer


@functools.cache
def _exchange() -> tuple[jax.sharding.Mesh, Callable[..., jax.Array]]:
  """A row of devices for each process, and the largest of what these have."""
  mesh = mesh_lib.make_mesh(model=jax.local_device_count())
  return mesh, jax.jit(
    lambda x: x.max(0), out_shardings=mesh_lib.replicated_sharding(mesh)
  )


def is_first() -> bool:
  """Whether this process writes files and talks."""
  return jax.process_index() == 0
