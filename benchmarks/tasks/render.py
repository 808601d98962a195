"""Write small image classification tasks as TFDS folders.

  python -m benchmarks.tasks.render DIR [--tasks=dev] [--seed=0]

--tasks  "dev", "report", "all" (the default), or names, separated by commas

DIR/TASK/1.1.SEED/ gets 1,000 training images, of which the first 800 and the
last 200 have every class equally often, and 2,000 test images; a config reads
them with task=TASK and data_dir=DIR (the newest version: the largest seed).
Images depend on task and seed only, and on how Pillow draws. What is there
already is kept.
"""

import argparse
from collections.abc import Iterator, Mapping
import os
import sys
from typing import Any

import tensorflow_datasets as tfds

from benchmarks.tasks import catalogue
from benchmarks.tasks import drawing
from vqt_jax import errors

# Of the drawings: a change that anyone can see has another number.
VERSION = "1.1"


def render(
  name: str,
  data_dir: str | os.PathLike,
  seed: int = 0,
  counts: Mapping[str, int] = catalogue.PARTS,
) -> None:
  """Write a task into a TFDS folder, unless it is there.

  Args:
    name: of the task.
    data_dir: TFDS folder.
    seed: of all images, from 0.
    counts: images of each part.
  """
  scene = catalogue.SCENES[name]
  parts = {"train": ("train", "val"), "test": ("test",)}
  builder = tfds.dataset_builders.AdhocBuilder(
    name=name,
    version=f"{VERSION}.{seed}",
    features=tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(drawing.SIZE, drawing.SIZE, 3)),
        "label": tfds.features.ClassLabel(num_classes=scene.num_classes),
      }
    ),
    split_datasets={
      split: _examples(name, parts[split], counts, seed) for split in parts
    },
    data_dir=os.fspath(data_dir),
    description=f"{scene.draw.__doc__} Rendered with seed {seed}.",
    disable_shuffling=True,  # Stored in the order of the parts.
  )
  builder.download_and_prepare()


def _examples(
  name: str, parts: tuple[str, ...], counts: Mapping[str, int], seed: int
) -> Iterator[tuple[int, dict[str, Any]]]:
  key = 0
  for part in parts:
    labels = catalogue.labels(name, part, counts[part], seed)
    for index, label in enumerate(labels):
      image = catalogue.draw(name, part, index, int(label), seed)
      yield key, {"image": image, "label": int(label)}
      key += 1


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("data_dir", metavar="DIR")
  parser.add_argument("--tasks", default="all")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  tfds.disable_progress_bar()
  try:
    for name in catalogue.find(options.tasks):
      render(name, options.data_dir, options.seed)
      print(f"{options.data_dir}/{name}/{VERSION}.{options.seed}")
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
