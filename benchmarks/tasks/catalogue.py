"""The rendered tasks: what they ask for, and what they are used for.

What is developed or chosen may look at the results of the development tasks
only; the report tasks are of other kinds, and are for the numbers of a report.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from benchmarks.tasks import scenes
from vqt_jax import errors

ROLES = ("dev", "report")
# Images of each part, in stored order; "train" and "val" make the train split.
PARTS = {"train": 800, "val": 200, "test": 2000}


@dataclasses.dataclass(frozen=True)
class Scene:
  """A rendered task.

  Attributes:
    role: of `ROLES`.
    num_classes: labels are 0..num_classes-1.
    draw: (generator, label) -> uint8 (SIZE, SIZE, 3).
  """

  role: str
  num_classes: int
  draw: Callable[[np.random.Generator, int], np.ndarray]


SCENES = {
  "count": Scene("dev", 8, scenes.count),
  "place": Scene("dev", 16, scenes.place),
  "letters": Scene("dev", 26, scenes.letters),
  "textures": Scene("dev", 16, scenes.textures),
  "mirror": Scene("dev", 4, scenes.mirror),
  "angle": Scene("report", 16, scenes.angle),
  "distance": Scene("report", 5, scenes.distance),
  "shapes": Scene("report", 16, scenes.shapes),
  "depth": Scene("report", 8, scenes.depth),
  "fonts": Scene("report", 8, scenes.fonts),
}


def find(names: str, others: Sequence[str] = ()) -> list[str]:
  """Return the tasks of a role, of "all", or with these names.

  Args:
    names: separated by commas.
    others: names of tasks that are not rendered.

  Raises:
    UserError: there is no such task.
  """
  found = []
  for name in names.split(","):
    meant = [n for n, s in SCENES.items() if name in (n, s.role, "all")]
    if not meant and name not in others:
      raise errors.UserError(
        f"No task {name!r}: expected {', '.join(ROLES)}, all, or of"
        f" {', '.join([*SCENES, *others])}."
      )
    found += meant or [name]
  return list(dict.fromkeys(found))


def labels(name: str, part: str, count: int, seed: int) -> np.ndarray:
  """Labels of a part in random order, each equally often, within one; (n,)."""
  number = SCENES[name].num_classes
  return _generator(name, part, seed).permutation(np.arange(count) % number)


def draw(name: str, part: str, index: int, label: int, seed: int) -> np.ndarray:
  """Draw an image of a part; it depends on the arguments only."""
  return SCENES[name].draw(_generator(name, part, seed, 1 + index), label)


def _generator(
  name: str, part: str, seed: int, index: int = 0
) -> np.random.Generator:
  text = [*name.encode(), 0, *part.encode()]
  return np.random.default_rng([seed, index, *text])
