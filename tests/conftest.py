"""Eight fake CPU devices and full float32 products for all tests."""

import gc
from importlib import metadata
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the work of these tests, so it may be sloppy.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if metadata.version("jaxlib").startswith("0.10."):
  # Four times as fast; later versions have no others, and die at the flag.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
  # Small programs are not worth cutting up for threads.
  os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" not in os.environ:  # Else it has these already.
  _compiled = tempfile.TemporaryDirectory(prefix="vqt_jax_compiled_")
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
gc.set_threshold(100_000, 50, 100)  # Tracing makes much, and little garbage.


def pytest_collection_finish(session):
  """Spares the garbage collector what was imported."""
  del session
  gc.freeze()


@pytest.fixture(scope="session")
def material(tmp_path_factory):
  """A folder with what `tests.runs` trains on."""
  from tests import runs

  folder = tmp_path_factory.mktemp("material")
  runs.make_material(folder)
  return folder


@pytest.fixture(scope="session")
def alone(material, tmp_path_factory):
  """Workdirs of runs that are left alone, with one process and device each.

  By where their examples are: features that are kept, or images on the device
  or read in every epoch.
  """
  from tests import runs

  started = {}
  for name in ("kept", "device", "stream"):
    workdir = tmp_path_factory.mktemp(name)
    changes = {} if name == "kept" else {"data": name}
    argv = runs.command(material, workdir, **changes)
    started[name] = workdir, runs.Process(argv)
  for _, process in started.values():
    assert process.wait() == 0, process.said()
  return {name: workdir for name, (workdir, _) in started.items()}
