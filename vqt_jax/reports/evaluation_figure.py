"""Pictures of an evaluation: confusion matrix and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from typing import Any

import numpy as np

from vqt_jax.reports import figures
from vqt_jax.reports import style

MOST_NAMED = 40  # Classes with names on the axes.
MOST_COUNTED = 20  # Classes with numbers in the cells.


def confusion(
  matrix: np.ndarray, classes: Sequence[str], path: str | os.PathLike
) -> None:
  """Draw the share of each true class (rows) that is taken for another.

  Args:
    matrix: (C, C) numbers of images, true by predicted.
    classes: names.
    path: of the picture (PNG).
  """
  count = len(classes)
  share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  side = min(2.5 + 0.35 * count, 12)
  figure = style.figure_of(side + 1, side)
  ax = figure.subplots()
  shades = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
  if count <= MOST_NAMED:
    shown = style.legible(classes)
    short = [c if len(c) <= 24 else f"{c[:23]}…" for c in shown]
    short = [c.replace("$", r"\$") for c in short]
    ax.set_xticks(range(count), short, rotation=90)
    ax.set_yticks(range(count), short)
  numbered = count <= MOST_NAMED and shown != list(classes)
  legend = " (#N: row N of per_class.csv)" if numbered else ""
  ax.set(xlabel="predicted", ylabel=f"true class{legend}")
  if count <= MOST_COUNTED:
    for (row, column), number in np.ndenumerate(matrix):
      if number:
        light = share[row, column] > 0.5
        ax.text(
          column,
          row,
          f"{number:,}",
          ha="center",
          va="center",
          fontsize=8,
          color="white" if light else style.INK,
        )
  bar = figure.colorbar(shades, ax=ax, shrink=0.7)
  bar.set_label("share of the true class")
  bar.ax.yaxis.set_major_formatter(style.percent_axis())
  style.save(figure, path)


def calibration(
  found: Mapping[str, Any],
) -> figures.matplotlib.figure.Figure:
  """Draw accuracy over confidence, and how many images have which confidence.

  Args:
    found: from `evaluation.calibration`.
  """
  bins = found["bins"]
  confidence = [b["confidence"] for b in bins]
  figure = style.figure_of(4.6, 5.2)
  top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
  top.plot([0, 1], [0, 1], color=style.FAINT, linestyle="--", label="ideal")
  top.plot(
    confidence,
    [b["accuracy"] for b in bins],
    "o-",
    clip_on=False,
    color=style.COLOURS[0],
    label=f"error {100 * found['ece']:.1f} %",
  )
  top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
  top.legend(frameon=False)
  bottom.bar(
    confidence, [b["images"] for b in bins], 0.04, color=style.COLOURS[0]
  )
  bottom.set(xlabel="confidence", ylabel="images")
  for axis in (top.xaxis, top.yaxis):
    axis.set_major_formatter(style.percent_axis())
  bottom.yaxis.set_major_locator(
    figures.matplotlib.ticker.MaxNLocator(3, integer=True)
  )
  return figure
