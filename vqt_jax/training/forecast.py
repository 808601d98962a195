"""About how long a run will take, said once, from the speed of its first calls.

Nothing is computed for it: the stages that are left are known, and so is, soon
after the first of them has begun, how long its steps take. From there it is
counted in steps. What runs side by side share is a figure of this program
rather than of the run, from docs/results.md.
"""

from collections.abc import Sequence
import datetime

import jax
import numpy as np

from vqt_jax import data
from vqt_jax.features import examples as examples_lib
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib

ENOUGH = 1.0  # Seconds of steps, before their speed is relied on.
# What runs side by side share of a step, in what each has of its own: stored
# features that are read, and the start of kernels; live, also the backbone. On
# CPUs 20 from the store are 2.8 times faster than one by one, on GPUs 6.8
# times, and one is 46 and 3.7 times faster than live. Runs of an editor share
# nothing.
STORED, LIVE = {"cpu": 2.0, "gpu": 9.0}, {"cpu": 140.0, "gpu": 36.0}
FORWARD = 1 / 3  # Of a step that also computes gradients.


class Forecast:
  """Hears of a run's calls and says once how long the rest will take."""

  def __init__(
    self,
    context: setup.RunContext,
    examples: examples_lib.Examples,
    planned: Sequence[stage_lib.Stage],
  ):
    """Says nothing yet.

    Args:
      context: the `setup.RunContext`.
      examples: an `Examples`.
      planned: the stages of the protocol, or the first ones of it.
    """
    self._context, self._examples, self._planned = context, examples, planned
    self._count = {split: examples.count(split) for split in data.SPLITS}
    self._told = False

  def begin(
    self, stage: stage_lib.Stage, size: int, done: set[str], live: bool
  ) -> None:
    """Takes in what is about to train.

    Args:
      stage: a pack of a stage's runs.
      size: runs in a pack, of each stage.
      done: names of the packs that an earlier start has finished.
      live: whether the backbone runs in every step.
    """
    self._now, self._size, self._done, self._live = stage, size, done, live
    self._calls = []

  def hear(self, left: int, steps: int, seconds: float) -> None:
    """Takes in a call that is over.

    Each process calls it when it will, so nothing here may ask the others.

    Args:
      left: steps that are left of what trains.
      steps: that the call took.
      seconds: how long.
    """
    if self._told:
      return
    self._calls.append((steps, seconds))
    steps, seconds = map(sum, zip(*self._calls[1:] or [(0, 0)]))
    if steps and (seconds >= ENOUGH or not left):
      self._told = True
      self._tell(self._seconds_left(left, seconds / steps))

  def _tell(self, seconds: dict[str, float]) -> None:
    config = self._context.config
    about = "at least" if config.protocol == "best" else "about"
    about += f" {_duration(sum(seconds.values()))} to go"
    if "test" not in seconds:
      about += " before the test"
    parts = [
      f"{label} {_duration(value)}"
      for label, value in seconds.items()
      if value >= 0.5
    ]
    self._context.console.note(": ".join([about, ", ".join(parts)]), "time")

  def _seconds_left(self, left: int, step: float) -> dict[str, float]:
    """Of each part that is left, by its label; `step` is what one takes now."""
    now = self._now
    compiling = max(0.0, self._calls[0][1] - step)
    unit = step / self._work(now)
    every = [stage_lib.packs(stage, self._size) for stage in self._planned]
    if now.name not in [pack.name for packs in every for pack in packs]:
      every.insert(0, [now])  # The protocol goes on behind what is planned.
    seconds = {}
    for packs in every:
      for pack in packs:
        if pack.name in self._done:
          continue
        took = self._judging(pack, unit)
        if pack.name == now.name:
          took += left * step
        else:
          took += self._steps_of(pack) * unit * self._work(pack)
          took += compiling * (pack is packs[0])  # The others are alike.
        seconds[pack.label] = seconds.get(pack.label, 0.0) + took
    test = self._test(unit)
    return seconds if test is None else seconds | {"test": test}

  def _steps_of(self, stage: stage_lib.Stage) -> int:
    c = self._context.config
    count = self._images(stage.split, stage.rows)
    return c.epochs * -(-count // c.batch_size)

  def _images(self, split: str, rows: np.ndarray | None) -> int:
    return self._count[split] if rows is None else len(rows)

  def _work(self, stage: stage_lib.Stage) -> float:
    """What a step takes, in what a run of its own takes of it."""
    tuner = stage.tuner
    only_head = "tuner" not in stage.trains
    each = FORWARD if only_head and (tuner.has_queries or tuner.editor) else 1.0
    return self._shared + each * len(stage.trials)

  @property
  def _shared(self) -> float:
    if self._context.tuner.editor:
      return 0.0
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    return (LIVE if self._live else STORED)[kind]

  def _image(self, trials: int, unit: float) -> float:
    """Seconds of an image through the stream of so many runs."""
    batches = trials * FORWARD if self._context.tuner.editor else self._shared
    return batches * unit / self._context.config.batch_size

  def _judging(self, stage: stage_lib.Stage, unit: float) -> float:
    """Seconds; of images whose features are kept next to none."""
    if not stage.judge or not self._live:
      return 0.0
    return self._images(*stage.judge) * self._image(len(stage.trials), unit)

  def _test(self, unit: float) -> float | None:
    """Seconds; None if no image was through the backbone in this start."""
    count = self._count["test"]
    if self._live:
      last = [s for s in self._planned if s.name in ("seeds", "selected")]
      return count * self._image(sum(len(s.trials) for s in last), unit)
    if self._examples.extraction_seconds is None:
      return None
    start, each = self._examples.extraction_seconds
    return start + count * each


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
