"""Methods on several tasks with one backbone: accuracy, rank and cost.

  python -m benchmarks.tasks.render DATA
  python -m benchmarks.tasks.compare --data DATA --init CKPT --workdir W \\
      --methods linear,vqt,head2toe --tasks dev [--config.KEY=VALUE ...]

--data     TFDS folders; the first one that has a task is taken
--init     the backbone, as config.init
--methods  as config.methods
--tasks    "dev", "report", "all", or names, separated by commas; also digits
           and fashion_mnist (its first 2,000 test images)
--config.  fields of all runs; images have 112 px unless image_size is given

Each method on each task is an ordinary run, W/TASK/METHOD, so the same command
resumes, and other tasks or methods are added by naming them. The methods of a
task that read stored features share its files, in W/store. At the end, or when
stopped, a table of what is finished is printed and written to W/tasks.csv.

The standard error is that of the share of the test images, sqrt(p (1 - p) / n);
it says nothing about other training images, and less than it seems about the
difference of two methods, which see the same images: `vqt-jax compare W/TASK/*`
pairs them. Means are over the tasks that all methods have finished. Seconds are
those of a run with everything, from reading images to the test.
"""

import argparse
from collections.abc import Mapping, Sequence
import csv
import math
import os
import pathlib
import statistics
import sys
from typing import Any

from scipy import stats

from benchmarks.tasks import catalogue
from benchmarks.tasks import drawing
from vqt_jax import cli
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.models import methods as methods_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import units

# Tasks that are not rendered -> fields of their runs.
OTHERS = {"digits": {}, "fashion_mnist": {"splits.test": "test[:2000]"}}
MEAN = "mean"


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", nargs="+", required=True)
  for name in ("init", "methods", "workdir"):
    parser.add_argument(f"--{name}", required=True)
  parser.add_argument("--tasks", default="dev")
  options, changes = parser.parse_known_args(argv)
  workdir = pathlib.Path(options.workdir)
  status = 0
  try:
    tasks = catalogue.find(options.tasks, OTHERS)
    methods = methods_lib.split_list(options.methods)
    for task in tasks:
      # The probe finds its features in the files of the others.
      for method in sorted(methods, key=lambda name: name == "linear"):
        place = workdir / task / method
        command = ["main.py", f"--workdir={place}"]
        command += _flags(task, method, options) + changes
        status = status or cli.main(command)
    show(workdir, read(workdir, tasks, methods))
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return status


def _flags(task: str, method: str, options: argparse.Namespace) -> list[str]:
  """Return the flags of a run, without its workdir."""
  has = lambda folder: os.path.isdir(os.path.join(folder, task))
  fields = {
    "task": task,
    "method": method,
    "init": options.init,
    "data_dir": next(filter(has, options.data), options.data[0]),
    "image_size": drawing.SIZE,
    "store_dir": os.path.join(options.workdir, "store"),
    **OTHERS.get(task, {}),
  }
  return ["--config=vtab", *(f"--config.{k}={v}" for k, v in fields.items())]


def read(
  workdir: pathlib.Path, tasks: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Return task -> method -> entry, of finished runs, and their means.

  The means are of the tasks that all methods have finished, if any, under
  `MEAN`.
  """
  found = {}
  for task in tasks:
    entries = {
      method: _entry(results_lib.read(workdir / task / method))
      for method in methods
      if (workdir / task / method / results_lib.RESULTS).exists()
    }
    ranks = stats.rankdata([-e["accuracy"] for e in entries.values()])
    for entry, rank in zip(entries.values(), ranks):
      entry["rank"] = float(rank)
    if entries:
      found[task] = entries
  whole = [each for each in found.values() if len(each) == len(methods)]
  if whole:
    found[MEAN] = {m: _mean([each[m] for each in whole]) for m in methods}
  return found


def _entry(results: Mapping[str, Any]) -> dict[str, Any]:
  test, memory = results["test_accuracy"], results["memory"]
  share = test["mean"]
  return {
    "accuracy": share,
    "standard_error": math.sqrt(share * (1 - share) / test["images"]),
    "seconds": results["seconds"]["process"],
    "peak_bytes": memory["peak_bytes"],
    "step_bytes": memory["step_bytes"],
    "trained_parameters": results["trained_parameters"],
    "tasks": 1,
  }


def _mean(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  found = {
    key: None
    if any(entry[key] is None for entry in entries)
    else statistics.fmean(entry[key] for entry in entries)
    for key in entries[0]
  }
  squares = sum(entry["standard_error"] ** 2 for entry in entries)
  found["standard_error"] = math.sqrt(squares) / len(entries)
  found["tasks"] = len(entries)
  return found


def show(
  workdir: pathlib.Path, found: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
  """Print a table per task and one of the means; write tasks.csv."""
  console = console_lib.Console(sys.stdout)
  with open(workdir / "tasks.csv", "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    for number, (task, entries) in enumerate(found.items()):
      if not number:
        columns = list(next(iter(entries.values())))
        writer.writerow(["task", "method", *columns])
      for method, entry in entries.items():
        writer.writerow([task, method, *(entry[c] for c in columns)])
      order = sorted(entries, key=lambda method: -entries[method]["accuracy"])
      rows = [[method, *_cells(entries[method])] for method in order]
      count = entries[order[0]]["tasks"]
      name = f"{MEAN} of {count} tasks" if task == MEAN else task
      titles = ("accuracy, %", "rank", "seconds", "peak memory", "of a step")
      console.table([name, *titles, "trained"], rows)
      console.note("")
  console.note(f"{workdir / 'tasks.csv'}", "results")


def _cells(entry: Mapping[str, Any]) -> list[str]:
  size = lambda x: "unknown" if x is None else units.format_bytes(round(x))
  return [
    f"{100 * entry['accuracy']:.1f} +- {100 * entry['standard_error']:.1f}",
    f"{entry['rank']:.3g}",
    f"{entry['seconds']:.0f}",
    size(entry["peak_bytes"]),
    size(entry["step_bytes"]),
    f"{entry['trained_parameters']:,.0f}",
  ]


if __name__ == "__main__":
  sys.exit(main())
