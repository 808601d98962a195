"""The report of all tasks of VTAB-1k, report.html."""

from collections.abc import Collection, Mapping
from typing import Any

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.data import vtab
from vqt_jax.reports import html
from vqt_jax.reports import published
from vqt_jax.reports import style
from vqt_jax.reports import vtab_figure
from vqt_jax.reports import vtab_summary
from vqt_jax.runtime import files


def report(
  path: files.Path,
  summary: Mapping[str, Any],
  config: Mapping[str, Any],
  linked: Collection[str],
) -> None:
  """Write the report of all tasks.

  Args:
    path: of the file.
    summary: from `vtab_summary.summarize`.
    config: contents of the `config.json` beside it.
    linked: tasks with a report of their own, in a folder of their name.
  """
  name = style.METHODS.get(summary["method"], summary["method"])
  drawn = vtab_figure.drawn_alone(summary)
  tests = [task["test_accuracy"] for task in summary["tasks"].values()]
  html.write(
    path,
    "vtab.html",
    title=f"VTAB-1k: {name}",
    summary=[_accuracy(name, summary), _groups(summary), _cost(summary)],
    groups=[_group(group, summary, linked) for group in vtab.GROUPS],
    seeds=accuracy_lib.over_seeds(tests),
    means=_means(name, summary),
    mean_names=list(vtab_summary.labels(summary).values()),
    drawn=[html.figure(*x, f"tasks{i}") for i, x in enumerate(drawn)],
    marks=vtab_figure.marks(),
    sources=[published.BENCH, published.STUDY],
    **html.reproduce(path.with_name("config.json"), config),
  )


def _accuracy(name: str, summary: Mapping[str, Any]) -> str:
  words = vtab_summary.labels(summary)
  groups, tasks = (
    f"{html.percent(summary['means'][each]['mean'])} % as the mean of"
    f" {words[each]}"
    for each in (vtab_summary.OF_GROUPS, vtab_summary.OF_TASKS)
  )
  return (
    f"The test accuracy of {name[0].upper()}{name[1:]} on VTAB-1k is {groups},"
    f" and {tasks}."
  )


def _groups(summary: Mapping[str, Any]) -> str:
  """Say what is easy and what is hard."""
  there = [
    f"{html.percent(mean['mean'])} % on {group}"
    for group in vtab.GROUPS
    if (mean := summary["means"][group])["count"]
  ]
  share = lambda name: summary["tasks"][name]["test_accuracy"]["mean"]
  best, worst = (f(summary["tasks"], key=share) for f in (max, min))
  return (
    f"It is {', '.join(there)} tasks, from {html.percent(share(worst))} % on"
    f" {worst} to {html.percent(share(best))} % on {best}."
  )


def _cost(summary: Mapping[str, Any]) -> str:
  missing = summary["missing"]
  known = f"; not prepared and missing: {', '.join(missing)}" if missing else ""
  return (
    f"All tasks together took {html.duration(summary['seconds']['process'])} on"
    f" {style.backbone_name(summary['backbone'])},"
    f" {html.duration(summary['seconds']['training'])} of it to train{known}."
  )


def _group(
  group: str, summary: Mapping[str, Any], linked: Collection[str]
) -> dict[str, Any]:
  """Return the rows of a group of tasks."""
  names = [name for name, task in vtab.VTAB.items() if task.group == group]
  rows = []
  for name in names:
    row = {"name": name, "link": name in linked, "task": None}
    if task := summary["tasks"].get(name):
      test = task["test_accuracy"]
      row |= {
        "task": task,
        "accuracy": accuracy_lib.format_mean(test, 1, "±"),
        "interval": accuracy_lib.format_interval(test),
        "mean": test["mean"],
        "bounds": accuracy_lib.bounds(test) or (test["mean"],) * 2,
      }
    rows.append(row)
  return {"name": group, "mean": summary["means"][group]["mean"], "rows": rows}


def _means(name: str, summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """Return (name, means) of ours and of well-known published rows."""
  rows = [(f"{name}, ours", summary["means"])]
  for row in published.familiar():
    rows.append((row.method, vtab_summary.same_tasks(row, summary)))
  return [(name, [x["mean"] for x in means.values()]) for name, means in rows]
