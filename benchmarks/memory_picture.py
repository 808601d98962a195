"""Draws accuracy against the memory of a training step, a point a method.

  python -m benchmarks.memory_picture memory.json comparison.csv picture.png

memory.json is of `benchmarks.tpu_memory --methods --json`; comparison.csv is
the `compare.csv` of a comparison, whose backbone may be another one.
"""

import csv
import json
import sys

from matplotlib import figure as figure_lib

GIB = 2**30


def points(memory: str, comparison: str) -> list[tuple[str, float, float]]:
  """Method, GiB (temporary and arguments) and accuracy in percent, if known."""
  with open(memory) as file:
    rows = {row["step"]: row for row in json.load(file)["rows"]}
  with open(comparison, newline="") as file:
    accuracy = {
        row["method"]: float(row["accuracy_percent"])
        for row in csv.DictReader(file)
    }
  size = lambda row: (row["temp_bytes"] + row["argument_bytes"]) / GIB
  return [
      (name, size(row), accuracy[name.split(",")[0]])
      for name, row in rows.items()
      if name.split(",")[0] in accuracy and not row["exceeds"]
  ]


def main() -> None:
  memory, comparison, picture = sys.argv[1:]
  figure = figure_lib.Figure(figsize=(8, 5), layout="constrained", dpi=150)
  ax = figure.subplots()
  for name, gib, accuracy in points(memory, comparison):
    fill = "w" if name.endswith("remat") else "C0"
    ax.scatter(gib, accuracy, facecolors=fill, edgecolors="C0")
    ax.annotate(name, (gib, accuracy), (4, 4), fontsize=8,
                textcoords="offset points")  # fmt: skip
  ax.set_xscale("log")
  ax.margins(x=0.15)
  ax.set_xlabel("memory of a training step, GiB a chip")
  ax.set_ylabel("test accuracy, %")
  figure.savefig(picture)


if __name__ == "__main__":
  main()
