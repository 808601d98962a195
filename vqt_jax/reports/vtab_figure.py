"""Picture of all tasks of VTAB-1k."""

from collections.abc import Iterator, Sequence
import os
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax.data import vtab as vtab_lib
from vqt_jax.reports import figures
from vqt_jax.reports import published
from vqt_jax.reports import style as style_lib
from vqt_jax.reports import vtab_summary

# Markers of published rows, and what they look like in a text.
_SHAPES = {"s": "□", "v": "▽", "^": "△", "D": "◇"}


def vtab(summary: dict[str, Any], path: str | os.PathLike) -> None:
  """Draw all VTAB-1k tasks and their means, with published numbers behind."""
  figure, panels = style_lib.figure_of(16, 6.4), list(_panels(summary))
  *groups, means = (len(labels) for _, labels, *_ in panels)
  axes = figure.subplots(
    1, len(panels), sharey=True, width_ratios=[*groups, 1 + means]
  )
  for ax, (title, *panel) in zip(axes, panels):
    _columns(ax, *panel)
    ax.set_title(title, loc="left")
  axes[-1].set_facecolor("#f5f7fa")
  _scale(axes[0])
  axes[0].set_ylabel("test accuracy")
  _vtab_words(figure, axes[0], summary)
  style_lib.save(figure, path)


def drawn_alone(
  summary: dict[str, Any],
) -> list[tuple[str, figures.matplotlib.figure.Figure]]:
  """Return (title, figure) of each group of tasks, and of the means."""
  found = []
  for title, *panel in _panels(summary):
    figure = style_lib.figure_of(*style_lib.ALONE)
    ax = figure.subplots()
    _columns(ax, *panel)
    _scale(ax)
    names = [each.replace("\n", " ") for each in panel[0].values()]
    ax.set_xticks(ax.get_xticks(), names, fontsize=8, rotation=40, ha="right")
    found.append((title[0].upper() + title[1:], figure))
  return found


def marks() -> list[tuple[str, str]]:
  """Return (mark, name) of each published row that is named in the figures."""
  return [(_SHAPES[_mark(row)[0]], row.method) for row in published.familiar()]


def _panels(
  summary: dict[str, Any],
) -> Iterator[tuple[str, dict[str, str], dict[str, Any], list[Any]]]:
  """Yield title, labels of columns, our accuracies and published ones."""
  tasks, rows = vtab_lib.VTAB, published.ROWS
  ours = {n: t["test_accuracy"] for n, t in summary["tasks"].items()}
  for group in vtab_lib.GROUPS:
    names = [name for name in tasks if tasks[name].group == group]
    labels = {name: name.replace("_", "\n") for name in names}
    yield group, labels, ours, [row.accuracy for row in rows]
  labels = {
    name: word.replace(" ", "\n") if name in vtab_lib.GROUPS else word
    for name, word in vtab_summary.labels(summary).items()
  }
  theirs = [vtab_summary.same_tasks(row, summary) for row in rows]
  theirs = [{n: m["mean"] for n, m in means.items()} for means in theirs]
  yield "means over", labels, summary["means"], theirs


def _scale(ax: Any) -> None:
  ax.set_ylim(0, 1.1)
  ax.set_yticks(np.linspace(0, 1, 6))
  ax.yaxis.set_major_formatter(style_lib.percent_axis())


def _columns(
  ax: Any,
  labels: dict[str, str],
  ours: dict[str, Any],
  theirs: Sequence[dict[str, float | None]],
) -> None:
  """Draw a column per task or mean: ours in front, published ones behind."""
  names = list(labels)
  x = np.arange(len(names))
  for row, found in zip(published.ROWS, theirs):
    values = np.array([found[name] for name in names], float)
    shape = _mark(row)
    if shape:
      ax.plot(x, values, shape[0], **shape[1])
    else:
      ax.hlines(
        values, x - 0.22, x + 0.22, color=style_lib.FAINT, lw=0.8, alpha=0.6
      )
  for i, name in enumerate(names):
    if name not in ours or ours[name]["mean"] is None:
      ax.text(
        i,
        1.04,
        "missing",
        color=style_lib.FAINT,
        ha="center",
        va="bottom",
        fontsize=8,
      )
      continue
    mean = ours[name]["mean"]
    std = accuracy_lib.spread(ours[name]) if "std" in ours[name] else None
    ax.errorbar(
      i,
      mean,
      yerr=std,
      fmt="o",
      color=style_lib.COLOURS[0],
      markersize=9,
      markeredgecolor="white",
      capsize=4,
      linewidth=1.5,
      zorder=4,
    )
    ax.text(
      i,
      1.04,
      f"{100 * mean:.1f}",
      color=style_lib.COLOURS[0],
      ha="center",
      va="bottom",
      fontweight="bold",
      fontsize=9,
    )
  ax.set_xticks(x, list(labels.values()), fontsize=7)
  ax.set_xlim(-0.6, len(names) - 0.4)
  ax.tick_params(length=0)
  ax.grid(axis="y")


def _mark(row: published.Row) -> tuple[str, dict[str, Any]] | None:
  """Return marker and style of a named published row; None: a dash."""
  names = published.FAMILIAR
  if row.source is not published.BENCH or row.method not in names:
    return None
  style = {
    "color": style_lib.INK,
    "markersize": 5.5,
    "markerfacecolor": "white",
    "markeredgewidth": 0.9,
    "alpha": 0.75,
  }
  return list(_SHAPES)[names.index(row.method)], style


def _vtab_words(figure: Any, ax: Any, summary: dict[str, Any]) -> None:
  """Write the title, the line below it, and the legend."""
  means, words = summary["means"], vtab_summary.labels(summary)
  method = summary["method"]
  averages = ", ".join(
    f"{100 * means[name]['mean']:.1f} % mean of {words[name]}"
    for name in (vtab_summary.OF_GROUPS, vtab_summary.OF_TASKS)
  )
  tests = [task["test_accuracy"] for task in summary["tasks"].values()]
  style_lib.write_title(
    figure,
    f"{style_lib.METHODS.get(method, method)} on VTAB-1k: {averages}\n",
    f"{summary['backbone']}   {accuracy_lib.over_seeds(tests)}"
    f"   protocol: {summary['protocol']}",
    0.945,
  )
  handles = [
    figures.matplotlib.lines.Line2D(
      [],
      [],
      marker="o",
      linestyle="",
      color=style_lib.COLOURS[0],
      markersize=9,
      markeredgecolor="white",
      label="ours",
    )
  ]
  for row in published.familiar():
    shape, style = _mark(row)
    handles.append(
      figures.matplotlib.lines.Line2D(
        [], [], marker=shape, linestyle="", label=row.method, **style
      )
    )
  handles.append(
    figures.matplotlib.lines.Line2D(
      [], [], color=style_lib.FAINT, linewidth=1, label="other methods"
    )
  )
  figure.legend(
    handles=handles,
    loc="outside lower left",
    ncols=len(handles),
    frameon=False,
    fontsize=9,
    title="All but ours: published, "
    f"{published.BENCH.backbone} ({published.BENCH.name},"
    f" {published.STUDY.name}); protocols differ",
    title_fontsize=9,
    alignment="left",
  )
