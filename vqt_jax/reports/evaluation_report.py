"""The report of an evaluation, report.html."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vqt_jax.reports import attention_figure
from vqt_jax.reports import evaluation_figure
from vqt_jax.reports import figures
from vqt_jax.reports import html
from vqt_jax.reports import notable
from vqt_jax.runtime import files

_SMALL = 64  # Pixels of a side; such images are enlarged without smoothing.


class Picture(NamedTuple):
  """An answer with its image.

  Attributes:
    answer: the answer.
    image: (height, width, 3) in 0..1.
    maps: (L, rows, columns) attention on the patches; None without queries.
  """

  answer: notable.Answer
  image: np.ndarray
  maps: np.ndarray | None


def report(
  path: files.Path,
  summary: Mapping[str, Any],
  pictures: Sequence[Picture],
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
  confusion = np.asarray(summary["confusion"])
  names = [each["class"] for each in summary["per_class"]]
  sums = confusion.sum(axis=1), confusion.diagonal(), confusion.sum(axis=0)
  worst = _worst(confusion, names)
  html.write(
    path,
    "evaluation.html",
    title=title,
    summary=_sentences(summary, worst),
    classes=html.class_rows(names, *(column.tolist() for column in sums)),
    confusion=_matrix(confusion, names),
    worst=worst,
    calibration=html.figure(
      "Accuracy over confidence",
      evaluation_figure.calibration(summary["calibration"]),
      "calibration",
    ),
    calibrated=_calibrated(summary),
    command=command,
    facts=facts,
    **_gallery(pictures, names),
  )


def _sentences(
  summary: Mapping[str, Any], worst: Sequence[Mapping[str, Any]]
) -> list[str]:
  low, high = (html.percent(x) for x in summary["interval"])
  images = summary["images"]
  found = [
    f"{html.percent(summary['accuracy'])} % of {images:,} images are classified"
    f" correctly (95 % interval {low} to {high}; mean of the classes"
    f" {html.percent(summary['balanced_accuracy'])} %)."
  ]
  if worst:
    first = worst[0]
    found.append(
      f"The most frequent mistake is “{first['predicted']}” for"
      f" “{first['true']}”, {first['images']:,} times"
      f" ({html.percent(first['share'])} % of that class)."
    )
  else:
    found.append("There is no mistake.")
  confidence = sum(
    x["images"] * x["confidence"] for x in summary["calibration"]["bins"]
  )
  found.append(
    f"The mean confidence is {html.percent(confidence / images)} %, and it is"
    f" off by {html.percent(summary['calibration']['ece'])} points on average"
    " (expected calibration error)."
  )
  return found


def _calibrated(summary: Mapping[str, Any]) -> str:
  scaled = summary["temperature"]
  return (
    "Points below the line: the answers are less often right than they are"
    " confident. Expected calibration error:"
    f" {html.percent(summary['calibration']['ece'])} points; with a"
    f" temperature of {scaled['value']:.2f}, fitted on half of these images and"
    f" judged on the other, {html.percent(scaled['ece'])}."
  )


def _worst(
  confusion: np.ndarray, names: Sequence[str], most: int = 10
) -> list[dict[str, Any]]:
  """Return the most frequent mistakes, most frequent first."""
  mistakes = confusion * (1 - np.eye(len(names), dtype=int))
  order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
  return [
    {
      "true": names[true],
      "predicted": names[said],
      "images": int(mistakes[true, said]),
      "share": mistakes[true, said] / confusion[true].sum(),
    }
    for true, said in zip(*np.unravel_index(order, mistakes.shape))
    if mistakes[true, said]
  ]


def _matrix(
  confusion: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]] | None:
  """Return the rows of a confusion matrix; None of too many classes."""
  if len(names) > evaluation_figure.MOST_NAMED:
    return None
  share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  return [
    {
      "name": name,
      "number": i + 1,
      "cells": [
        {"images": int(n), "share": f"{s:.3g}"}
        for n, s in zip(confusion[i], share[i])
      ],
    }
    for i, name in enumerate(names)
  ]


def _gallery(
  pictures: Sequence[Picture], names: Sequence[str]
) -> dict[str, Any]:
  """Return what the template needs to show images and attention."""
  found = {"mistakes": [], "hits": [], "blocks": 0}
  maps = [picture.maps for picture in pictures if picture.maps is not None]
  if maps:
    colours, scale = attention_figure.shade(np.stack(maps))
    found |= {
      "blocks": colours.shape[1],
      "legend": attention_figure.LEGEND,
      "scale": _scale(scale),
    }
  for i, (answer, image, _) in enumerate(pictures):
    kind = "hits" if answer.true == answer.predicted else "mistakes"
    found[kind].append(
      {
        "name": answer.name,
        "true": names[answer.true],
        "predicted": names[answer.predicted],
        "confidence": answer.confidence,
        "image": html.thumbnail(image),
        "smooth": min(image.shape[:2]) > _SMALL,
        "maps": [html.overlay(each) for each in colours[i]] if maps else [],
      }
    )
  return found


def _scale(scale: Any) -> dict[str, Any]:
  top = scale.norm.vmax
  colours = scale.to_rgba(np.linspace(0, top, 9))
  to_hex = figures.matplotlib.colors.to_hex
  return {"colours": [to_hex(each) for each in colours], "top": f"{top:.1f}"}
