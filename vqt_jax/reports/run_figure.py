"""Picture of one run: its search, training and test."""

from collections.abc import Callable, Sequence
import os
from typing import Any

import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import results as results_lib
from vqt_jax.reports import figures
from vqt_jax.reports import style


def report(results: dict[str, Any], path: str | os.PathLike) -> None:
  """Draw one run: search, training, test, and the search of protocol=best."""
  panels = _panels(results)
  rows = -(-len(panels) // 3)
  figure = style.figure_of(5 * -(-len(panels) // rows), 4.2 * rows)
  # Rows of nearly the same length, each as wide as the picture.
  strips = np.atleast_1d(figure.subfigures(rows, 1, hspace=0.06))
  for strip, some in zip(strips, np.array_split(panels, rows)):
    axes = strip.subplots(1, len(some), squeeze=False)[0]
    for panel, ax in zip(some, axes):
      panel(ax, results)
  test = results["test_accuracy"]
  style.write_title(
    figure,
    f"{style.method_name(results)} on {results['task']}:"
    f" {accuracy_lib.format_mean(test, 1, '±')} %\n",
    f"95 % interval of {test['images']:,} images:"
    f" {accuracy_lib.format_interval(test)}   {results['backbone']}"
    f"   {results['trained_parameters']:,} trained parameters"
    f"   {results['device']}",
    1 - 0.075 / rows,
  )
  figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
  style.save(figure, path)


def drawn_alone(results: dict[str, Any]) -> tuple[list[Any], list[Any]]:
  """Return (title, figure) of each panel: of the search; of training and test.

  Grids are left out, as pages have them as tables.
  """
  found = [], []
  for panel in _panels(results):
    if panel not in (_search, _beyond):
      figure = style.figure_of(*style.ALONE)
      panel(ax := figure.subplots(), results)
      title = ax.get_title("left")
      ax.set_title("", loc="left")
      is_search = panel in (_penalties, _finalists, _keep_fractions)
      found[0 if is_search else 1].append((title, figure))
  return found


def _panels(results: dict[str, Any]) -> list[Callable[[Any, Any], None]]:
  training = _penalties if results.get("solved") else _training
  panels = [training, _tested if len(results["tested"]) > 1 else _test]
  if results["search"]:
    panels.insert(0, _search)
  if results["best"]:
    panels += [_beyond] * any(x["extended"] for x in _tried(results))
    panels.append(_finalists)
  if _fractions(results):
    panels.append(_keep_fractions)
  if any(tested["kept_share"] for tested in results["tested"]):
    panels.append(_kept_share)
  return panels


def _search(ax: Any, results: dict[str, Any]) -> None:
  """Draw val accuracy of every setting; the chosen one is framed."""
  search = results["search"]
  accuracy = {
    (run["lr"], run["weight_decay"]): None if i in search["diverged"] else value
    for i, (run, value) in enumerate(
      zip(search["runs"], search["val_accuracy"])
    )
  }
  chosen = search["runs"][search["chosen"]]
  _heat_map(ax, accuracy, (chosen["lr"], chosen["weight_decay"]))
  ax.set_title("Search: accuracy on val, %", loc="left")


def _beyond(ax: Any, results: dict[str, Any]) -> None:
  """Draw the grid that was extended last, and frame its best on val.

  Values that were added have labels in blue.
  """
  tried = _tried(results)
  alike = lambda x: [
    x.get(key) for key in ("num_queries", "query_dropout", "normalize")
  ]
  last = [x for x in tried if x["extended"]][-1]
  shown = [x for x in tried if alike(x) == alike(last)]
  place = lambda x: (x["lr"], x["weight_decay"])
  accuracy = {place(x): x["val_accuracy"] for x in shown}
  _heat_map(ax, accuracy, min(accuracy, key=lambda p: (-(accuracy[p] or 0), p)))
  ticks = (ax.get_xticklabels(), ax.get_yticklabels())
  for labels, *values in zip(ticks, zip(*map(place, shown))):
    given = {v for v, x in zip(*values, shown) if not x["extended"]}
    for label, value in zip(labels, sorted(set(*values))):
      label.set_color(style.INK if value in given else style.COLOURS[0])
  count = sum(x["extended"] for x in tried)
  queries = f", T={last['num_queries']}" if "num_queries" in last else ""
  norm = "" if last.get("normalize", True) else ", not normalised"
  ax.set_title(f"{count} beyond the grid: val{queries}{norm}, %", loc="left")


def _tried(results: dict[str, Any]) -> list[dict[str, Any]]:
  """Return all settings of protocol=best; [] where they were not recorded."""
  return results["best"].get("tried") or []


def _heat_map(
  ax: Any,
  accuracy: dict[tuple[float, float], float | None],
  framed: tuple[float, float],
) -> None:
  """Draw accuracy over (learning rate, weight decay); None: it diverged."""
  rates, decays = (sorted(set(values)) for values in zip(*accuracy))
  table = np.full((len(decays), len(rates)), np.nan)
  place = lambda lr, decay: (decays.index(decay), rates.index(lr))
  for setting, value in accuracy.items():
    if value is not None:
      table[place(*setting)] = value
  low, high = np.nanmin(table), np.nanmax(table)
  ax.imshow(
    table,
    "Blues",
    vmin=low - 0.15 * (high - low) - 1e-6,
    vmax=high + 0.6 * (high - low) + 1e-6,
    aspect="auto",
  )
  small = {"fontsize": 8} if len(rates) > 6 else {}
  for setting, value in accuracy.items():
    text = "diverged" if value is None else f"{100 * value:.1f}"
    y, x = place(*setting)
    ax.text(x, y, text, ha="center", va="center", color=style.INK, **small)
  y, x = place(*framed)
  ax.add_patch(
    figures.matplotlib.patches.Rectangle(
      (x - 0.5, y - 0.5),
      1,
      1,
      fill=False,
      edgecolor=style.COLOURS[1],
      linewidth=2.5,
      clip_on=False,
      zorder=3,
    )
  )
  ax.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates], **small)
  ax.set_yticks(range(len(decays)), [f"{decay:.3g}" for decay in decays])
  ax.set(xlabel="learning rate, as used", ylabel="weight decay")
  ax.tick_params(length=0)
  ax.spines[:].set_visible(False)


def _training(ax: Any, results: dict[str, Any]) -> None:
  """Draw loss (left axis) and accuracy (right axis) of every seed."""
  history = results["seeds"]["history"]
  epochs = np.arange(1, len(history) + 1)
  other = ax.twinx()
  sides = (
    (ax, "loss", style.COLOURS[0]),
    (other, "accuracy", style.COLOURS[1]),
  )
  for axes, name, colour in sides:
    values = np.array([epoch[name] for epoch in history], float)
    axes.plot(epochs, values, color=colour, alpha=0.35, linewidth=0.9)
    axes.plot(epochs, values.mean(axis=1), color=colour, linewidth=2)
    axes.set_ylabel(name, color=colour)
    axes.tick_params(axis="y", colors=colour)
    axes.set_ylim(bottom=0)
  other.set_ylim(0, 1)
  other.yaxis.set_major_formatter(style.percent_axis())
  other.spines["left"].set_visible(False)
  ax.xaxis.set_major_locator(
    figures.matplotlib.ticker.MaxNLocator(integer=True)
  )
  ax.set(xlabel="epoch", xlim=(1, max(2, len(history))))
  ax.grid(axis="y")
  ax.set_title("Training: each seed, and their mean", loc="left")


def _penalties(ax: Any, results: dict[str, Any]) -> None:
  """Draw loss (left axis) and accuracy (right) of each penalty and seed."""
  other = ax.twinx()
  sides = (
    (ax, "loss", style.COLOURS[0]),
    (other, "accuracy", style.COLOURS[1]),
  )
  for solved in results["solved"]:
    tried = [each for each in solved["tried"] if each["loss"] is not None]
    penalties = [each["penalty"] for each in tried]
    for axes, name, colour in sides:
      axes.plot(
        penalties, [x[name] for x in tried], color=colour, linewidth=1.2
      )
      at = solved["penalty"], solved[name]
      axes.plot(*at, "D", color=colour, markersize=7)
  for axes, name, colour in sides:
    axes.set_ylabel(name, color=colour)
    axes.tick_params(axis="y", colors=colour)
  other.yaxis.set_major_formatter(style.percent_axis())
  other.set_ylim(top=min(other.get_ylim()[1], 1.01))
  other.spines["left"].set_visible(False)
  ax.set_xscale("log")
  ax.set(xlabel="penalty, relative to the features")
  ax.grid(axis="y")
  how = results_lib.how_judged(results["solved"][0])
  ax.set_title(f"Head: {how}; the chosen (◆)", loc="left")


def _test(ax: Any, results: dict[str, Any]) -> None:
  """Draw test accuracy of every seed, of all together, mean and spread."""
  test = results["test_accuracy"]
  shown = dict(test["per_seed"])
  if together := results.get("test_ensemble_accuracy"):
    shown["together"] = together["mean"]
  values, x = list(shown.values()), np.arange(len(shown))
  std = accuracy_lib.spread(test) or 0.0
  ax.axhspan(
    test["mean"] - std,
    test["mean"] + std,
    color=style.COLOURS[0],
    alpha=0.12,
    linewidth=0,
  )
  ax.axhline(test["mean"], color=style.COLOURS[0], linewidth=1.5)
  count = len(test["per_seed"])
  ax.plot(x[:count], values[:count], "o", color=style.COLOURS[0], markersize=8)
  ax.plot(x[count:], values[count:], "D", color=style.COLOURS[1], markersize=8)
  for i, value in enumerate(values):
    above = value >= test["mean"]
    ax.annotate(
      f"{100 * value:.1f}",
      (i, value),
      (0, 8 if above else -8),
      textcoords="offset points",
      ha="center",
      color=style.INK,
      va="bottom" if above else "top",
    )
  ax.set_xticks(x, shown)
  spread = max(np.ptp(values), 2 * std, 0.01)
  middle = test["mean"]
  ax.set_ylim(middle - 1.3 * spread, min(middle + 1.3 * spread, 1.01))
  ax.set_xlim(-0.6, len(values) - 0.4)
  ax.yaxis.set_major_formatter(style.percent_axis(1))
  ax.grid(axis="y")
  ax.set_xlabel("seed")
  ax.set_title(f"Test accuracy, {test['images']:,} images", loc="left")


def _tested(ax: Any, results: dict[str, Any]) -> None:
  """Draw test accuracy of all candidates; the last one is the result."""
  names = []
  for y, tested in enumerate(results["tested"]):
    last = y == len(results["tested"]) - 1
    _seeds(ax, tested, y, style.COLOURS[0] if last else style.FAINT)
    name = style.candidate_name(tested).replace(", ", ",\n")
    size, seconds = tested["trained_parameters"], tested["training_seconds"]
    names.append(f"{name}\n{size:,} trained\n{seconds:,.0f} s to train")
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.xaxis.set_major_formatter(style.percent_axis(1))
  ax.xaxis.set_major_locator(_few_ticks())
  ax.margins(x=0.15)
  ax.grid(axis="x")
  images = results["test_accuracy"]["images"]
  ax.set_title(f"Test accuracy, {images:,} images", loc="left")


def _finalists(ax: Any, results: dict[str, Any]) -> None:
  """Draw accuracy of the finalists on val and in all folds."""
  found = results["best"]
  rank = lambda f: -f["cv_accuracy"]
  for y, each in enumerate(sorted(found["finalists"], key=rank)):
    chosen = all(
      each[k] == found["chosen"][k] for k in style.SETTING if k in each
    )
    if each["val_accuracy"] is not None:
      ax.plot(each["val_accuracy"], y, "o", color=style.FAINT, markersize=6)
    colour = style.COLOURS[1] if chosen else style.COLOURS[0]
    ax.plot(each["cv_accuracy"], y, "D", color=colour, markersize=7)
  names = _settings(sorted(found["finalists"], key=rank))
  ax.set_yticks(range(len(names)), names, fontsize=8)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.xaxis.set_major_formatter(style.percent_axis(1))
  ax.xaxis.set_major_locator(_few_ticks())
  ax.margins(x=0.1)
  ax.grid(axis="x")
  ax.set_title(
    f"Finalists of {found['searched']}: {found['folds']} folds (◆), val (●)",
    loc="left",
  )


def _few_ticks() -> Any:
  """Return a locator of ticks that labels with one decimal tell exactly."""
  return figures.matplotlib.ticker.MaxNLocator(5, steps=(1, 2, 5, 10))


def _settings(found: Sequence[dict[str, Any]]) -> list[str]:
  """Return names of settings, just long enough to tell them apart."""
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
  """Return the last comparison of several fractions of features, or None."""
  for name in ("best", "selection"):
    found = results.get(name)
    if found and len(found["keep_fractions"]) > 1:
      return found
  return None


def _keep_fractions(ax: Any, results: dict[str, Any]) -> None:
  """Draw accuracy on val, or in all folds, over the fraction of features."""
  found = _fractions(results)
  shares, y = zip(*(f.values() for f in found["keep_fractions"]))
  x = range(len(shares))
  folds, chosen = "folds" in found, found["chosen"]
  new = len(x) - folds  # In the folds, all features are without a new head.
  ax.plot(x[:new], y[:new], "D-", color=style.COLOURS[0], markersize=7)
  ax.plot(x[new:], y[new:], "D", color=style.COLOURS[0], markersize=7)
  chosen = shares.index(chosen["keep_fraction"] if folds else chosen)
  ax.plot(x[chosen], y[chosen], "D", color=style.COLOURS[1], markersize=9)
  for place in zip(x, y):
    ax.annotate(
      f"{100 * place[1]:.1f}",
      place,
      (0, 9),
      textcoords="offset points",
      ha="center",
      color=style.INK,
    )
  ax.set_xticks(x, [f"{100 * share:g}" for share in shares])
  ax.yaxis.set_major_formatter(style.percent_axis(1))
  ax.margins(0.12, 0.25)
  ax.grid(axis="y")
  first = " (100: the head as first trained)" if folds else ""
  ax.set_xlabel(f"features kept, %{first}")
  where = (
    "in folds" if "cv_accuracy" in found["keep_fractions"][0] else "on val"
  )
  ax.set_title(f"Chosen setting: accuracy {where}", loc="left")


def _kept_share(ax: Any, results: dict[str, Any]) -> None:
  """Draw the share in use of the final feature and of each block's."""
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
      label=style.candidate_name(each),
      color=style.COLOURS[0] if last else style.FAINT,
    )
  if len(tested) > 1:
    ax.legend(frameon=False, fontsize=8, loc="lower left")
  step = -(-blocks // 12)
  places = [*range(step, blocks + 1, step), blocks + 1]
  ax.set_xticks(places, [*places[:-1], "final"])
  ax.yaxis.set_major_formatter(style.percent_axis())
  ax.set_ylim(0, 1)
  ax.grid(axis="y")
  ax.set_xlabel("block")
  ax.set_title("Features kept, mean of the seeds", loc="left")


def _seeds(ax: Any, result: dict[str, Any], y: float, colour: str) -> None:
  """Draw one row: every seed, with mean and standard deviation above."""
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
    f"{accuracy_lib.format_mean(test, 1, '±')} %",
    (test["mean"], y - 0.08),
    (0, 9),
    textcoords="offset points",
    ha="center",
    color=style.INK,
  )
