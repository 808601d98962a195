"""Contact sheets of the rendered tasks.

  python -m benchmarks.tasks.sheet FOLDER [--seed=0]

Writes FOLDER/tasks.png, a row of six images per task, and FOLDER/TASK.png, six
images per class.
"""

import argparse
import pathlib

from matplotlib import figure
import numpy as np

from benchmarks.tasks import catalogue
from benchmarks.tasks import drawing

COLUMNS = 6


def sheet(rows: dict[str, list[np.ndarray]], path: pathlib.Path) -> None:
  """Draw rows of images with their names into a PNG file."""
  size = (1.05 * COLUMNS + 1, 1.05 * len(rows))
  drawn = figure.Figure(figsize=size, layout="constrained")
  axes = drawn.subplots(len(rows), COLUMNS, squeeze=False)
  for (name, images), row in zip(rows.items(), axes):
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for image, each in zip(images, row):
      each.imshow(image)
      each.set(xticks=[], yticks=[])
  drawn.savefig(path, dpi=drawing.SIZE)


def _classes(name: str, seed: int) -> dict[str, list[np.ndarray]]:
  """Return class -> images of it."""
  return {
    str(label): [
      catalogue.draw(name, "train", label * COLUMNS + i, label, seed)
      for i in range(COLUMNS)
    ]
    for label in range(catalogue.SCENES[name].num_classes)
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  options.folder.mkdir(parents=True, exist_ok=True)
  rows = {}
  for name in catalogue.SCENES:
    classes = _classes(name, options.seed)
    sheet(classes, options.folder / f"{name}.png")
    step = len(classes) / COLUMNS
    rows[name] = [classes[str(int(i * step))][i] for i in range(COLUMNS)]
  sheet(rows, options.folder / "tasks.png")


if __name__ == "__main__":
  main()
