"""Picture of several runs: their accuracy, and against two costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
import math
import os
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.models import readers
from vqt_jax.reports import figures
from vqt_jax.reports import style

KINDS = {
  "reader": style.COLOURS[0],
  "editor": style.COLOURS[1],
  "both": style.COLOURS[2],
}
MARKS = {"reader": "o", "editor": "s", "both": "D"}
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
BYTES = ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))


def draw(summary: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draw the accuracy of every run, best first, and against two costs.

  Runs are numbered; the points of the costs carry these numbers.
  """
  runs = list(summary["runs"].values())
  figure = style.figure_of(14, 2.2 + max(2.6, 0.36 * len(runs)))
  left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
  _ranking(left, runs)
  costs = _costs(runs)
  for ax, cost in zip((middle, right), costs):
    _against(ax, runs, *cost)
  right.sharey(middle)
  right.set_ylabel("")
  _words(figure, summary, runs)
  figure.get_layout_engine().set(wspace=0.06)
  _number(figure, runs, zip((middle, right), (cost[0] for cost in costs)))
  style.save(figure, path)


def drawn_alone(
  summary: Mapping[str, Any],
) -> list[tuple[str, figures.matplotlib.figure.Figure]]:
  """Return (title, figure) of each cost."""
  runs, found = list(summary["runs"].values()), []
  for values, title, unit in _costs(runs):
    figure = style.figure_of(*style.ALONE)
    figure.set_dpi(72)  # That of SVG; numbers are placed in pixels.
    ax = figure.subplots()
    _against(ax, runs, values, "", unit)
    _number(figure, runs, [(ax, values)])
    found.append((title, figure))
  return found


def _costs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str, Any]]:
  """Return values, title and units of each cost."""
  column = lambda name: [run[name] for run in runs]
  return [
    (column("trained_parameters"), "Trained parameters", UNITS),
    (column("peak_bytes"), "Peak memory", BYTES),
  ]


def _number(figure, runs, places) -> None:
  """Number the points of (axes, values), when it is known where they are."""
  figure.draw_without_rendering()
  for ax, values in places:
    number_points(ax, runs, values)
  figure.set_layout_engine("none")


def kind(method: str) -> str:
  """Classify a method: "reader", "editor" or "both"."""
  if method in readers.READERS:
    return "reader"
  return "both" if "+" in method else "editor"


def _ranking(ax: Any, runs: Sequence[Mapping[str, Any]]) -> None:
  """Draw a row per run: name, seeds, mean, standard deviation, interval."""
  names = []
  for y, run in enumerate(runs):
    colour, mark, test = *_look(run), run["test_accuracy"]
    seeds = list(test["per_seed"].values())
    ax.plot(seeds, [y] * len(seeds), "o", color=colour, alpha=0.3, ms=4)
    if bounds := accuracy_lib.bounds(test):
      ax.hlines(y, *bounds, color=colour, alpha=0.25, lw=7)
    ax.errorbar(
      test["mean"],
      y,
      xerr=accuracy_lib.spread(test),
      fmt=mark,
      color=colour,
      ms=6,
      capsize=3,
      markeredgecolor="white",
      zorder=3,
    )
    ax.annotate(
      accuracy_lib.format_mean(test, 1, "±"),
      (1, y),
      (6, 0),
      xycoords=("axes fraction", "data"),
      textcoords="offset points",
      va="center",
      color=style.INK,
      fontsize=9,
      annotation_clip=False,
    )
    name = style.METHODS.get(run["method"], run["method"])
    name = f"{name}{run['details']}".replace("$", r"\$")
    names.append(f"{name}  {y + 1}")
  ax.set_yticks(range(len(runs)), names)
  ax.tick_params(axis="y", length=0)
  ax.set_ylim(len(runs) - 0.4, -0.6)
  ax.xaxis.set_major_formatter(_percent())
  ax.grid(axis="x")
  ax.set_title("Test accuracy, %", loc="left")


def _against(
  ax: Any,
  runs: Sequence[Mapping[str, Any]],
  values: Sequence[float | None],
  title: str,
  units: Any,
) -> None:
  """Draw accuracy over a cost; runs whose cost is unknown are left out."""
  for run, value in zip(runs, values):
    if not value:
      continue
    colour, mark, test = *_look(run), run["test_accuracy"]
    ax.errorbar(
      value,
      test["mean"],
      yerr=accuracy_lib.spread(test),
      fmt=mark,
      color=colour,
      ms=7,
      elinewidth=0.9,
      markeredgecolor="white",
      zorder=3,
    )
  known = [value for value in values if value]
  ax.set_xscale("log")
  if known:
    # At least a factor of four, so that small differences look small; and room
    # for numbers beside the outermost points.
    factor = max(known) / min(known)
    room = max(1.25, math.sqrt(4 / factor), factor**0.07)
    ax.set_xlim(min(known) / room, max(known) * room)
    _ticks(ax, units)
  else:
    ax.text(
      0.5,
      0.5,
      "unknown",
      transform=ax.transAxes,
      ha="center",
      color=style.FAINT,
    )
    ax.set_xticks([])
  ax.margins(y=0.12)
  ax.yaxis.set_major_formatter(_percent())
  ax.grid()
  ax.set_title(title, loc="left")
  ax.set_ylabel("test accuracy, %", color=style.FAINT)


def _ticks(ax: Any, units: Any) -> None:
  """Set ticks at powers, or closer on a short axis; with units."""
  low, high = ax.get_xlim()
  base = 10 if units is UNITS else 2
  decades = math.log(high / low, base)
  if decades < 2 and base == 10:
    places = [n * 10**p for p in range(12) for n in (1, 2, 5)]
  else:
    every = max(1, math.ceil(decades / 4.5))  # Labels need their width.
    first = math.floor(math.log(low, base))
    places = [base ** (first + every * i) for i in range(12)]
  ax.set_xticks([place for place in places if low <= place <= high])
  ax.xaxis.set_minor_locator(figures.matplotlib.ticker.NullLocator())
  ax.xaxis.set_major_formatter(
    figures.matplotlib.ticker.FuncFormatter(lambda x, _: _short(x, units))
  )


def _short(value: float, units: Any) -> str:
  for size, name in units:
    if value >= size:
      return f"{value / size:g}{name}"
  return f"{value:g}"


def number_points(
  ax: Any, runs: Sequence[Mapping[str, Any]], values: Sequence[float | None]
) -> None:
  """Write the runs' numbers beside their points, where there is room."""
  dot = ax.figure.dpi / 72
  to_pixels = ax.transData.transform
  points, taken, whole = {}, [], ax.figure.bbox
  for number, (run, value) in enumerate(zip(runs, values), start=1):
    if value:
      test = run["test_accuracy"]
      at = points[number] = to_pixels((value, test["mean"]))
      std = accuracy_lib.spread(test) or 0.0
      bar = to_pixels((value, test["mean"] + std))[1] - at[1]
      taken += [_box(at, 5 * dot, 5 * dot), _box(at, dot, bar)]
  for number, at in points.items():
    half = (3.2 * len(str(number)) * dot, 4.5 * dot)
    free = (
      spot
      for spot in _around(at, dot)
      if not any(_box(spot, *half).overlaps(box) for box in taken)
      and whole.contains(*(spot - half))
      and whole.contains(*(spot + half))
    )
    spot = next(free, at)
    taken.append(_box(spot, *half))
    offset = (spot - at) / dot
    far = math.hypot(*offset) > 14
    ax.annotate(
      str(number),
      at,
      offset,
      xycoords="figure pixels",
      textcoords="offset points",
      ha="center",
      va="center",
      fontsize=8,
      color=style.INK,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "color": style.FAINT,
        "lw": 0.6,
        "shrinkA": 4,
        "shrinkB": 3,
      }
      if far
      else None,
    )


def _around(at: np.ndarray, dot: float) -> Any:
  """Yield points around a point, in pixels, nearest first."""
  for radius, turn in itertools.product((11, 17, 24, 32, 42), range(12)):
    angle = math.pi * (1 / 4 - turn / 6)
    yield at + radius * dot * np.array([math.cos(angle), math.sin(angle)])


def _box(at: Any, x: float, y: float) -> figures.matplotlib.transforms.Bbox:
  return figures.matplotlib.transforms.Bbox.from_extents(
    at[0] - x, at[1] - y, at[0] + x, at[1] + y
  )


def _look(run: Mapping[str, Any]) -> tuple[str, str]:
  """Return colour and marker of a run."""
  return KINDS[kind(run["method"])], MARKS[kind(run["method"])]


def _words(
  figure: Any, summary: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> None:
  """Write the title, the line below it, and the legend."""
  methods = f"{len(runs)} methods on " if len(runs) > 1 else ""
  seeds = accuracy_lib.over_seeds([run["test_accuracy"] for run in runs])
  differ = ", ".join(summary["differences"])
  backbone = style.backbone_name(summary["backbone"])
  style.write_title(
    figure,
    f"{methods}{summary['task']}\n\n",
    f"{backbone}   {seeds} (bands: 95 % intervals)"
    f"   {summary['device']}"
    + (f"   not all alike in: {differ}" if differ else ""),
    1 - 0.42 / figure.get_figheight(),
  )
  there = {kind(run["method"]) for run in runs}
  if len(there) == 1:
    return
  handles = [
    figures.matplotlib.lines.Line2D(
      [], [], marker=MARKS[name], linestyle="", color=colour, label=name
    )
    for name, colour in KINDS.items()
    if name in there
  ]
  figure.legend(
    handles=handles, loc="outside lower left", ncols=3, frameon=False
  )


def _percent() -> figures.matplotlib.ticker.FuncFormatter:
  return figures.matplotlib.ticker.FuncFormatter(lambda x, _: f"{100 * x:g}")
