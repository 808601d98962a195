"""The report of a comparison, report.html."""

from collections.abc import Mapping
from typing import Any
from urllib import parse

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.reports import compare_figure
from vqt_jax.reports import html
from vqt_jax.reports import style
from vqt_jax.runtime import files
from vqt_jax.runtime import units


def report(
  path: files.Path,
  summary: Mapping[str, Any],
  differ: str,
  workdirs: Mapping[str, files.Path],
) -> None:
  """Write the report of a comparison.

  Args:
    path: of the file.
    summary: from `compare.summarize`.
    differ: how the runs differ beside their methods; "" if they do not.
    workdirs: of the runs, by name.
  """
  runs = summary["runs"]
  rows = [
    {**_row(number, run), "link": _link(path, workdirs[name])}
    for number, (name, run) in enumerate(runs.items(), 1)
  ]
  tests = [run["test_accuracy"] for run in runs.values()]
  drawn = compare_figure.drawn_alone(summary)
  html.write(
    path,
    "compare.html",
    title=f"{units.format_count(len(runs), 'run')} on {summary['task']}",
    summary=[*_sentences(summary), _differ(differ)],
    rows=_scaled(rows, ("mean", "low", "high")),
    seeds=accuracy_lib.over_seeds(tests),
    kinds=len({compare_figure.kind(run["method"]) for run in runs.values()}),
    behind=_behind(summary),
    costs=[html.figure(*x, f"cost{i}") for i, x in enumerate(drawn)],
    command=html.command(
      *("-m", "vqt_jax", "compare", *(workdirs[name] for name in runs)),
      f"--output={path.parent}",
    ),
    facts={
      "backbone": summary["backbone"],
      "device": summary["device"],
      "weights, SHA-256": _different(runs, "weights"),
      "data, SHA-256": _different(runs, "data_sha256"),
    },
  )


def _link(path: files.Path, workdir: files.Path) -> str:
  """Return the address of a run's report on this page; "" if not below it.

  So a folder with both can be moved.
  """
  page, report = (files.absolute(x) for x in (path, workdir / html.REPORT))
  if report == page or not report.is_relative_to(page.parent):
    return ""
  if not files.exists(report):
    return ""
  return parse.quote(report.relative_to(page.parent).as_posix())


def _different(runs: Mapping[str, Mapping[str, Any]], column: str) -> str:
  """Return the different values of the setup of runs."""
  found = (run["setup"][column] or "unknown" for run in runs.values())
  return ", ".join(dict.fromkeys(found))


def _name(run: Mapping[str, Any]) -> str:
  return style.METHODS.get(run["method"], run["method"]) + run["details"]


def _sentences(summary: Mapping[str, Any]) -> list[str]:
  """Say which run is best, and how far ahead it is."""
  first, *others = summary["runs"].values()
  test = first["test_accuracy"]
  images = f" of {test['images']:,} test images" if test.get("images") else ""
  name = _name(first)
  found = [
    f"{name[0].upper()}{name[1:]} is the most accurate, with"
    f" {accuracy_lib.format_mean(test, 1, '±')} %{images}."
  ]
  if others and (behind := others[0]["difference"]):
    known = ""
    if behind["images"]:
      low, high = behind["images"]
      paired = ", paired by image" if behind["paired"] else ""
      known = f" (95 % interval {_points((-high, -low))}{paired})"
    found.append(
      f"It is {html.percent(-behind['mean'])} points ahead of"
      f" {_name(others[0])}{known}."
    )
  return found


def _differ(differ: str) -> str:
  if differ:
    return f"{differ[0].upper()}{differ[1:]}."
  return "The runs have images, backbone and preprocessing in common."


def _points(interval: tuple[float, float]) -> str:
  return " to ".join(map(_point, interval))


def _point(share: float) -> str:
  return f"{100 * share:+.1f}".replace("-", "−")


def _row(number: int, run: Mapping[str, Any]) -> dict[str, Any]:
  test = run["test_accuracy"]
  low, high = accuracy_lib.bounds(test) or (test["mean"], test["mean"])
  return {
    **run,
    "number": number,
    "name": _name(run),
    "accuracy": accuracy_lib.format_mean(test, 1, "±"),
    "interval": accuracy_lib.format_interval(test),
    "mean": test["mean"],
    "low": low,
    "high": high,
  }


def _behind(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Return the differences of the other runs from the best one."""
  rows = []
  for number, run in enumerate(summary["runs"].values(), 1):
    if not (found := run["difference"]):
      continue
    mean, seeds, images = (found[x] for x in ("mean", "seeds", "images"))
    low, high = images or (mean, mean)
    rows.append(
      {
        "number": number,
        "name": _name(run),
        "difference": _point(mean),
        "seeds": _points(seeds) if seeds else "–",
        "images": _points(images) if images else "–",
        "unpaired": images and not found["paired"],
        "mean": mean,
        "low": low,
        "high": high,
        "zero": 0.0,
      }
    )
  return _scaled(rows, ("mean", "low", "high", "zero"))


def _scaled(rows: list[dict[str, Any]], names: tuple[str, ...]) -> Any:
  """Map numbers of all rows to 0..1, for bars."""
  values = [row[name] for row in rows for name in names]
  low, high = min(values, default=0), max(values, default=1)
  scale = lambda x: f"{(x - low) / max(high - low, 1e-9):.4f}"
  return [{**row, **{name: scale(row[name]) for name in names}} for row in rows]
