"""Training: one step, one loop, one run. `vqt_jax.train(config, workdir)`."""

import sys
import types


class _Callable(types.ModuleType):
  """Lets the package be called as the function that its users want of it."""

  def __call__(self, *args, **kwargs):
    from vqt_jax.train import run  # Late: it needs all the rest.

    return run.train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
