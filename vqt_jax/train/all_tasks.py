"""The tasks of VTAB-1k one after another, and one outcome of all of them."""

from collections.abc import Iterable, Mapping
import io
import pathlib
from typing import Any

import ml_collections

from vqt_jax import config as config_lib
from vqt_jax import console as console_lib
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import parallel
from vqt_jax import plots
from vqt_jax import results as results_lib
from vqt_jax import vtab_summary
from vqt_jax.data import vtab
from vqt_jax.train import checkpoint
from vqt_jax.train import outcome
from vqt_jax.train import run as run_lib


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Does what `run.train` does for every task, then sums up.

  Each task is a run of its own in `workdir/<task>`, just as if it had been
  started alone: finished ones are not redone, a stopped one is resumed. Tasks
  whose dataset is not prepared are left out.

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
  config = config_lib.resolve(config)
  if not console:
    screen = None if parallel.is_first() else io.StringIO()
    console = console_lib.Console(screen)
  workdir = pathlib.Path(workdir)
  with checkpoint.StopSignal() as stop:
    with stop.at_once():
      finished, missing = _look(config, workdir)
      configs = {
          name: config_lib.of_task(config, name)
          for name in vtab.VTAB
          if name not in missing
      }
      with parallel.together():
        if parallel.is_first():
          _open(config, configs, workdir)
    if missing:
      console.note(_not_prepared(config, missing), "missing")
    for number, (name, its_config) in enumerate(configs.items(), start=1):
      place = f"{number} of {len(configs)}: {name}"
      if name in finished:
        console.note(f"{place} is finished already", "task")
        continue
      if stop:
        raise checkpoint.Stopped
      console.note(place, "task")
      run_lib.train(its_config, workdir / name, console)
  with parallel.together():
    return _sum_up(console, workdir, configs)


def _open(
    config: ml_collections.ConfigDict,
    configs: Mapping[str, ml_collections.ConfigDict],
    workdir: pathlib.Path,
) -> None:
  """Opens all workdirs, so that one of another config is found at once."""
  results_lib.open_workdir(config, workdir)
  for name, its_config in configs.items():
    results_lib.open_workdir(its_config, workdir / name)


def _look(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[set[str], set[str]]:
  """Tasks that are finished, and those whose dataset is not prepared.

  Raises:
    UserError: there is nothing to do, or a dataset is not as it should be.
  """
  finished, missing = set(), set()
  with parallel.together():
    for name in vtab.VTAB:
      if (workdir / name / outcome.RESULTS).exists():
        finished.add(name)
        continue
      task = data.make_task(name, data_dir=config.data_dir)
      if data.is_prepared(task):
        data.check_prepared(task)
      else:
        missing.add(name)
  # Of several processes each may have data of its own.
  finished, missing = _on_any(finished), _on_any(missing)
  if missing == set(vtab.VTAB):
    raise errors.UserError(_not_prepared(config, missing))
  return finished, missing


def _on_any(names: set[str]) -> set[str]:
  return {name for name in vtab.VTAB if parallel.any_process(name in names)}


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
    console: console_lib.Console, workdir: pathlib.Path, names: Iterable[str]
) -> dict[str, Any]:
  """Writes and prints what came out; `results.json` comes last."""
  summary = vtab_summary.summarize({
      name: outcome.read(workdir / name)
      for name in names
  })
  if parallel.is_first():
    results_lib.write_bytes(
        workdir / "vtab.csv", vtab_summary.to_csv(summary).encode()
    )
    plots.vtab(summary, workdir / "vtab.png")
    results_lib.write_json(workdir / outcome.RESULTS, summary)
  vtab_summary.show(console, workdir, summary)
  return summary
