"""Colours, names and file format that all pictures share."""

from __future__ import annotations

import io
import os
from typing import Any
import warnings

from vqt_jax.reports import figures
from vqt_jax.runtime import files

INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#bf812d", "#35978f")
METHODS = {
  "vqt": "VQT",
  "head2toe": "Head2Toe",
  "linear": "linear probe",
  "instant": "instant",
  "finetune": "full fine-tuning",
  "bitfit": "BitFit",
  "partial": "partial fine-tuning",
  "vpt_shallow": "VPT-shallow",
  "vpt_deep": "VPT-deep",
  "adapter": "adapter",
  "adaptformer": "AdaptFormer",
  "lora": "LoRA",
  "ssf": "SSF",
  "vqt+vpt_deep": "VQT + VPT-deep",
  "vqt+adaptformer": "VQT + AdaptFormer",
}
# What a run tests, by its name in `results.json`.
CANDIDATES = {
  "all": "all features",
  "selected": "selected features",
  "best_all": "best setting, all features",
  "best_selected": "best setting, selected features",
}
SETTING = ("num_queries", "lr", "weight_decay", "query_dropout", "normalize")


def method_name(results: dict[str, Any]) -> str:
  name = METHODS.get(results["method"], results["method"])
  if results["num_queries"]:
    many = "queries" if results["num_queries"] > 1 else "query"
    name += f", {results['num_queries']} {many} per block"
  return name


def candidate_name(tested: dict[str, Any]) -> str:
  return CANDIDATES.get(tested["name"], tested["name"])


def percent_axis(
  decimals: int = 0,
) -> figures.matplotlib.ticker.PercentFormatter:
  return figures.matplotlib.ticker.PercentFormatter(1.0, decimals, symbol=" %")


def figure_of(width: float, height: float) -> figures.matplotlib.figure.Figure:
  """Create a figure of a size in inches, without pyplot's global state."""
  return figures.matplotlib.figure.Figure(
    (width, height), dpi=130, layout="constrained", facecolor="white"
  )


def write_title(
  figure: figures.matplotlib.figure.Figure, title: str, below: str, y: float
) -> None:
  """Write the title of a figure, and a line that begins at height `y`."""
  figure.suptitle(
    title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK
  )
  figure.text(0.01, y, below, color=FAINT, va="top")


def save(
  figure: figures.matplotlib.figure.Figure, path: str | os.PathLike
) -> None:
  for ax in figure.axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color(FAINT)
    for line in ax.get_xgridlines() + ax.get_ygridlines():
      line.set_color(GRID)
    ax.set_axisbelow(True)
    ax.title.set_color(INK)
  content = io.BytesIO()
  with warnings.catch_warnings():  # Of letters that the font lacks.
    warnings.filterwarnings("ignore", "Glyph .* missing")
    figure.savefig(content, format="png")
  files.write(files.path(path), content.getvalue())
