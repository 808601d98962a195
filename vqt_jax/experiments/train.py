"""Trains what a config names: one task, all tasks, or several methods."""

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


@numerics.jax_defaults()
def train(
  config: ml_collections.ConfigDict,
  workdir: files.PathLike,
  console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Train and test as a config says, like `main.py`.

  Interrupted by SIGTERM, Ctrl-C or a crash, the same call resumes from the last
  checkpoint and ends with the same bits. A finished run is not redone.

  Args:
    config: made from `config.default_config()`.
    workdir: a folder, or `gs://BUCKET/FOLDER`; gets `config.json`,
      `metrics.jsonl`, `results.json`, `test_predictions.safetensors`,
      TensorBoard events, `checkpoints/`, `tuned/`, `report.html` and
      `report.png`. With `task="all"` or `methods` it gets a folder for each of
      these, `results.json`, `report.html`, a table and a picture.
    console: shows progress and results; None: on stderr, from the first
      process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something that the user can correct.
    Stopped: asked to stop by a signal; everything is saved.
  """
  config = resolve.resolve(config)
  workdir = files.path(workdir)
  console = console or console_lib.for_process()
  if config.task == vtab.ALL:
    return all_tasks.train(config, workdir, console)
  if config.methods:
    return all_methods.train(config, workdir, console)
  return single.train(config, workdir, console)
