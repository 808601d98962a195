"""Finished runs side by side: a table, report.html, compare.csv and .png."""

from collections.abc import Mapping
import csv
import io
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import data
from vqt_jax import results as results_lib
from vqt_jax.reports import attention_figure
from vqt_jax.reports import compare_figure
from vqt_jax.reports import compare_report
from vqt_jax.reports import html
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import units

ABOUT = ("task", "backbone", "device")
# What a comparison needs of a run; None of what an older program left out.
FIELDS = (
  "method",
  *ABOUT,
  "num_queries",
  "test_accuracy",
  "chosen",
  "search",
  "batch_size",
  "trained_parameters",
  "memory",
  "seconds",
  "tuned_bytes",
)
# What runs of a fair comparison have in common: columns, and their names.
SETUP = {
  "image_size": "image size",
  "value_range": "value range",
  "resize": "resize",
  "fit": "fit",
  "weights": "weights",
  "pool_type": "pooling",
  "gelu": "GELU",
  "dtype": "dtype",
  "dataset": "dataset",
  "num_classes": "classes",
  "data_sha256": "contents of the dataset",
  **{f"{split}_split": f"{split} split" for split in data.SPLITS},
}
# What runs have in common if they were tested on the same images.
_SAME_IMAGES = ("dataset", "data_sha256", "test_split")
UNKNOWN = "unknown"
SHORT = 8  # Characters of a digest on the screen.
COLUMNS = (
  "run",
  "task",
  "method",
  "accuracy_percent",
  "std_percent",
  "interval_low_percent",
  "interval_high_percent",
  "seeds",
  "trained_parameters",
  "peak_bytes",
  "step_bytes",
  "side_by_side",
  "epoch_seconds",
  "training_seconds",
  "tuned_bytes",
  "settings",
  "lr",
  "batch_size",
  "weight_decay",
  "keep_fraction",
  "num_queries",
  "backbone",
  *SETUP,
  "device",
)


def summarize(
  results: Mapping[str, Mapping[str, Any]],
  predictions: Mapping[str, results_lib.Predictions | None] | None = None,
) -> dict[str, Any]:
  """Summarise finished runs, the most accurate first.

  Args:
    results: name -> contents of the run's `results.json`; at least one.
    predictions: name -> those on the test images, if they are known.

  Returns:
    `task`, `backbone` and `device` (of all runs, different ones joined by
    commas); `differences`: field of `SETUP` -> value -> names of runs, where
    runs differ ("unknown" where an older program did not record it); and
    `runs`: name -> entries of the table, where `details` tells runs of the same
    method apart, and `difference` is from the most accurate run, see
    `_difference`.
  """
  runs = {name: _entry(result) for name, result in results.items()}
  about = {
    key: ", ".join(dict.fromkeys(run[key] for run in runs.values()))
    for key in ABOUT
  }
  for name, run in runs.items():
    run["details"] = _details(name, runs)
  rank = lambda name: -runs[name]["test_accuracy"]["mean"]
  runs = {name: runs[name] for name in sorted(runs, key=rank)}
  best = next(iter(runs))
  of = (predictions or {}).get
  for name, run in runs.items():
    run["difference"] = (
      None if name == best else _difference(run, runs[best], of(name), of(best))
    )
  return {**about, "differences": _differences(runs), "runs": runs}


def _difference(
  run: Mapping[str, Any],
  best: Mapping[str, Any],
  predictions: results_lib.Predictions | None,
  best_predictions: results_lib.Predictions | None,
) -> dict[str, Any] | None:
  """Return how the accuracy of a run differs from that of the best one.

  Returns:
    `mean`; the intervals `seeds` and `images`, of other seeds and other images,
    None where unknown; and whether the latter is `paired` by image. None if the
    runs were not tested on the same images.
  """
  setup, best_setup = run["setup"], best["setup"]
  if run["task"] != best["task"] or any(
    setup[name] != best_setup[name] for name in _SAME_IMAGES
  ):
    return None
  tests = run["test_accuracy"], best["test_accuracy"]
  both = [each for each in (predictions, best_predictions) if each]
  paired = len(both) == 2 and np.array_equal(both[0].label, both[1].label)
  return {
    "mean": tests[0]["mean"] - tests[1]["mean"],
    "seeds": accuracy_lib.seed_difference(*tests),
    "images": accuracy_lib.paired_difference(*(each.right for each in both))
    if paired
    else accuracy_lib.difference(*tests),
    "paired": paired,
  }


def _differences(
  runs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, list[str]]]:
  setups = {name: run["setup"] for name, run in runs.items()}
  titles = dict(SETUP)
  if any(setup["weights"] is None for setup in setups.values()):
    # Else these tell more: the same ones may lie in two places.
    titles = {"backbone": "backbone", **titles}
    setups = {
      n: {**s, "backbone": runs[n]["backbone"]} for n, s in setups.items()
    }
  found = {}
  for column, title in titles.items():
    groups = {}
    for name, setup in setups.items():
      groups.setdefault(setup[column], []).append(name)
    if len(groups) > 1:
      found[title] = {
        _shown(column, value, runs[names[0]]): names
        for value, names in groups.items()
      }
  return found


def _shown(column: str, value: str | None, run: Mapping[str, Any]) -> str:
  if value is None:
    return UNKNOWN
  if column == "weights":
    return f"{value[:SHORT]} of {run['backbone']}"
  return value[:SHORT] if column == "data_sha256" else value


def describe_differences(summary: Mapping[str, Any]) -> str:
  """Describe differences in one sentence; "" if only the methods differ."""
  differ, unknown = [], {}
  for title, groups in summary["differences"].items():
    if len(groups.keys() - {UNKNOWN}) > 1:
      each = [f"{value} ({', '.join(of)})" for value, of in groups.items()]
      differ.append(f"{title} {', '.join(each)}")
    else:
      unknown.setdefault(", ".join(groups[UNKNOWN]), []).append(title)
  text = ["not the same in all runs: " + "; ".join(differ)] if differ else []
  text += [f"not known of {of}: {', '.join(x)}" for of, x in unknown.items()]
  return "; ".join(text)


def _details(name: str, runs: Mapping[str, Mapping[str, Any]]) -> str:
  looks = lambda run: (run["method"], run["num_queries"], run["task"])
  run, others = runs[name], [runs[other] for other in runs if other != name]
  details = f", T={run['num_queries']}" if run["num_queries"] else ""
  if any(other["task"] != run["task"] for other in others):
    details += f", {run['task']}"
  if any(looks(other) == looks(run) for other in others):
    details += f", {name}"
  return details


def _entry(results: Mapping[str, Any]) -> dict[str, Any]:
  entry = {key: results.get(key) for key in FIELDS}
  search = entry.pop("search")
  memory = entry.pop("memory") or {}
  # Of protocol=best; not of earlier versions.
  tried = (results.get("best") or {}).get("tried") or ()
  return {
    **entry,
    "setup": _setup(results),
    "settings": len(tried) or (len(search["runs"]) if search else 1),
    **{
      key: memory.get(key)
      for key in ("peak_bytes", "step_bytes", "side_by_side")
    },
    "epoch_seconds": entry.pop("seconds").get("epoch"),
    "training_seconds": results["seconds"]["training"],
  }


def _setup(results: Mapping[str, Any]) -> dict[str, str | None]:
  """Return the values of `SETUP`; None if an older program left them out."""
  examples = results.get("data", {})
  splits = {
    f"{name}_split": f"{split['slices']}, {split['images']:,} images"
    for name, split in examples.get("splits", {}).items()
  }
  size = results.get("image_size")
  values = {
    **results,
    **splits,
    "image_size": size and "x".join(map(str, size)),
    "fit": results.get("fit", "squash"),  # The only one of earlier versions.
    "dataset": examples.get("dataset"),
    "num_classes": examples.get("num_classes"),
    "data_sha256": examples.get("sha256"),
  }
  values = {column: values.get(column) for column in SETUP}
  return {column: x if x is None else str(x) for column, x in values.items()}


def to_csv(summary: Mapping[str, Any]) -> str:
  """Return a CSV table with a line per run, the most accurate first."""
  file = io.StringIO()
  writer = csv.DictWriter(
    file, COLUMNS, lineterminator="\n", extrasaction="ignore"
  )
  writer.writeheader()
  for name, run in summary["runs"].items():
    test = run["test_accuracy"]
    writer.writerow(
      {
        "run": name,
        **run["chosen"],
        **run,
        **run["setup"],
        **accuracy_lib.columns(test),
        "seeds": len(test["per_seed"]),
      }
    )
  return file.getvalue()


def show(console: console_lib.Console, summary: Mapping[str, Any]) -> None:
  """Print a row per run, the most accurate first, and their differences."""
  rows = []
  for run in summary["runs"].values():
    test = run["test_accuracy"]
    rows.append(
      [
        run["method"] + run["details"],
        f"{accuracy_lib.format_mean(test)} %",
        accuracy_lib.format_interval(test) or UNKNOWN,
        f"{run['trained_parameters']:,}",
        _or_unknown(run["tuned_bytes"], units.format_bytes),
        _or_unknown(run["peak_bytes"], units.format_bytes),
        _or_unknown(run["step_bytes"], units.format_bytes),
        _or_unknown(run["side_by_side"], str),
        _or_unknown(run["epoch_seconds"], "{:.3g}".format),
      ]
    )
  columns = [
    summary["task"],
    "test accuracy",
    "95 % interval",
    "trained",
    "tuned/",
    "peak memory",
    "of a step",
    "trials at once",
    "s / epoch, trial",
  ]
  console.table(columns, rows)
  if text := describe_differences(summary):
    console.note(text, "differ")


def _or_unknown(value: Any, write: Any) -> str:
  return UNKNOWN if value is None else write(value)


def write(
  console: console_lib.Console,
  summary: Mapping[str, Any],
  workdirs: Mapping[str, files.Path],
  output: files.Path,
) -> None:
  """Write the report, CSV file and pictures, and print the table.

  A picture of attention that exists is kept.

  Raises:
    UserError: a file cannot be written.
  """
  table = to_csv(summary).encode()
  files.write(output / "compare.csv", table)
  compare_figure.draw(summary, output / "compare.png")
  differ = describe_differences(summary)
  compare_report.report(output / html.REPORT, summary, differ, workdirs)
  show(console, summary)
  written = [html.REPORT, "compare.csv", "compare.png"]
  for name, run in summary["runs"].items():
    if run["method"] == "vqt":
      written.append(f"attention_{name}.png")
      if not files.exists(output / written[-1]):
        attention_figure.draw(workdirs[name], output / written[-1])
  console.note("   ".join([str(output / written[0]), *written[1:]]), "results")
