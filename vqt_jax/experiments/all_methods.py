"""Several methods on one task, one after another, and one outcome of them."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from vqt_jax import results
from vqt_jax.config import resolve
from vqt_jax.experiments import run_many
from vqt_jax.models import methods as methods_lib
from vqt_jax.reports import compare
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes


def train(
  config: ml_collections.ConfigDict,
  workdir: files.Path,
  console: console_lib.Console,
) -> dict[str, Any]:
  """Does what `run.train` does for every method, see `several.train`.

  Args:
    config: with `methods`.
    workdir: gets a folder per method, `results.json`, `compare.csv`,
      `compare.png`, and what queries attend to.
    console: shows progress.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend.
    Stopped: asked to stop by a signal; everything is saved.
  """
  return run_many.train(config, workdir, console, "method", _look, _sum_up)


def _look(
  config: ml_collections.ConfigDict, workdir: files.Path
) -> tuple[run_many.Configs, str]:
  """The config of each method."""
  del workdir
  methods = methods_lib.split_list(config.methods)
  return {name: resolve.config_for(config, method=name) for name in methods}, ""


def _sum_up(
  console: console_lib.Console, workdir: files.Path, names: Sequence[str]
) -> dict[str, Any]:
  """Writes and prints what came out; `results.json` comes last."""
  summary = compare.summarize(run_many.outcomes(workdir, names))
  if processes.is_first():
    workdirs = {name: workdir / name for name in names}
    compare.write(console, summary, workdirs, workdir)
    files.write_json(workdir / results.RESULTS, summary)
  return summary
