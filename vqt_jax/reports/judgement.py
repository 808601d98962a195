"""Confusion, calibration and images: what runs and evaluations both report.

The sections are in `templates/judgement.html`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vqt_jax.reports import attention_figure
from vqt_jax.reports import evaluation_figure
from vqt_jax.reports import figures
from vqt_jax.reports import html
from vqt_jax.reports import notable

_SMALL = 64  # Pixels of a side; such images are enlarged without smoothing.
_MOST_MISTAKES = 10


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


def confusion(
  pairs: np.ndarray, images: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
  """Return `confusion`, rows of a matrix, and `worst`, frequent mistakes.

  Args:
    pairs: (2, k) true and predicted classes; each pair that occurs, sorted.
    images: (k,) of each pair.
    names: of all classes; of too many there is no matrix.
  """
  sizes = np.bincount(pairs[0], images)
  order = np.argsort(-images, kind="stable")
  worst = [
    {
      "true": names[true],
      "predicted": names[said],
      "images": int(count),
      "share": count / sizes[true],
    }
    for (true, said), count in zip(pairs.T[order], images[order])
    if true != said
  ]
  matrix = None
  if len(names) <= evaluation_figure.MOST_NAMED:
    matrix = np.zeros((len(names),) * 2, int)
    matrix[tuple(pairs)] = images
  return {
    "confusion": None if matrix is None else _rows(matrix, names),
    "worst": worst[:_MOST_MISTAKES],
  }


def _rows(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  return [
    {
      "name": name,
      "number": i + 1,
      "cells": [
        {"images": int(n), "share": f"{s:.3g}"}
        for n, s in zip(matrix[i], share[i])
      ],
    }
    for i, name in enumerate(names)
  ]


def calibration(found: Mapping[str, Any], others: str = "") -> dict[str, Any]:
  """Return `calibration`, a figure, and `calibrated`, what it shows.

  Args:
    found: from `evaluation.calibration`.
    others: what to add to the error.
  """
  return {
    "calibration": html.figure(
      "Accuracy over confidence",
      evaluation_figure.calibration(found),
      "calibration",
    ),
    "calibrated": (
      "Points below the line: the answers are less often right than they are"
      " confident. Expected calibration error:"
      f" {html.percent(found['ece'])} points{others}."
    ),
  }


def gallery(
  pictures: Sequence[Picture], names: Sequence[str]
) -> dict[str, Any]:
  """Return what the template needs to show images and attention.

  Args:
    pictures: all with maps, or none.
    names: of the classes.
  """
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
