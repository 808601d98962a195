"""Draws accuracy against the memory of a training step, a point a method.

  python -m benchmarks.memory_picture memory.json comparison.csv picture.png

memory.json is of `benchmarks.tpu_memory --methods --json`, of which the first
slice is taken; comparison.csv is the `compare.csv` of a comparison, whose
backbone may be another one. A hollow point is the method with its blocks
computed again for the gradient.
"""

import csv
import json
import sys

from vqt_jax.reports import compare_figure
from vqt_jax.reports import style

GIB = 2**30


def points(
  memory: str, comparison: str
) -> list[tuple[str, float, float, float | None]]:
  """Method, accuracy in percent, GiB (temporary and arguments), with remat.

  The most accurate first; those of which both files know.
  """
  size = lambda row: (row["temp_bytes"] + row["argument_bytes"]) / GIB
  with open(memory) as file:
    rows = json.load(file)["rows"]
  steps = [row for row in rows if row["topology"] == rows[0]["topology"]]
  fits = {row["step"]: size(row) for row in steps if not row["exceeds"]}
  plain = {name.split(",")[0]: name for name in fits if "remat" not in name}
  again = {name.split(",")[0]: name for name in fits if "remat" in name}
  with open(comparison, newline="") as file:
    rows = [
      (r["method"], float(r["accuracy_percent"])) for r in csv.DictReader(file)
    ]
  return [
    (name, accuracy, fits[plain[name]], fits.get(again.get(name)))
    for name, accuracy in sorted(rows, key=lambda row: -row[1])
    if name in plain
  ]


def main() -> None:
  memory, comparison, picture = sys.argv[1:]
  found = points(memory, comparison)
  figure = style.figure_of(9, 5)
  ax = figure.subplots()
  for number, (name, accuracy, gib, remat) in enumerate(found, start=1):
    kind = compare_figure.kind(name)
    colour, mark = compare_figure.KINDS[kind], compare_figure.MARKS[kind]
    label = f"{number}  {style.METHODS.get(name, name)}"
    if remat:
      ax.plot([remat, gib], [accuracy] * 2, color=style.FAINT, lw=0.6)
      ax.plot(remat, accuracy, mark, mfc="white", mec=colour)
    ax.plot(gib, accuracy, mark, color=colour, label=label, ls="")
  ax.set_xscale("log")
  ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
  ax.set_xticks(ticks, map("{:g}".format, ticks))
  ax.minorticks_off()
  ax.grid()
  title = "Test accuracy, %, against memory of a training step, GiB a chip"
  ax.set_title(title, loc="left")
  figure.legend(loc="outside right upper", frameon=False, fontsize=9)
  figure.draw_without_rendering()
  sizes = [gib for _, _, gib, _ in found]
  runs = [
    {"test_accuracy": {"mean": a, "per_seed": {}}} for _, a, _, _ in found
  ]
  compare_figure.number_points(ax, runs, sizes)
  figure.set_layout_engine("none")
  style.save(figure, picture)


if __name__ == "__main__":
  main()
