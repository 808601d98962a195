"""JAX's options that decide numbers, whatever the environment sets."""

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
  """Set JAX's options that decide numbers to their defaults, in this thread.

  Variables such as `JAX_ENABLE_X64` would silently change the random draws and
  dtypes of a run; others would end it, e.g. `JAX_DEBUG_NANS` where a learning
  rate is too large, which a run can handle.
  """
  with (
    jax.enable_x64(False),
    jax.default_prng_impl("threefry2x32"),
    jax.threefry_partitionable(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
  ):
    yield
