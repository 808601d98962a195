"""Summary of the VTAB-1k tasks: means, a CSV file, a table.

The mean over tasks and the mean of the group means differ by points, and papers
use either: both are given, each with its name. If tasks are missing, all means
(those of published numbers too) are over the tasks that are there.
"""

from collections.abc import Mapping
import csv
import io
import statistics
from typing import Any

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.data import vtab
from vqt_jax.reports import published
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files

OF_GROUPS = "mean_of_groups"  # Every group counts the same.
OF_TASKS = "mean_of_tasks"  # Every task counts the same.
ABOUT = (
  "method",
  "backbone",
  "image_size",
  "value_range",
  "resize",
  "protocol",
)
COLUMNS = (
  "source",
  "method",
  "backbone",
  "task",
  "group",
  "accuracy_percent",
  "std_percent",
  "interval_low_percent",
  "interval_high_percent",
  "seeds",
  "tasks",
  "num_queries",
  "trained_parameters",
  "training_seconds",
)


def summarize(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Return the contents of the `results.json` of all tasks.

  Args:
    results: task -> contents of its `results.json`; at least one.
  """
  names = [name for name in vtab.VTAB if name in results]
  about = results[names[0]]
  tasks = {name: _task(name, results[name]) for name in names}
  return {
    "task": vtab.ALL,
    **{key: about[key] for key in ABOUT},
    "tasks": tasks,
    "missing": [name for name in vtab.VTAB if name not in results],
    "means": means({n: t["test_accuracy"]["mean"] for n, t in tasks.items()}),
    "seconds": {
      key: sum(task["seconds"][key] for task in tasks.values())
      for key in ("training", "test", "process")
    },
  }


def _task(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
  keys = (
    "test_accuracy",
    "chosen",
    "num_queries",
    "trained_parameters",
    "seconds",
  )
  return {"group": vtab.VTAB[name].group, **{key: results[key] for key in keys}}


def means(accuracy: Mapping[str, float]) -> dict[str, dict[str, Any]]:
  """Compute means of one accuracy per task.

  Args:
    accuracy: task -> number; tasks may be missing.

  Returns:
    For every group, `mean_of_groups` and `mean_of_tasks`: `mean` (None if there
    is nothing) and `count`, the number of entries.
  """
  groups = {
    group: [a for n, a in accuracy.items() if vtab.VTAB[n].group == group]
    for group in vtab.GROUPS
  }
  found = {group: _mean(values) for group, values in groups.items()}
  there = [m["mean"] for m in found.values() if m["count"]]
  found[OF_GROUPS] = _mean(there)
  found[OF_TASKS] = _mean(list(accuracy.values()))
  return found


def _mean(values: list[float]) -> dict[str, Any]:
  mean = statistics.fmean(values) if values else None
  return {"mean": mean, "count": len(values)}


def same_tasks(row: published.Row, summary: Mapping[str, Any]) -> Any:
  """Compute means of a published row over the tasks that we have."""
  return means({name: row.accuracy[name] for name in summary["tasks"]})


def labels(summary: Mapping[str, Any]) -> dict[str, str]:
  """Label the means: "natural", or "3 natural" if not all; "19 tasks"."""
  words = {}
  for name, mean in summary["means"].items():
    whole = [task for task in vtab.VTAB.values() if task.group == name]
    count = "" if mean["count"] == len(whole) else f"{mean['count']} "
    words[name] = count + name.removeprefix("mean_of_")
  return words


def to_csv(summary: Mapping[str, Any]) -> str:
  """Return a CSV table: tasks and means, ours and then published ones."""
  file = io.StringIO()
  writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
  writer.writeheader()
  ours = {"source": "ours"} | {k: summary[k] for k in ("method", "backbone")}
  for name, task in summary["tasks"].items():
    test = task["test_accuracy"]
    writer.writerow(
      {
        **ours,
        **_place(name, task["group"], test["mean"]),
        **accuracy_lib.columns(test),
        "seeds": len(test["per_seed"]),
        "num_queries": task["num_queries"],
        "trained_parameters": task["trained_parameters"],
        "training_seconds": f"{task['seconds']['training']:.0f}",
      }
    )
  _write_means(writer, ours, summary["means"])
  for row in published.ROWS:
    theirs = {
      "source": row.source.name,
      "method": row.method,
      "backbone": row.source.backbone,
      "trained_parameters": f"{row.parameters:.0f} + head",
    }
    for name, task in vtab.VTAB.items():
      place = _place(name, task.group, row.accuracy[name])
      writer.writerow(theirs | place)
    _write_means(writer, theirs, same_tasks(row, summary))
  return file.getvalue()


def _place(name: str, group: str, accuracy: float) -> dict[str, Any]:
  percent = f"{100 * accuracy:.2f}"
  return {"task": name, "group": group, "accuracy_percent": percent, "tasks": 1}


def _write_means(writer: Any, about: dict[str, Any], means: Any) -> None:
  for name, mean in means.items():
    if mean["count"]:
      task = name if name in (OF_GROUPS, OF_TASKS) else f"mean of {name}"
      place = _place(task.replace("_", " "), "", mean["mean"])
      place["tasks"] = means[OF_TASKS if name == OF_GROUPS else name]["count"]
      writer.writerow(about | place)


def show(
  console: console_lib.Console, workdir: files.Path, summary: Any
) -> None:
  """Print every task, the means, and published means beside them."""
  rows = []
  for name in vtab.VTAB:
    if name in summary["missing"]:
      rows.append([name, "not prepared", "", "", "", ""])
      continue
    task = summary["tasks"][name]
    test = task["test_accuracy"]
    rows.append(
      [
        name,
        f"{accuracy_lib.format_mean(test)} %",
        accuracy_lib.format_interval(test),
        task["num_queries"] or "",
        f"{task['trained_parameters']:,}",
        f"{task['seconds']['training']:.0f}",
      ]
    )
  title = f"{summary['method']} on VTAB-1k"
  columns = [
    title,
    "test accuracy",
    "95 % interval",
    "queries",
    "trained",
    "seconds to train",
  ]
  console.table(columns, rows)
  _show_means(console, summary)
  console.note(
    f"{workdir / 'results.json'}   report.html   vtab.csv   vtab.png", "results"
  )


def _show_means(console: console_lib.Console, summary: Any) -> None:
  """Print our means, and those of well-known rows of V-PETL Bench."""
  console.note("")
  rows = [[summary["method"], *_percents(summary["means"])]]
  for row in published.familiar():
    means = same_tasks(row, summary)
    rows.append([f"{row.method} *", *_percents(means)])
  console.table(["mean over", *labels(summary).values()], rows)
  source = published.BENCH
  console.note(
    f"* theirs, not ours: {source.name}, {source.backbone}; protocols differ"
  )


def _percents(means: Any) -> list[str]:
  found = [mean["mean"] for mean in means.values()]
  return ["" if x is None else f"{100 * x:.2f}" for x in found]
