"""Estimates the time that a run will take, from its first compiled calls.

Nothing is computed for it: the stages ahead are known, and soon after the first
of them has begun, so is the time of its steps. The rest is counted in steps.
What trials share when they train side by side is a constant of this program
(docs/benchmarks.md), not measured in the run. For people's own images there is
a rougher estimate before anything else, from the time of a forward pass.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vqt_jax import data
from vqt_jax.features import examples as examples_lib
from vqt_jax.models import combo
from vqt_jax.runtime import units
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib

ENOUGH = 1.0  # Seconds of steps after which their speed is relied on.
# Cost of what all trials share in a step, in units of the cost that each trial
# adds: reading stored features and starting kernels; live, also the backbone.
# Measured: 20 trials from the store are 2.8 (CPU) and 6.8 (GPU) times faster
# together than one by one, and one is 46 and 3.7 times faster than live. Trials
# of an editor share nothing.
STORED, LIVE = {"cpu": 2.0, "gpu": 9.0}, {"cpu": 140.0, "gpu": 36.0}
FORWARD = 1 / 3  # Share of a step that is not for gradients.
PROBE = 4  # Images of the forward pass that is timed, per device.
# Time to compile a step of training, and of evaluation, in units of the time to
# compile a forward pass (shipped ViT, CPU; from run to run half or twice that).
COMPILE_STEP, COMPILE_EVALUATION = 10, 3


class Forecast:
  """Collects the times of compiled calls and prints one estimate."""

  def __init__(
    self,
    context: setup.RunContext,
    examples: examples_lib.Examples,
    planned: Sequence[stage_lib.Stage],
  ):
    """Count the images of each split."""
    self._context, self._examples, self._planned = context, examples, planned
    self._count = {split: examples.count(split) for split in data.SPLITS}
    self._told = False

  def tell_before(self) -> None:
    """Time a forward pass, and print what the run is expected to take."""
    compiling, each = self._examples.time_forward(PROBE)
    config = self._context.config
    self._live = self._examples.is_live("trainval")
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    share = FORWARD if self._context.tuner.editor else LIVE[kind]
    if self._trains_network:
      share = combo.steps_per_forward(self._context.tuner.config)
    unit = each * config.batch_size / share
    seconds, compiled = {}, set()
    if not self._live:
      seconds["extract"] = compiling + self._count["trainval"] * each
    for stage in self._planned:
      if stage.solver:
        continue  # Little beside the other parts.
      took = self._steps_of(stage) * unit * self._work(stage)
      if _program(stage) not in compiled:
        took += COMPILE_STEP * compiling
      compiled.add(_program(stage))
      if stage.judge:
        took += self._judging(stage, unit) + COMPILE_EVALUATION * compiling
      seconds[stage.label] = seconds.get(stage.label, 0.0) + took
    seconds["test"] = (
      COMPILE_EVALUATION * compiling + self._count["test"] * each
    )
    total = units.format_seconds(sum(seconds.values()))
    self._context.console.note(
      f"{'at least' if config.protocol == 'best' else 'about'} {total} in all:"
      f" {_listed(seconds)}",
      "expected",
    )

  def begin(
    self, stage: stage_lib.Stage, size: int, done: set[str], live: bool
  ) -> None:
    """Note that a pack of `size` trials trains next, after those `done`."""
    self._now, self._size, self._done, self._live = stage, size, done, live
    self._calls = []

  def add_call(self, left: int, steps: int, seconds: float) -> None:
    """Record a finished call; print the estimate when it can be relied on.

    `left` are the steps that are left of the pack. Not a collective call:
    processes call it at different times.
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
    about += f" {units.format_seconds(sum(seconds.values()))} to go"
    if "test" not in seconds:
      about += " before the test"
    self._context.console.note(f"{about}: {_listed(seconds)}", "time")

  def _seconds_left(self, left: int, step: float) -> dict[str, float]:
    """Return the seconds left by label; `step` is the seconds of a step now."""
    now = self._now
    compiling = max(0.0, self._calls[0][1] - step)
    unit = step / self._work(now)
    every = [stage_lib.packs(stage, self._size) for stage in self._planned]
    if now.name not in [pack.name for packs in every for pack in packs]:
      every.insert(0, [now])  # A stage that was not planned.
    seconds, compiled = {}, {_program(now)}
    for packs in every:
      for pack in packs:
        if pack.name in self._done or pack.solver:
          continue
        took = self._judging(pack, unit)
        if pack.name == now.name:
          took += left * step
        else:
          took += self._steps_of(pack) * unit * self._work(pack)
          if _program(pack) not in compiled:
            took += compiling
          compiled.add(_program(pack))
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
    """Return the cost of a step, in units of what one trial adds to it."""
    tuner = stage.tuner
    only_head = "tuner" not in stage.trains
    each = FORWARD if only_head and (tuner.reader.init or tuner.editor) else 1.0
    return self._shared + each * len(stage.trials)

  @property
  def _trains_network(self) -> bool:
    tuner = self._context.tuner
    return tuner.learner.reader.is_network and not tuner.editor

  @property
  def _shared(self) -> float:
    if self._context.tuner.editor:
      return 0.0
    if self._trains_network:
      forward = combo.steps_per_forward(self._context.tuner.config)
      return forward if self._live else 0.0
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    return (LIVE if self._live else STORED)[kind]

  def _image(self, trials: int, unit: float) -> float:
    """Return the seconds that an image takes through the stream of trials."""
    batches = trials * FORWARD if self._context.tuner.editor else self._shared
    return batches * unit / self._context.config.batch_size

  def _judging(self, stage: stage_lib.Stage, unit: float) -> float:
    """Return the seconds of judging; next to none with stored features."""
    if not stage.judge or not self._live:
      return 0.0
    return self._images(*stage.judge) * self._image(len(stage.trials), unit)

  def _test(self, unit: float) -> float | None:
    """Return the seconds of the test; None if no image was seen yet."""
    count = self._count["test"]
    if self._live:
      last = [
        s for s in self._planned if s.name.endswith(("seeds", "selected"))
      ]
      return count * self._image(sum(len(s.trials) for s in last), unit)
    if self._examples.extraction_seconds is None:
      return None
    start, each = self._examples.extraction_seconds
    return start + count * each


def _program(stage: stage_lib.Stage) -> tuple[Any, ...]:
  """Return what decides which compiled step a stage is trained by."""
  return stage.tuner, len(stage.trials), stage.trains, stage.lasso


def _listed(seconds: dict[str, float]) -> str:
  return ", ".join(
    f"{label} {units.format_seconds(value)}"
    for label, value in seconds.items()
    if value >= 0.5
  )
