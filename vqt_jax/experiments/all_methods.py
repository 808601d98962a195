"""Several methods on one task, one after another, and their comparison."""

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
  """Run every method of `config.methods`, then compare them.

  See `run_many.train`; `workdir` gets `report.html`, `compare.csv`,
  `compare.png` and pictures of attention, too.
  """
  return run_many.train(config, workdir, console, "method", _look, _sum_up)


def _look(
  config: ml_collections.ConfigDict, workdir: files.Path
) -> tuple[run_many.Configs, str]:
  """Return the config of each method."""
  del workdir
  methods = methods_lib.split_list(config.methods)
  return {name: resolve.config_for(config, method=name) for name in methods}, ""


def _sum_up(
  console: console_lib.Console, workdir: files.Path, names: Sequence[str]
) -> dict[str, Any]:
  """Write and print the comparison; `results.json` comes last."""
  found = run_many.load_results(workdir, names)
  workdirs = {name: workdir / name for name in names}
  predictions = results.read_all_predictions(workdirs, found)
  summary = compare.summarize(found, predictions)
  if processes.is_first():
    compare.write(console, summary, workdirs, workdir)
    files.write_json(workdir / results.RESULTS, summary)
  return summary
