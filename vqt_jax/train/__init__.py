"""Training: one step, one loop, one run. `vqt_jax.train(config, workdir)`."""

import sys
import types

from vqt_jax import config as config_lib
from vqt_jax import numerics
from vqt_jax.data import vtab


class _Callable(types.ModuleType):
  """Lets the package be called as the function that its users want of it."""

  @numerics.as_usual()
  def __call__(self, config, *args, **kwargs):
    config = config_lib.resolve(config)
    # Late: they need all the rest.
    if config.task == vtab.ALL:
      from vqt_jax.train import all_tasks

      return all_tasks.train(config, *args, **kwargs)
    if config.methods:
      from vqt_jax.train import all_methods

      return all_methods.train(config, *args, **kwargs)
    from vqt_jax.train import run

    return run.train(config, *args, **kwargs)


sys.modules[__name__].__class__ = _Callable
