"""Stages, their results, and the files that keep these.

The result of a finished stage, with the weights that later ones need, lies in
`<workdir>/stages/<name>.safetensors`, which appears at once.
"""

from collections.abc import Sequence
import dataclasses
import statistics
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import array_files
from vqt_jax.runtime import files
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial as trial_lib

SUFFIX = ".safetensors"
_HISTORY = ("loss", "accuracy")


@dataclasses.dataclass(frozen=True)
class Stage:
  """Trials to train on the same examples, and the examples that judge them.

  Attributes:
    name: names the stage's file and its rows in metrics.jsonl.
    label: short name on the terminal.
    tuner: of all trials.
    trials: trained side by side, R of them.
    trial_noun: a trial of this stage on the terminal, e.g. "setting".
    split: split to train on.
    rows: rows of the split to train on; None: all.
    judge: (split, rows) whose accuracy is wanted, or None.
    trains: parts of the variables that train: "tuner", "head" or both.
    frozen_parts: the other parts, leaves (R, ...).
    lasso: weight of the group lasso on the head's rows.
    feature_mask: (R, F), 1 for features in use, else 0; None: all in use.
    min_finite: trials whose loss must stay finite; others may diverge. None:
      all of them.
    keeps_weights: whether later stages need the trained variables.
    solver: "ridge", "selected ridge" or "logistic" if the heads are computed,
      see `exact`; "" if they are trained by gradients.
    fractions: of the features, that the solver "selected ridge" tries.
  """

  name: str
  label: str
  tuner: tuner_lib.Tuner
  trials: tuple[trial_lib.Trial, ...]
  trial_noun: str
  split: str = "trainval"
  rows: np.ndarray | None = None
  judge: tuple[str, np.ndarray | None] | None = None
  trains: tuple[str, ...] = tuner_lib.TRAINED
  frozen_parts: dict[str, Any] = dataclasses.field(default_factory=dict)
  lasso: float = 0.0
  feature_mask: np.ndarray | None = None
  min_finite: int | None = None
  keeps_weights: bool = True
  solver: str = ""
  fractions: tuple[float, ...] = ()

  @property
  def must_stay_finite(self) -> int:
    """Number of trials whose loss must stay finite."""
    return len(self.trials) if self.min_finite is None else self.min_finite

  def settings(
    self, class_weights: np.ndarray | None = None
  ) -> step_lib.Settings:
    """Settings of all trials, as the compiled step takes them.

    Args:
      class_weights: (C,) float32, of the loss; None: all classes weigh 1.
    """
    if class_weights is not None:
      class_weights = np.tile(class_weights, (len(self.trials), 1))
    of = lambda name: np.array([getattr(each, name) for each in self.trials])
    return step_lib.Settings(
      lr=of("lr").astype(np.float32),
      weight_decay=of("weight_decay").astype(np.float32),
      query_dropout=of("query_dropout").astype(np.float32),
      normalize=of("normalize"),
      frozen_parts=self.frozen_parts,
      feature_mask=self.feature_mask,
      class_weights=class_weights,
    )


def settings_stage(
  name: str,
  label: str,
  tuner: tuner_lib.Tuner,
  trials: tuple[trial_lib.Trial, ...],
  judge: tuple[str, np.ndarray | None],
  **changes: Any,
) -> Stage:
  """Return a stage that compares settings, any of which may diverge."""
  changes = {"min_finite": 0, "keeps_weights": False, **changes}
  return Stage(name, label, tuner, trials, "setting", judge=judge, **changes)


@dataclasses.dataclass
class StageResult:
  """The result of a stage.

  Attributes:
    history: per epoch {"loss": per trial, "accuracy": per trial}.
    seconds: training time.
    diverged: indices of trials whose loss stopped being finite.
    accuracy: of each trial on `Stage.judge`, 0 if it diverged; None if the
      stage has no `judge`.
    variables: {"tuner", "head"}, numpy leaves (R, ...), if they are kept.
    side_by_side: number of trials that trained at the same time.
    epoch_seconds: median wall time of an epoch divided by `side_by_side`,
      without the first epoch, which compiles; None if there was no other.
    step_bytes: memory of the compiled step, see `step.step_bytes`.
    peak_bytes: peak memory of the run so far; None if unknown.
    solved: of each trial how its head was computed, see `exact.solve`; None if
      it was trained by gradients.
  """

  history: list[dict[str, list[float]]]
  seconds: float
  diverged: list[int]
  accuracy: list[float] | None
  variables: Any = None
  side_by_side: int = 1
  epoch_seconds: float | None = None
  step_bytes: int | None = None
  peak_bytes: int | None = None
  solved: list[dict[str, Any]] | None = None


@dataclasses.dataclass
class Progress:
  """Progress of a stage; saved as JSON with every checkpoint.

  Attributes:
    epoch: finished epochs.
    step: finished steps of the next epoch.
    sums: of that epoch so far, [losses, correct examples], each per trial.
    history: per finished epoch {"loss": per trial, "accuracy": per trial}.
    seconds: training time so far.
    diverged: trial -> epoch in which its loss stopped being finite.
    epoch_seconds: wall time of every epoch but the first after each start,
      which compiles.
    step_bytes: memory of the compiled step; None if unknown.
    peak_bytes: peak memory of the run so far; None if unknown.
  """

  epoch: int = 0
  step: int = 0
  sums: list[list[float]] = dataclasses.field(default_factory=list)
  history: list[dict[str, list[float]]] = dataclasses.field(
    default_factory=list
  )
  seconds: float = 0.0
  diverged: dict[str, int] = dataclasses.field(default_factory=dict)
  epoch_seconds: list[float] = dataclasses.field(default_factory=list)
  step_bytes: int | None = None
  peak_bytes: int | None = None


@dataclasses.dataclass
class ResumePoint:
  """The stage that a checkpoint belongs to, and its progress; JSON-able."""

  stage: str = ""
  progress: Progress = dataclasses.field(default_factory=Progress)

  def __post_init__(self):
    if isinstance(self.progress, dict):
      self.progress = files.from_json(Progress, self.progress)


def packs(stage: Stage, size: int) -> list[Stage]:
  """Split a stage into packs of at most `size` trials."""
  if len(stage.trials) <= size:
    return [stage]
  return [_part(stage, i, size) for i in range(0, len(stage.trials), size)]


def _part(stage: Stage, start: int, size: int) -> Stage:
  """Return a pack of a stage, named after the trials that are in it.

  The name keeps a run from mistaking one pack for another when it is resumed on
  devices that hold more or fewer trials.
  """
  some = slice(start, min(start + size, len(stage.trials)))
  return dataclasses.replace(
    stage,
    name=f"{stage.name}_{some.start + 1}-{some.stop}",
    trials=stage.trials[some],
    frozen_parts=jax.tree.map(lambda x: x[some], stage.frozen_parts),
    feature_mask=None
    if stage.feature_mask is None
    else stage.feature_mask[some],
    min_finite=None if stage.min_finite is None else 0,
  )


def join_packs(
  parts: Sequence[StageResult], starts: Sequence[int]
) -> StageResult:
  """Join the results of the packs of a stage; `starts` are first trials."""
  together = lambda *lists: [x for each in lists for x in each]
  return StageResult(
    history=[
      {name: together(*(e[name] for e in epoch)) for name in epoch[0]}
      for epoch in zip(*(part.history for part in parts))
    ],
    seconds=sum(part.seconds for part in parts),
    diverged=[s + i for s, part in zip(starts, parts) for i in part.diverged],
    accuracy=parts[0].accuracy and together(*(part.accuracy for part in parts)),
    variables=parts[0].variables
    and jax.tree.map(
      lambda *x: np.concatenate(x), *(part.variables for part in parts)
    ),
    side_by_side=max(part.side_by_side for part in parts),
    epoch_seconds=median_per_trial(
      [p.epoch_seconds for p in parts if p.epoch_seconds is not None]
    ),
    step_bytes=max(p.step_bytes or 0 for p in parts) or None,
  )


def median_per_trial(seconds: Sequence[float], trials: int = 1) -> float | None:
  """Median of `seconds`, which `trials` trials share; None if empty."""
  return statistics.median(seconds) / trials if seconds else None


def write_result(path: files.Path, result: StageResult) -> None:
  flat = flax.traverse_util.flatten_dict(result.variables or {}, sep="/")
  info = dataclasses.asdict(dataclasses.replace(result, variables=None))
  files.write(path, array_files.to_safetensors(flat, {"outcome": info}))


def read_result(path: files.Path, stage: Stage) -> StageResult:
  """Read the file of a finished stage; raise a `UserError` if damaged."""
  with files.explain_damage(
    path, "Delete it; the same command repeats this stage."
  ):
    flat, info = array_files.read_safetensors(
      path, lambda shapes, info: _check_shapes(shapes, stage)
    )
    for name, array in flat.items():
      if array.dtype != np.float32:
        raise ValueError(f"{name} holds {array.dtype}, not float32")
    result = files.from_json(StageResult, info["outcome"])
    _check_lengths(result, stage)
  if flat:  # An empty dict has no leaves to save.
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    result.variables = {"tuner": {}, **variables}
  return result


def _check_lengths(result: StageResult, stage: Stage) -> None:
  """Raise a `ValueError` if a result is not one of the trials of a stage."""
  trials = len(stage.trials)
  lists = [row[name] for row in result.history for name in _HISTORY]
  if (result.accuracy is None) != (stage.judge is None):
    raise ValueError("expected accuracies exactly if the stage is judged")
  if result.accuracy is not None:
    lists.append(result.accuracy)
  if any(len(each) != trials for each in lists) or not all(
    0 <= i < trials for i in result.diverged
  ):
    raise ValueError(f"expected {trials} trials")


def _check_shapes(shapes: array_files.Shapes, stage: Stage) -> None:
  """Raise a `ValueError` if these are not the variables of a stage."""
  expected = {}
  if stage.keeps_weights:
    leaves = flax.traverse_util.flatten_dict(stage.tuner.shapes(), sep="/")
    expected = {
      name: (len(stage.trials), *leaf.shape) for name, leaf in leaves.items()
    }
  if shapes != expected:
    raise ValueError(f"expected weights {expected}, found {shapes}")
