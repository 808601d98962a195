"""The devices of this machine, and how XLA compiles for them."""

import importlib
import importlib.metadata
import os
import re

from etils import epy

from vqt_jax import errors

with epy.lazy_imports():  # Takes a second.
  import jax

# The same bits each time; and cuBLAS's products, since Triton's would have
# parameters that nobody tried.
GPU_FLAGS = (
  "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
)


def load_jax() -> None:
  """Import JAX, unless it is.

  Raises:
    UserError: it rejects a variable of the environment.
  """
  try:
    importlib.import_module("jax")
  except ValueError as e:
    raise errors.UserError(
      f"JAX rejects a variable of the environment: {e}."
      " Correct it, or unset it."
    ) from e


def set_gpu_flags() -> None:
  """Make XLA's programs for GPUs give the same bits each time.

  To be called before JAX finds its devices. XLA then does not try out which
  kernels are fastest, which otherwise is most of the time to compile. Flags in
  the environment's XLA_FLAGS win; a file of flags is left alone. Without JAX's
  plugin for GPUs nothing is set.
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
  """XLA_FLAGS of the environment, without those of `set_gpu_flags`."""
  return os.environ.get("XLA_FLAGS", "").replace(GPU_FLAGS, "").strip()


def find_devices() -> None:
  """Initialise JAX's devices of this machine, unless it has done so.

  Raises:
    UserError: the devices that the environment asks for do not exist.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:
    # Where JAX sees no GPU its error for a GPU platform has no text.
    why = str(e).partition(" (set JAX_PLATFORMS")[0] or "it sees no GPU"
    for name in ("JAX_PLATFORM_NAME", "JAX_PLATFORMS"):
      if asked := os.environ.get(name):
        raise errors.UserError(
          f"{name}={asked}: JAX finds no such device here"
          f" ({why.rstrip('.')}). Unset {name}, so that JAX takes the best"
          " device there is, or install what it lacks."
        ) from e
    raise errors.UserError(f"JAX finds no devices: {why}") from e
