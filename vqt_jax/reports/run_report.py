"""The report of one run, report.html."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import statistics
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import results as results_lib
from vqt_jax.reports import evaluation
from vqt_jax.reports import html
from vqt_jax.reports import judgement
from vqt_jax.reports import run_figure
from vqt_jax.reports import style
from vqt_jax.runtime import files
from vqt_jax.runtime import units

# What the settings of one grid have in common.
_ALIKE = ("num_queries", "query_dropout", "normalize")


def report(
  results: dict[str, Any],
  config: Mapping[str, Any],
  path: files.Path,
  predictions: results_lib.Predictions | None = None,
  pictures: Sequence[judgement.Picture] = (),
) -> None:
  """Write the report of a run.

  Args:
    results: contents of its `results.json`.
    config: contents of its `config.json`.
    path: of the file.
    predictions: of the test images; None: there are none.
    pictures: the most notable ones of them.
  """
  searched, tested = run_figure.drawn_alone(results)
  html.write(
    path,
    "run.html",
    title=f"{results['task']}: {style.method_name(results)}",
    summary=[_accuracy(results), _choice(results), _cost(results)],
    grids=list(_grids(results)),
    searched=[html.figure(*x, f"search{i}") for i, x in enumerate(searched)],
    tested=[html.figure(*x, f"test{i}") for i, x in enumerate(tested)],
    classes=_classes(results),
    seeds=len(results["test_accuracy"]["per_seed"]),
    facts=_facts(results),
    **_judged(results, predictions, pictures),
    **html.reproduce(path.with_name("config.json"), config),
  )


def _accuracy(results: Mapping[str, Any]) -> str:
  test = results["test_accuracy"]
  images = (
    f"{test['images']:,} test images" if test["images"] else "test images"
  )
  interval = accuracy_lib.format_interval(test)
  known = [f"95 % interval {interval}"] if interval else []
  known.append(accuracy_lib.over_seeds([test]))
  if together := results.get("test_ensemble_accuracy"):
    known.append(f"the seeds together {100 * together['mean']:.1f} %")
  name = style.method_name(results)
  return (
    f"{name[0].upper()}{name[1:]}{',' * (',' in name)} classifies"
    f" {accuracy_lib.format_mean(test, 1, '±')} % of the {images} of"
    f" {results['task']} correctly ({'; '.join(known)})."
  )


def _choice(results: Mapping[str, Any]) -> str:
  """Say how the setting was chosen."""
  search, best = results["search"], results["best"]
  chosen = _setting(results["chosen"])
  if folds := (results.get("auto") or {}).get("members"):
    each = [f"{x['method']} {html.percent(x['cv_accuracy'])} %" for x in folds]
    together = html.percent(results["auto"]["cv_accuracy"])
    return (
      f"In {results['auto']['folds']} folds of cross-validation {each[0]} and"
      f" {each[1]} were right, weighed together {together} %; chosen was"
      f" {chosen}."
    )
  if solved := results.get("solved"):
    share = statistics.mean(each["accuracy"] for each in solved)
    penalty = statistics.median(each["penalty"] for each in solved)
    how = results_lib.how_judged(solved[0])
    return (
      f"The head was computed, not trained: of {len(solved[0]['tried'])}"
      f" penalties {how} chose {penalty:.2g}, with {100 * share:.1f} % there."
      + f" It chose {chosen}."
      * bool(results["selection"])
    )
  if best:
    return (
      f"Of {best['searched']} settings, {len(best['finalists'])} were compared"
      f" in {best['folds']} folds of cross-validation, which chose {chosen}."
    )
  if search:
    top = search["val_accuracy"][search["chosen"]]
    lost = search["diverged"]
    return (
      f"Of {len(search['runs'])} settings"
      + (f" ({len(lost)} diverged)" if lost else "")
      + f" the best on val, with {html.percent(top)} %, was {chosen}."
    )
  return f"Nothing was searched: the setting was {chosen}."


def _setting(chosen: Mapping[str, Any]) -> str:
  names = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "keep_fraction": "fraction of the features",
  }
  shown = {
    names.get(name, name.replace("_", " ")): value
    for name, value in chosen.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
    if name != "num_queries" and (name, value) != ("keep_fraction", 1)
  }
  text = ", ".join(f"{name} {value:g}" for name, value in shown.items())
  return text or "the only one"


def _cost(results: Mapping[str, Any]) -> str:
  peak = (results.get("memory") or {}).get("peak_bytes")
  memory = f", with {units.format_bytes(peak)} at the peak" if peak else ""
  return (
    f"It trained {results['trained_parameters']:,} parameters on"
    f" {style.backbone_name(results['backbone'])} in"
    f" {html.duration(results['seconds']['training'])} on"
    f" {results['device']}{memory}."
  )


def _grids(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """Yield tables of the settings that were tried, with their val accuracy."""
  if search := results["search"]:
    tried = [
      {**run, "val_accuracy": None if i in search["diverged"] else share}
      for i, (run, share) in enumerate(
        zip(search["runs"], search["val_accuracy"])
      )
    ]
    yield _grid("Accuracy on val, %", tried, search["runs"][search["chosen"]])
  wide = (results["best"] or {}).get("tried") or []
  alike = lambda x: [str(x.get(name)) for name in _ALIKE]
  for _, found in itertools.groupby(sorted(wide, key=alike), alike):
    found = list(found)
    parts = [
      f"{name.replace('_', ' ')} {found[0][name]}"
      for name in _ALIKE
      if found[0].get(name) is not None
    ]
    title = f"{', '.join(['Wide search', *parts])}: accuracy on val, %"
    yield _grid(title, found, results["best"]["chosen"])


def _grid(
  title: str, tried: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]
) -> dict[str, Any]:
  """Return a table, learning rates by weight decays."""
  place = lambda x: (x["weight_decay"], x["lr"])
  found = {place(x): x for x in tried}
  decays, rates = (sorted(set(values)) for values in zip(*found))
  known = [x["val_accuracy"] for x in tried if x["val_accuracy"] is not None]
  low, high = (min(known), max(known)) if known else (0, 0)

  def cell(at):
    if at not in found:
      return {"text": "", "share": 0, "kind": ""}
    share = found[at]["val_accuracy"]
    is_chosen = all(
      found[at].get(name) == chosen.get(name)
      for name in (*_ALIKE, "lr", "weight_decay")
    )
    kinds = ["chosen"] * is_chosen + ["added"] * bool(found[at].get("extended"))
    return {
      "text": "diverged" if share is None else html.percent(share),
      "share": ((share or low) - low) / max(high - low, 1e-9),
      "kind": " ".join(kinds),
    }

  return {
    "title": title,
    "rates": [f"{rate:.3g}" for rate in rates],
    "rows": [
      (f"{decay:.3g}", [cell((decay, rate)) for rate in rates])
      for decay in decays
    ],
    "added": any(x.get("extended") for x in tried),
  }


def _classes(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Return the rows of the table of classes; [] if they were not counted."""
  if not (counts := results.get("test_classes")):
    return []
  seeds = len(results["test_accuracy"]["per_seed"])
  columns = (counts[name] for name in ("class", "images", "right", "predicted"))
  return html.class_rows(*columns, seeds)


def _judged(
  results: Mapping[str, Any],
  predictions: results_lib.Predictions | None,
  pictures: Sequence[judgement.Picture],
) -> dict[str, Any]:
  """Return confusion, calibration and images, as far as they are known."""
  found = {"confusion": None, "worst": [], "calibration": None}
  found |= {"matrix_file": "", "together": ""}
  names = (results.get("test_classes") or {}).get("class")
  if names and predictions and predictions.together is not None:
    label, together = predictions.label, predictions.together
    pairs, images = np.unique(
      np.stack([label, together]), axis=1, return_counts=True
    )
    found |= judgement.confusion(pairs, images, names)
    if (seeds := len(predictions.predicted)) > 1:
      found["together"] = (
        f"Here and below the {seeds} seeds answer together, by the mean of"
        " their probabilities."
      )
    if (probability := predictions.probability) is not None:
      found |= judgement.calibration(
        evaluation.calibration(probability, together == label)
      )
  return found | judgement.gallery(pictures, names or ())


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
  """Return versions, and hashes of what the run began with."""
  data = results.get("data") or {}
  splits = data.get("splits") or {}
  versions = results.get("versions") or {}
  return {
    "backbone": results["backbone"],
    "its weights, SHA-256": results.get("weights"),
    "dataset": data.get("dataset"),
    "its contents, SHA-256": data.get("sha256"),
    **{
      f"split {name}": f"{split['slices']}, {split['images']:,} images"
      for name, split in splits.items()
    },
    "device": results["device"],
    "versions": ", ".join(f"{name} {x}" for name, x in versions.items()),
  }
