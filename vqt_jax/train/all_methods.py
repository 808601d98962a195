"""Several methods on one task, one after another, and one outcome of them."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from vqt_jax import compare
from vqt_jax import config as config_lib
from vqt_jax import console as console_lib
from vqt_jax import files
from vqt_jax import parallel
from vqt_jax import results as results_lib
from vqt_jax import tuner
from vqt_jax.train import outcome
from vqt_jax.train import several


def train(
  config: ml_collections.ConfigDict,
  workdir: files.PathLike,
  console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Does what `run.train` does for every method, see `several.train`.

  Args:
    config: with `methods`.
    workdir: gets a folder per method, `results.json`, `compare.csv`,
      `compare.png`, and what queries attend to.
    console: what a person sees; None: stderr, of the first process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend.
    Stopped: asked to stop by a signal; everything is saved.
  """
  return several.train(config, workdir, console, "method", _look, _sum_up)


def _look(
  config: ml_collections.ConfigDict, workdir: files.Path
) -> tuple[several.Configs, str]:
  """The config of each method."""
  del workdir
  methods = tuner.parse_list(config.methods)
  return {name: config_lib.one(config, method=name) for name in methods}, ""


def _sum_up(
  console: console_lib.Console, workdir: files.Path, names: Sequence[str]
) -> dict[str, Any]:
  """Writes and prints what came out; `results.json` comes last."""
  summary = compare.summarize(several.outcomes(workdir, names))
  if parallel.is_first():
    workdirs = {name: workdir / name for name in names}
    compare.write(console, summary, workdirs, workdir)
    results_lib.write_json(workdir / outcome.RESULTS, summary)
  return summary
