"""Trains what a config asks for: a task, all tasks, or several methods."""

from typing import Any

import ml_collections

from vqt_jax.config import resolve
from vqt_jax.data import vtab
from vqt_jax.experiments import all_methods
from vqt_jax.experiments import all_tasks
from vqt_jax.experiments import single
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import numerics


@numerics.as_usual()
def train(
  config: ml_collections.ConfigDict,
  workdir: files.PathLike,
  console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Trains and tests as a config says; what `main.py` calls.

  Interrupted (SIGTERM, or killed outright), the same call goes on where the
  last checkpoint was and ends with the same bits. A finished run is not redone.

  Args:
    config: made from `config.default_config()`.
    workdir: a folder, or `gs://BUCKET/FOLDER`; gets `config.json`,
      `metrics.jsonl`, `results.json`, TensorBoard events, `checkpoints/`,
      `tuned/` and `report.png`. With `task="all"` or `methods` it gets a folder
      for each of these, `results.json`, a table and a picture.
    console: shows progress and results; None: stderr, of the first process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend.
    Stopped: asked to stop by a signal; everything is saved.
  """
  config = resolve.resolve(config)
  workdir = files.path(workdir)
  console = console or console_lib.of_process()
  if config.task == vtab.ALL:
    return all_tasks.train(config, workdir, console)
  if config.methods:
    return all_methods.train(config, workdir, console)
  return single.train(config, workdir, console)
