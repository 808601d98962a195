"""The tasks of VTAB-1k, one after another, and their summary."""

from collections.abc import Iterable
from typing import Any

import ml_collections

from vqt_jax import data
from vqt_jax import errors
from vqt_jax import results
from vqt_jax.config import resolve
from vqt_jax.data import vtab
from vqt_jax.experiments import run_many
from vqt_jax.reports import html
from vqt_jax.reports import vtab_figure
from vqt_jax.reports import vtab_report
from vqt_jax.reports import vtab_summary
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes


def train(
  config: ml_collections.ConfigDict,
  workdir: files.Path,
  console: console_lib.Console,
) -> dict[str, Any]:
  """Run every task, then sum up; see `run_many.train`.

  Tasks whose dataset is not prepared are left out. `workdir` gets
  `report.html`, `vtab.csv` and `vtab.png`, too.

  Raises:
    UserError: no task is prepared, or something else that can be corrected.
  """
  return run_many.train(config, workdir, console, "task", _look, _sum_up)


def _look(
  config: ml_collections.ConfigDict, workdir: files.Path
) -> tuple[run_many.Configs, str]:
  """Return configs of the prepared tasks, and a note on the others.

  Raises:
    UserError: no task is prepared, or a dataset is damaged.
  """
  finished, missing = run_many.finished(workdir, vtab.VTAB), set()
  with processes.raise_on_all():
    for name in vtab.VTAB:
      if name in finished:
        continue
      task = data.make_task(name, data_dir=config.data_dir)
      if data.is_prepared(task):
        data.check_prepared(task)
      else:
        missing.add(name)
  # Of several processes each may have data of its own.
  missing = {n for n in vtab.VTAB if processes.any_process(n in missing)}
  missing_note = _not_prepared(config, missing) if missing else ""
  if missing == set(vtab.VTAB):
    raise errors.UserError(missing_note)
  there = [name for name in vtab.VTAB if name not in missing]
  return {
    name: resolve.config_for(config, task=name) for name in there
  }, missing_note


def _not_prepared(
  config: ml_collections.ConfigDict, missing: Iterable[str]
) -> str:
  """Return a note on tasks that are left out, with the command to add them."""
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
  """Write and print the summary; `results.json` comes last."""
  summary = vtab_summary.summarize(run_many.load_results(workdir, names))
  if processes.is_first():
    files.write(workdir / "vtab.csv", vtab_summary.to_csv(summary).encode())
    vtab_figure.vtab(summary, workdir / "vtab.png")
    vtab_report.report(
      workdir / html.REPORT,
      summary,
      files.read_json(workdir / "config.json"),
      [name for name in names if files.exists(workdir / name / html.REPORT)],
    )
    files.write_json(workdir / results.RESULTS, summary)
  vtab_summary.show(console, workdir, summary)
  return summary
