"""The tasks of VTAB-1k one after another, and one outcome of all of them."""

from collections.abc import Iterable
from typing import Any

import ml_collections

from vqt_jax import config as config_lib
from vqt_jax import console as console_lib
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import files
from vqt_jax import parallel
from vqt_jax import plots
from vqt_jax import results as results_lib
from vqt_jax import vtab_summary
from vqt_jax.data import vtab
from vqt_jax.train import outcome
from vqt_jax.train import several


def train(
  config: ml_collections.ConfigDict,
  workdir: files.PathLike,
  console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Does what `run.train` does for every task, see `several.train`.

  Tasks whose dataset is not prepared are left out.

  Args:
    config: with `task="all"`.
    workdir: gets a folder per task, `results.json`, `vtab.csv` and `vtab.png`.
    console: what a person sees; None: stderr, of the first process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend; also if no task is prepared.
    Stopped: asked to stop by a signal; everything is saved.
  """
  return several.train(config, workdir, console, "task", _look, _sum_up)


def _look(
  config: ml_collections.ConfigDict, workdir: files.Path
) -> tuple[several.Configs, str]:
  """Configs of the tasks to be done, and which ones are left out.

  Raises:
    UserError: there is nothing to do, or a dataset is not as it should be.
  """
  finished, missing = several.finished(workdir, vtab.VTAB), set()
  with parallel.together():
    for name in vtab.VTAB:
      if name in finished:
        continue
      task = data.make_task(name, data_dir=config.data_dir)
      if data.is_prepared(task):
        data.check_prepared(task)
      else:
        missing.add(name)
  # Of several processes each may have data of its own.
  missing = {n for n in vtab.VTAB if parallel.any_process(n in missing)}
  told = _not_prepared(config, missing) if missing else ""
  if missing == set(vtab.VTAB):
    raise errors.UserError(told)
  there = [name for name in vtab.VTAB if name not in missing]
  return {name: config_lib.one(config, task=name) for name in there}, told


def _not_prepared(
  config: ml_collections.ConfigDict, missing: Iterable[str]
) -> str:
  """Says which tasks are left out, and what to do about it."""
  names = [name for name in vtab.VTAB if name in missing]
  tasks = [data.make_task(name, data_dir=config.data_dir) for name in names]
  folder = config.data_dir or "TFDS's own folder"
  return (
    f"{len(names)} of {len(vtab.VTAB)} tasks are not prepared in {folder}:"
    f" {', '.join(names)}."
    f" To add them: {data.prepare_command(*tasks)}, then the same command"
    " again."
  )


def _sum_up(
  console: console_lib.Console, workdir: files.Path, names: Iterable[str]
) -> dict[str, Any]:
  """Writes and prints what came out; `results.json` comes last."""
  summary = vtab_summary.summarize(several.outcomes(workdir, names))
  if parallel.is_first():
    files.write(workdir / "vtab.csv", vtab_summary.to_csv(summary).encode())
    plots.vtab(summary, workdir / "vtab.png")
    results_lib.write_json(workdir / outcome.RESULTS, summary)
  vtab_summary.show(console, workdir, summary)
  return summary
