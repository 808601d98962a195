"""One method on one task, and the report of it."""

from typing import Any

import jax
import ml_collections

from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.reports import html
from vqt_jax.reports import run_figure
from vqt_jax.reports import run_pictures
from vqt_jax.reports import run_report
from vqt_jax.reports import run_table
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes
from vqt_jax.training import metrics
from vqt_jax.training import run


def train(
  config: ml_collections.ConfigDict,
  workdir: files.Path,
  console: console_lib.Console,
) -> dict[str, Any]:
  """Train and test one method, print a table, write the reports."""
  results = run.run(config, workdir, console)
  run_table.show(console, workdir, results)
  write_reports(results, workdir, console)
  return results


def write_reports(
  results: dict[str, Any], workdir: files.Path, console: console_lib.Console
) -> None:
  """Write `report.png` and `report.html` of a finished run where missing."""
  picture, page = workdir / "report.png", workdir / html.REPORT
  with processes.raise_on_all():
    if processes.is_first():
      if not files.exists(picture):
        run_figure.report(results, picture)
        metrics.write_picture(workdir, picture)
      if not files.exists(page):
        _write_page(results, workdir, page, console)


def _write_page(
  results: dict[str, Any],
  workdir: files.Path,
  page: files.Path,
  console: console_lib.Console,
) -> None:
  """Write the report, without what of images cannot be had any more."""
  config = files.read_json(workdir / "config.json")
  predictions, pictures = None, []
  try:
    predictions = results_lib.read_predictions(workdir, results)
    if predictions and predictions.probability is not None:
      pictures = run_pictures.read(workdir, results, config, predictions)
      pictures = run_pictures.add_attention(pictures, workdir, config)
  except (errors.UserError, jax.errors.JaxRuntimeError) as e:
    console.note(f"incomplete: {str(e).splitlines()[0]}", "report")
  run_report.report(results, config, page, predictions, pictures)
