"""Measures of a model's answers, given the true labels."""

from collections.abc import Mapping, Sequence
import csv
import io
import math
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.reports import evaluation_figure
from vqt_jax.reports import style
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files

BINS = 15  # Of confidence.
MOST_MISTAKES = 5  # In the table.


def summarize(
  probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
  """Judge the answers on labelled images.

  Args:
    probabilities: (n, C).
    labels: (n,) int.
    classes: names of the C classes.

  Returns:
    `images`, `accuracy`, its `interval` (Wilson, 95 %), `balanced_accuracy`,
    `macro_f1`, `confusion` (C, C; true by predicted), `per_class`,
    `calibration` and `temperature`, see `calibration` and `temperature`.
    Precision and recall are None where nothing is counted.
  """
  import sklearn.metrics

  predicted = probabilities.argmax(axis=-1)
  numbers = np.arange(len(classes))
  confusion = sklearn.metrics.confusion_matrix(
    labels, predicted, labels=numbers
  )
  right = confusion.diagonal()
  there, taken = confusion.sum(axis=1), confusion.sum(axis=0)
  tally = np.stack([right, taken, there])
  share = accuracy_lib.accuracy(tally)
  precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
    labels, predicted, labels=numbers, zero_division=np.nan
  )
  return {
    "images": len(labels),
    "accuracy": share,
    "interval": list(accuracy_lib.interval(share, len(labels))),
    "balanced_accuracy": accuracy_lib.balanced(tally),
    "macro_f1": accuracy_lib.macro_f1(tally),
    "confusion": confusion,
    "per_class": [
      {"class": name, "images": int(n), "precision": p, "recall": r, "f1": f}
      for name, n, p, r, f in zip(classes, there, precision, recall, f1)
    ],
    "calibration": calibration(probabilities.max(-1), predicted == labels),
    "temperature": temperature(probabilities, labels),
  }


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
  """Compare confidence with accuracy (Guo et al. 2017, section 2).

  Args:
    confidence: (n,) probabilities of the predicted classes.
    right: (n,) whether these are true.

  Returns:
    `bins`, those of `BINS` equal ones that are not empty, with `images`, mean
    `confidence` and `accuracy`; `ece`, the expected calibration error.
  """
  # Bin i is (i / BINS, (i + 1) / BINS].
  index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  bins = []
  for i in np.unique(index):
    inside = index == i
    bins.append(
      {
        "images": int(inside.sum()),
        "confidence": float(confidence[inside].mean()),
        "accuracy": float(right[inside].mean()),
      }
    )
  gaps = [b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
  return {"bins": bins, "ece": sum(gaps) / len(right)}


def temperature(
  probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """Fit the temperature that makes these labels most probable.

  Probabilities become softmax(log(p) / T). One T is fitted on each half of the
  images (every other one) and judged on the other, as T fitted on the images
  that judge it looks too good.

  Returns:
    `value`, T fitted on all images; `ece`, the expected calibration error of
    the halves, each with the T of the other.
  """
  log_p = np.log(np.maximum(probabilities.astype(np.float64), 1e-12))
  halves = [np.arange(start, len(labels), 2) for start in range(2)]
  scaled = np.array(probabilities, np.float64)
  for fitted, judged in (halves, halves[::-1]):
    if len(fitted) and len(judged):
      value = _fit_temperature(log_p[fitted], labels[fitted])
      scaled[judged] = _softmax(log_p[judged] / value)
  right = scaled.argmax(axis=-1) == labels
  return {
    "value": _fit_temperature(log_p, labels),
    "ece": calibration(scaled.max(axis=-1), right)["ece"],
  }


def _softmax(logits: np.ndarray) -> np.ndarray:
  each = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return each / each.sum(axis=-1, keepdims=True)


def _fit_temperature(log_p: np.ndarray, labels: np.ndarray) -> float:
  import scipy.optimize  # Here, as it takes a while.

  rows = np.arange(len(labels))

  def loss(log_t):
    p = _softmax(log_p / math.exp(log_t))[rows, labels]
    return -np.log(np.maximum(p, 1e-300)).mean()

  bounds = (math.log(0.05), math.log(20))
  found = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
  return math.exp(found.x)


def show(console: console_lib.Console, summary: Mapping[str, Any]) -> None:
  """Print tables of all images, of every class, and of the worst mistakes."""
  percent = lambda x: "" if x is None or math.isnan(x) else f"{100 * x:.1f} %"
  low, high = (f"{100 * x:.1f}" for x in summary["interval"])
  scaled = summary["temperature"]
  console.table(
    [
      f"{summary['images']:,} images",
      "accuracy",
      "95 % interval",
      "balanced",
      "macro F1",
      "calibration error",
      "with a temperature",
    ],
    [
      [
        "all",
        percent(summary["accuracy"]),
        f"{low} to {high}",
        percent(summary["balanced_accuracy"]),
        percent(summary["macro_f1"]),
        percent(summary["calibration"]["ece"]),
        f"{percent(scaled['ece'])} (T = {scaled['value']:.2f})",
      ]
    ],
  )
  console.table(
    ["class", "images", "precision", "recall", "F1"],
    [
      [
        each["class"],
        f"{each['images']:,}",
        *(percent(each[name]) for name in ("precision", "recall", "f1")),
      ]
      for each in summary["per_class"]
    ],
  )
  mistakes = summary["confusion"] * (
    1 - np.eye(len(summary["confusion"]), dtype=int)
  )
  names = [each["class"] for each in summary["per_class"]]
  worst = np.argsort(-mistakes, axis=None, kind="stable")[:MOST_MISTAKES]
  rows = [
    [names[true], names[said], mistakes[true, said]]
    for true, said in zip(*np.unravel_index(worst, mistakes.shape))
    if mistakes[true, said]
  ]
  if rows:
    console.table(["true class", "taken for", "images"], rows)


def write(
  summary: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  output: files.Path,
) -> None:
  """Write the files of an evaluation.

  Args:
    summary: from `summarize`.
    rows: of each image, for `predictions.csv`.
    output: folder.

  Raises:
    UserError: a file cannot be written.
  """
  names = [each["class"] for each in summary["per_class"]]
  confusion = [
    [name, *map(int, row)] for name, row in zip(names, summary["confusion"])
  ]
  cells = lambda table: [list(table[0]), *(list(x.values()) for x in table)]
  for name, table in (
    ("per_class.csv", cells(summary["per_class"])),
    ("confusion.csv", [["true class", *names], *confusion]),
    ("predictions.csv", cells(rows)),
  ):
    files.write(output / name, _to_csv(table))
  files.write_json(output / "evaluation.json", summary)
  evaluation_figure.confusion(
    summary["confusion"], names, output / "confusion.png"
  )
  style.save(
    evaluation_figure.calibration(summary["calibration"]),
    output / "calibration.png",
  )


def _to_csv(rows: Sequence[Sequence[Any]]) -> bytes:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  for row in rows:
    nan = lambda x: isinstance(x, float) and math.isnan(x)
    writer.writerow(["" if nan(x) else x for x in row])
  return text.getvalue().encode(errors="surrogateescape")
