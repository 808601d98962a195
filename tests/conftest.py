"""Four fake CPU devices and full float32 products for all tests."""

import fcntl
import gc
from importlib import metadata
import os
import resource
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the work of these tests, so it may be sloppy.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
if metadata.version("jaxlib").startswith("0.10."):
  # Four times as fast; later versions have no others, and die at the flag.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
  # Small programs are not worth cutting up for threads.
  os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"  # No test asks the true hub.
if "PYTEST_XDIST_WORKER" not in os.environ:  # Else it has these already.
  _compiled = tempfile.TemporaryDirectory(prefix="vqt_jax_compiled_")
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Else a tenth of the time goes into where operations come from.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
  }

import jax
import pytest

from tests import pictures as pictures_lib

jax.config.update("jax_default_matmul_precision", "highest")
gc.set_threshold(100_000, 50, 100)  # Tracing makes much, and little garbage.


def _spare(phase, info):
  """Spares the garbage collector, which every run calls, what it has seen."""
  if (phase, info["generation"]) == ("stop", 2):
    gc.freeze()


gc.callbacks.append(_spare)

# Files whose tests take long, or wait for processes. They come first, so that
# at the end there are short ones to be shared among the workers.
_LONG = (
  "test_processes.py",
  "test_survival.py",
  "test_buckets.py",
  "test_protocol.py",
  "test_store.py",
  "test_head2toe.py",
  "test_run.py",
  "test_editors.py",
  "test_steps.py",
  "test_export.py",
  "test_all_tasks.py",
  "test_compare.py",
)


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish(session):
  """Spares the garbage collector what was imported."""
  del session
  gc.freeze()


def _memory() -> int:
  """Bytes that this process holds; a maximum where nothing tells."""
  if not os.path.exists("/proc/self/statm"):
    return 2**63
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
  """Keeps them for other modules until they add up to gigabytes."""
  yield
  if _memory() > 2.5 * 2**30:
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="session")
def empty_pictures():
  with pytest.MonkeyPatch.context() as patch:
    pictures_lib.leave_empty(patch.setattr)
    yield


@pytest.fixture
def pictures():
  """Has pictures drawn, for tests that look at them."""
  with pytest.MonkeyPatch.context() as patch:
    pictures_lib.draw(patch.setattr)
    yield


def _once(tmp_path_factory, name, make):
  """A folder of that name, made by the first of all workers that needs it."""
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  folder, made = root / name, root / f"{name}_made"
  with open(root / f"{name}_lock", "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not made.exists():
      folder.mkdir()
      make(folder)
      made.touch()
  return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory):
  """A folder with what `tests.runs` trains on."""
  from tests import runs

  return _once(tmp_path_factory, "material", runs.make_material)


@pytest.fixture(scope="session")
def alone(material, tmp_path_factory):
  """Workdirs of runs that are left alone, with one process and device each.

  By where their examples are: features that are kept, or images on the device
  or read in every epoch.
  """
  from tests import runs

  names = ("kept", "device", "stream")

  def make(folder):
    started = []
    for name in names:
      changes = {} if name == "kept" else {"data": name}
      argv = runs.command(material, folder / name, **changes)
      started.append(runs.Process(argv))
    for process in started:
      assert process.wait() == 0, process.said()

  folder = _once(tmp_path_factory, "alone", make)
  return {name: folder / name for name in names}
