"""Pictures of results: one run, all tasks of VTAB, and what queries see."""

from collections.abc import Sequence
import io
import os
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import files
from vqt_jax import published
from vqt_jax import vtab_summary
from vqt_jax.data import vtab as vtab_lib
from vqt_jax.figures import matplotlib

INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#bf812d", "#35978f")
METHODS = {
  "vqt": "VQT",
  "head2toe": "Head2Toe",
  "linear": "linear probe",
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


def report(results: dict[str, Any], path: str | os.PathLike) -> None:
  """One run: search, training, test, and what a further search has found.

  Args:
    results: contents of `results.json`.
    path: the picture (PNG).
  """
  panels = [_training, _tested if len(results["tested"]) > 1 else _test]
  if results["search"]:
    panels.insert(0, _search)
  if results["best"]:
    panels.append(_finalists)
  if _fractions(results):
    panels.append(_keep_fractions)
  if any(tested["kept_share"] for tested in results["tested"]):
    panels.append(_kept_share)
  columns = 2 if len(panels) == 4 else min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure = figure_of(5 * columns, 4.2 * rows)
  axes = figure.subplots(rows, columns, squeeze=False).flatten()
  for panel, ax in zip(panels, axes):
    panel(ax, results)
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  test = results["test_accuracy"]
  figure.suptitle(
    f"{_name(results)} on {results['task']}:"
    f" {accuracy_lib.told(test, 1, '±')} %\n",
    x=0.01,
    ha="left",
    fontsize=14,
    fontweight="bold",
    color=INK,
  )
  figure.text(
    0.01,
    1 - 0.075 / rows,
    f"95 % interval of {test['images']:,} images:"
    f" {accuracy_lib.told_bounds(test)}   {results['backbone']}"
    f"   {results['trained_parameters']:,} trained parameters"
    f"   {results['device']}",
    color=FAINT,
    va="top",
  )
  figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
  save(figure, path)


def vtab(summary: dict[str, Any], path: str | os.PathLike) -> None:
  """All VTAB-1k tasks and their means, with published numbers behind.

  Args:
    summary: contents of the `results.json` of `task="all"`.
    path: the picture (PNG).
  """
  figure = figure_of(16, 6.4)
  tasks = vtab_lib.VTAB
  groups = [
    [name for name in tasks if tasks[name].group == group]
    for group in vtab_lib.GROUPS
  ]
  words = vtab_summary.labels(summary)
  axes = figure.subplots(
    1, 4, sharey=True, width_ratios=[*map(len, groups), 1 + len(words)]
  )
  ours = {n: t["test_accuracy"] for n, t in summary["tasks"].items()}
  rows = published.ROWS
  theirs = [vtab_summary.same_tasks(row, summary) for row in rows]
  for ax, group, names in zip(axes, vtab_lib.GROUPS, groups):
    lines = [name.replace("_", "\n") for name in names]
    _columns(ax, names, lines, ours, [row.accuracy for row in rows])
    ax.set_title(group, loc="left")
  lines = [
    word.replace(" ", "\n") if name in vtab_lib.GROUPS else word
    for name, word in words.items()
  ]
  _columns(
    axes[3],
    list(words),
    lines,
    summary["means"],
    [{n: m["mean"] for n, m in means.items()} for means in theirs],
  )
  axes[3].set_title("means over", loc="left")
  axes[3].set_facecolor("#f5f7fa")
  axes[0].set_ylim(0, 1.1)
  axes[0].set_yticks(np.linspace(0, 1, 6))
  axes[0].yaxis.set_major_formatter(_percent())
  axes[0].set_ylabel("test accuracy")
  _vtab_words(figure, axes[0], summary)
  save(figure, path)


def _columns(
  ax: Any,
  names: Sequence[str],
  labels: Sequence[str],
  ours: dict[str, Any],
  theirs: Sequence[dict[str, float | None]],
) -> None:
  """A column per task or mean: ours in front, theirs behind.

  Args:
    ax: the axes.
    names: of the columns.
    labels: what is written below them.
    ours: name -> "mean" and perhaps "std"; what is missing is left empty.
    theirs: name -> accuracy, for each of `published.ROWS`.
  """
  x = np.arange(len(names))
  for row, found in zip(published.ROWS, theirs):
    values = np.array([found[name] for name in names], float)
    shape = _mark(row)
    if shape:
      ax.plot(x, values, shape[0], **shape[1])
    else:
      ax.hlines(values, x - 0.22, x + 0.22, color=FAINT, lw=0.8, alpha=0.6)
  for i, name in enumerate(names):
    if name not in ours or ours[name]["mean"] is None:
      ax.text(
        i,
        1.04,
        "missing",
        color=FAINT,
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
      color=COLOURS[0],
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
      color=COLOURS[0],
      ha="center",
      va="bottom",
      fontweight="bold",
      fontsize=9,
    )
  ax.set_xticks(x, labels, fontsize=7)
  ax.set_xlim(-0.6, len(names) - 0.4)
  ax.tick_params(length=0)
  ax.grid(axis="y")


def _mark(row: published.Row) -> tuple[str, dict[str, Any]] | None:
  """How a published row that is named stands out; None: a dash."""
  names = published.FAMILIAR
  if row.source is not published.BENCH or row.method not in names:
    return None
  style = {
    "color": INK,
    "markersize": 5.5,
    "markerfacecolor": "white",
    "markeredgewidth": 0.9,
    "alpha": 0.75,
  }
  return "sv^D"[names.index(row.method)], style


def _vtab_words(figure: Any, ax: Any, summary: dict[str, Any]) -> None:
  """Title, the line under it, and the legend."""
  means, words = summary["means"], vtab_summary.labels(summary)
  figure.suptitle(
    f"{METHODS.get(summary['method'], summary['method'])} on VTAB-1k: "
    + ", ".join(
      f"{100 * means[name]['mean']:.1f} % mean of {words[name]}"
      for name in (vtab_summary.OF_GROUPS, vtab_summary.OF_TASKS)
    )
    + "\n",
    x=0.01,
    ha="left",
    fontsize=14,
    fontweight="bold",
    color=INK,
  )
  tests = [task["test_accuracy"] for task in summary["tasks"].values()]
  figure.text(
    0.01,
    0.945,
    f"{summary['backbone']}   {accuracy_lib.over_seeds(tests)}"
    f"   protocol: {summary['protocol']}",
    color=FAINT,
    va="top",
  )
  handles = [
    matplotlib.lines.Line2D(
      [],
      [],
      marker="o",
      linestyle="",
      color=COLOURS[0],
      markersize=9,
      markeredgecolor="white",
      label="ours",
    )
  ]
  for row in published.familiar():
    shape, style = _mark(row)
    handles.append(
      matplotlib.lines.Line2D(
        [], [], marker=shape, linestyle="", label=row.method, **style
      )
    )
  handles.append(
    matplotlib.lines.Line2D(
      [], [], color=FAINT, linewidth=1, label="other methods"
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


def attention(
  images: np.ndarray,
  maps: np.ndarray,
  labels: Sequence[str],
  path: str | os.PathLike,
  most_blocks: int = 12,
) -> None:
  """Rows of images with what the queries of each block attend to.

  Colour is attention relative to an even spread over the patches, on one scale
  for all maps.

  Args:
    images: (n, height, width, 3), 0..1.
    maps: (n, L, rows, columns) attention on the patches, not negative.
    labels: n captions of the rows.
    path: the picture (PNG).
    most_blocks: maps in a row; of deeper models evenly spaced blocks.
  """
  depth = maps.shape[1]
  blocks = np.unique(
    np.linspace(0, depth - 1, min(depth, most_blocks)).round().astype(int)
  )
  even = maps.sum(axis=(2, 3), keepdims=True) / maps[0, 0].size
  ratio = maps / np.maximum(even, 1e-12)
  top = max(float(np.quantile(ratio, 0.995)), 1.5)
  shades = matplotlib.cm.ScalarMappable(
    matplotlib.colors.Normalize(0, top), "inferno"
  )
  columns = 1 + len(blocks)
  figure = figure_of(1.15 * columns + 1.2, 1.15 * len(images) + 1.0)
  axes = figure.subplots(len(images), columns, squeeze=False)
  extent = (0, images.shape[2], images.shape[1], 0)
  for row, (image, label) in enumerate(zip(images, labels)):
    axes[row, 0].imshow(image, extent=extent)
    grey = np.repeat(0.7 * image.mean(axis=-1, keepdims=True), 3, axis=-1)
    axes[row, 0].set_ylabel(
      label, rotation=0, ha="right", va="center", color=INK
    )
    for column, block in enumerate(blocks, start=1):
      ax = axes[row, column]
      ax.imshow(grey, extent=extent)
      ax.imshow(_heat(shades, ratio[row, block]), extent=extent)
      if row == 0:
        ax.set_title(f"block {block + 1}", fontsize=9)
  for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
  bar = figure.colorbar(shades, ax=axes, shrink=0.6, aspect=30, pad=0.01)
  bar.set_label("attention / even spread")
  bar.outline.set_visible(False)
  save(figure, path)


def _search(ax: Any, results: dict[str, Any]) -> None:
  """Val accuracy of every setting as a table of colours; the chosen framed."""
  search = results["search"]
  runs, accuracy = search["runs"], search["val_accuracy"]
  rates = sorted({run["lr"] for run in runs})
  decays = sorted({run["weight_decay"] for run in runs})
  table = np.full((len(decays), len(rates)), np.nan)
  place = lambda run: (
    decays.index(run["weight_decay"]),
    rates.index(run["lr"]),
  )
  for i, (run, value) in enumerate(zip(runs, accuracy)):
    if value is not None and i not in search["diverged"]:
      table[place(run)] = value
  low, high = np.nanmin(table), np.nanmax(table)
  ax.imshow(
    table,
    "Blues",
    vmin=low - 0.15 * (high - low) - 1e-6,
    vmax=high + 0.6 * (high - low) + 1e-6,
    aspect="auto",
  )
  for (y, x), value in np.ndenumerate(table):
    text = "diverged" if np.isnan(value) else f"{100 * value:.1f}"
    ax.text(x, y, text, ha="center", va="center", color=INK)
  y, x = place(runs[search["chosen"]])
  ax.add_patch(
    matplotlib.patches.Rectangle(
      (x - 0.5, y - 0.5),
      1,
      1,
      fill=False,
      edgecolor=COLOURS[1],
      linewidth=2.5,
      clip_on=False,
      zorder=3,
    )
  )
  ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
  ax.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
  ax.set(xlabel="learning rate, as used", ylabel="weight decay")
  ax.tick_params(length=0)
  ax.spines[:].set_visible(False)
  ax.set_title("Search: accuracy on val, %", loc="left")


def _training(ax: Any, results: dict[str, Any]) -> None:
  """Loss (left axis) and accuracy (right axis) of every seed."""
  history = results["seeds"]["history"]
  epochs = np.arange(1, len(history) + 1)
  other = ax.twinx()
  sides = ((ax, "loss", COLOURS[0]), (other, "accuracy", COLOURS[1]))
  for axes, name, colour in sides:
    values = np.array([epoch[name] for epoch in history], float)
    axes.plot(epochs, values, color=colour, alpha=0.35, linewidth=0.9)
    axes.plot(epochs, values.mean(axis=1), color=colour, linewidth=2)
    axes.set_ylabel(name, color=colour)
    axes.tick_params(axis="y", colors=colour)
    axes.set_ylim(bottom=0)
  other.set_ylim(0, 1)
  other.yaxis.set_major_formatter(_percent())
  other.spines["left"].set_visible(False)
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  ax.set(xlabel="epoch", xlim=(1, max(2, len(history))))
  ax.grid(axis="y")
  ax.set_title("Training: each seed, and their mean", loc="left")


def _test(ax: Any, results: dict[str, Any]) -> None:
  """Test accuracy of every seed, their mean and standard deviation."""
  test = results["test_accuracy"]
  values = list(test["per_seed"].values())
  x = np.arange(len(values))
  std = accuracy_lib.spread(test) or 0.0
  ax.axhspan(
    test["mean"] - std,
    test["mean"] + std,
    color=COLOURS[0],
    alpha=0.12,
    linewidth=0,
  )
  ax.axhline(test["mean"], color=COLOURS[0], linewidth=1.5)
  ax.plot(x, values, "o", color=COLOURS[0], markersize=8)
  for i, value in enumerate(values):
    above = value >= test["mean"]
    ax.annotate(
      f"{100 * value:.1f}",
      (i, value),
      (0, 8 if above else -8),
      textcoords="offset points",
      ha="center",
      color=INK,
      va="bottom" if above else "top",
    )
  ax.set_xticks(x, test["per_seed"])
  spread = max(np.ptp(values), 2 * std, 0.01)
  middle = test["mean"]
  ax.set_ylim(middle - 1.3 * spread, min(middle + 1.3 * spread, 1.01))
  ax.set_xlim(-0.6, len(values) - 0.4)
  ax.yaxis.set_major_formatter(_percent(1))
  ax.grid(axis="y")
  ax.set_xlabel("seed")
  ax.set_title(f"Test accuracy, {test['images']:,} images", loc="left")


def _tested(ax: Any, results: dict[str, Any]) -> None:
  """Test accuracy of all that was tested; the result is the last one."""
  names = []
  for y, tested in enumerate(results["tested"]):
    last = y == len(results["tested"]) - 1
    _seeds(ax, tested, y, COLOURS[0] if last else FAINT)
    name = CANDIDATES[tested["name"]].replace(", ", ",\n")
    size, seconds = tested["trained_parameters"], tested["training_seconds"]
    names.append(f"{name}\n{size:,} trained\n{seconds:,.0f} s to train")
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.xaxis.set_major_formatter(_percent(1))
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
  ax.margins(x=0.15)
  ax.grid(axis="x")
  images = results["test_accuracy"]["images"]
  ax.set_title(f"Test accuracy, {images:,} images", loc="left")


def _finalists(ax: Any, results: dict[str, Any]) -> None:
  """Accuracy on val, on which they were found, and in all folds."""
  found = results["best"]
  rank = lambda f: -f["cv_accuracy"]
  for y, each in enumerate(sorted(found["finalists"], key=rank)):
    chosen = all(each[k] == found["chosen"][k] for k in SETTING if k in each)
    if each["val_accuracy"] is not None:
      ax.plot(each["val_accuracy"], y, "o", color=FAINT, markersize=6)
    colour = COLOURS[1] if chosen else COLOURS[0]
    ax.plot(each["cv_accuracy"], y, "D", color=colour, markersize=7)
  names = _settings(sorted(found["finalists"], key=rank))
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.xaxis.set_major_formatter(_percent(1))
  ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
  ax.margins(x=0.1)
  ax.grid(axis="x")
  ax.set_title(
    f"Finalists of {found['searched']}: {found['folds']} folds (◆), val (●)",
    loc="left",
  )


def _settings(found: Sequence[dict[str, Any]]) -> list[str]:
  """Names of settings, as long as it takes to tell them apart."""
  dropout = len({each.get("query_dropout") for each in found}) > 1
  names = []
  for each in found:
    parts = [f"lr {each['lr']:g}", f"decay {each['weight_decay']:g}"]
    if "num_queries" in each:
      parts.insert(0, f"T={each['num_queries']}")
      parts += ["\nnot normalised"] * (not each["normalize"])
    if dropout:
      parts.append(f"dropout {each['query_dropout']:g}")
    name = ", ".join(parts).replace(", \n", "\n")
    names.append(name + "\n(full protocol's choice)" * each["full"])
  return names


def _fractions(results: dict[str, Any]) -> dict[str, Any] | None:
  """What has compared several fractions of features last, if anything has."""
  for name in ("best", "selection"):
    found = results.get(name)
    if found and len(found["keep_fractions"]) > 1:
      return found
  return None


def _keep_fractions(ax: Any, results: dict[str, Any]) -> None:
  """Accuracy on val, or in all folds, over the fraction that is kept."""
  found = _fractions(results)
  shares, y = zip(*(f.values() for f in found["keep_fractions"]))
  x = range(len(shares))
  folds, chosen = "folds" in found, found["chosen"]
  new = len(x) - folds  # In the folds, all features are without a new head.
  ax.plot(x[:new], y[:new], "D-", color=COLOURS[0], markersize=7)
  ax.plot(x[new:], y[new:], "D", color=COLOURS[0], markersize=7)
  chosen = shares.index(chosen["keep_fraction"] if folds else chosen)
  ax.plot(x[chosen], y[chosen], "D", color=COLOURS[1], markersize=9)
  for place in zip(x, y):
    ax.annotate(
      f"{100 * place[1]:.1f}",
      place,
      (0, 9),
      textcoords="offset points",
      ha="center",
      color=INK,
    )
  ax.set_xticks(x, [f"{100 * share:g}" for share in shares])
  ax.yaxis.set_major_formatter(_percent(1))
  ax.margins(0.12, 0.25)
  ax.grid(axis="y")
  first = " (100: the head as first trained)" if folds else ""
  ax.set_xlabel(f"features kept, %{first}")
  where = f"in {found['folds']} folds" if folds else "on val"
  ax.set_title(f"Chosen setting: accuracy {where}", loc="left")


def _kept_share(ax: Any, results: dict[str, Any]) -> None:
  """What is kept of the final feature and of each block's."""
  tested = [t for t in results["tested"] if t["kept_share"]]
  blocks = max(len(t["kept_share"]) for t in tested) - 1
  width = 0.8 / len(tested)
  for i, each in enumerate(tested):
    final, *of_blocks = each["kept_share"]
    x = np.arange(1, blocks + 2) + (i - (len(tested) - 1) / 2) * width
    last = each is results["tested"][-1]
    ax.bar(
      x,
      [*of_blocks, final],
      0.9 * width,
      label=CANDIDATES[each["name"]],
      color=COLOURS[0] if last else FAINT,
    )
  if len(tested) > 1:
    ax.legend(frameon=False, fontsize=8, loc="lower left")
  step = -(-blocks // 12)
  places = [*range(step, blocks + 1, step), blocks + 1]
  ax.set_xticks(places, [*places[:-1], "final"])
  ax.yaxis.set_major_formatter(_percent())
  ax.set_ylim(0, 1)
  ax.grid(axis="y")
  ax.set_xlabel("block")
  ax.set_title("Features kept, mean of the seeds", loc="left")


def _seeds(ax: Any, result: dict[str, Any], y: float, colour: str) -> None:
  """One row: every seed, and mean with standard deviation above."""
  test = result["test_accuracy"]
  values = list(test["per_seed"].values())
  ax.plot(values, [y + 0.16] * len(values), "o", color=colour, alpha=0.45)
  ax.errorbar(
    test["mean"],
    y - 0.08,
    xerr=accuracy_lib.spread(test),
    fmt="D",
    color=colour,
    capsize=4,
    markersize=7,
    linewidth=2,
  )
  ax.annotate(
    f"{accuracy_lib.told(test, 1, '±')} %",
    (test["mean"], y - 0.08),
    (0, 9),
    textcoords="offset points",
    ha="center",
    color=INK,
  )


def _heat(shades: matplotlib.cm.ScalarMappable, values: np.ndarray) -> Any:
  """Colours (rows, columns, RGBA), the clearer the smaller the value."""
  colours = shades.to_rgba(values)
  colours[..., 3] = np.clip(shades.norm(values), 0, 1) ** 0.5
  return colours


def _name(results: dict[str, Any]) -> str:
  name = METHODS.get(results["method"], results["method"])
  if results["num_queries"]:
    many = "queries" if results["num_queries"] > 1 else "query"
    name += f", {results['num_queries']} {many} per block"
  return name


def _percent(decimals: int = 0) -> matplotlib.ticker.PercentFormatter:
  return matplotlib.ticker.PercentFormatter(1.0, decimals, symbol=" %")


def figure_of(width: float, height: float) -> matplotlib.figure.Figure:
  """A figure without pyplot, so that nothing global is touched. Inches."""
  return matplotlib.figure.Figure(
    (width, height), dpi=130, layout="constrained", facecolor="white"
  )


def save(figure: matplotlib.figure.Figure, path: str | os.PathLike) -> None:
  for ax in figure.axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color(FAINT)
    for line in ax.get_xgridlines() + ax.get_ygridlines():
      line.set_color(GRID)
    ax.set_axisbelow(True)
    ax.title.set_color(INK)
  content = io.BytesIO()
  figure.savefig(content, format="png")
  files.write(files.path(path), content.getvalue())
