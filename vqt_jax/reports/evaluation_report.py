"""The report of an evaluation, report.html."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vqt_jax.reports import html
from vqt_jax.reports import judgement
from vqt_jax.runtime import files


def report(
  path: files.Path,
  summary: Mapping[str, Any],
  pictures: Sequence[judgement.Picture],
  title: str,
  command: str,
  facts: Mapping[str, str],
) -> None:
  """Write the report of an evaluation.

  Args:
    path: of the file.
    summary: from `evaluation.summarize`.
    pictures: the most notable answers.
    title: what was judged on which images.
    command: that evaluates again.
    facts: hashes and versions, by name.
  """
  matrix = np.asarray(summary["confusion"])
  names = [each["class"] for each in summary["per_class"]]
  sums = matrix.sum(axis=1), matrix.diagonal(), matrix.sum(axis=0)
  pairs = matrix.nonzero()
  confusion = judgement.confusion(np.stack(pairs), matrix[pairs], names)
  scaled = summary["temperature"]
  html.write(
    path,
    "evaluation.html",
    title=title,
    summary=[
      _accuracy(summary),
      _mistakes(confusion["worst"]),
      _confidence(summary),
    ],
    classes=html.class_rows(names, *(column.tolist() for column in sums)),
    command=command,
    facts=facts,
    **confusion,
    together="",
    matrix_file="confusion.csv",
    **judgement.calibration(
      summary["calibration"],
      f"; with a temperature of {scaled['value']:.2f}, fitted on half of these"
      f" images and judged on the other, {html.percent(scaled['ece'])}",
    ),
    **judgement.gallery(pictures, names),
  )


def _accuracy(summary: Mapping[str, Any]) -> str:
  low, high = (html.percent(x) for x in summary["interval"])
  return (
    f"{html.percent(summary['accuracy'])} % of {summary['images']:,} images are"
    f" classified correctly (95 % interval {low} to {high}; mean of the classes"
    f" {html.percent(summary['balanced_accuracy'])} %)."
  )


def _mistakes(worst: Sequence[Mapping[str, Any]]) -> str:
  if not worst:
    return "There is no mistake."
  first = worst[0]
  return (
    f"The most frequent mistake is “{first['predicted']}” for"
    f" “{first['true']}”, {first['images']:,} times"
    f" ({html.percent(first['share'])} % of that class)."
  )


def _confidence(summary: Mapping[str, Any]) -> str:
  found = summary["calibration"]
  confidence = sum(x["images"] * x["confidence"] for x in found["bins"])
  return (
    f"The mean confidence is {html.percent(confidence / summary['images'])} %,"
    f" and it is off by {html.percent(found['ece'])} points on average"
    " (expected calibration error)."
  )
