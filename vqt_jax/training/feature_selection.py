"""Feature selection as in the official program.

A new head on the frozen queries is trained with a group lasso over the
features, which scores them; another new head is trained on those with the
highest scores. Both train for as long as the first head, at half its rate. If
only the head learns from the features, they train at its rate, as in the
program of Head2Toe.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from vqt_jax.models import head as head_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import stage
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import trial as trial_lib

LASSO = 1e-4
RATE = 0.5  # Factor of the first head's rate, for readers that train.


def compare(
  stages: stages_lib.Stages,
  prefix: str,
  label: str,
  tuner: tuner_lib.Tuner,
  trial: trial_lib.Trial,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **source: Any,
) -> tuple[list[float], float]:
  """Train a trial, then new heads on several fractions of its features.

  The fraction 1 is judged with the trial's own head, which is the result of a
  run without selection.

  Args:
    stages: runs the stages.
    prefix: of the stages' names.
    label: of the first stage on the terminal.
    tuner: of the trial.
    trial: trained first.
    fractions: of features to keep.
    judge: (split, rows) whose accuracy is wanted.
    **source: `split` and `rows` to train on, as of `select`.

  Returns:
    Accuracy of each fraction; seconds of training.
  """
  first, *_ = compared(
    prefix, label, tuner, trial, fractions, judge=judge, **source
  )
  out = stages.run(first)
  fewer = _fewer(fractions)
  _, selected, seconds = select(
    stages,
    prefix,
    tuner,
    (trial,),
    out.variables,
    fewer,
    judge=judge,
    **source,
  )
  accuracy = dict(zip(fewer, selected.accuracy))
  if out.accuracy:
    accuracy[1.0] = out.accuracy[0]
  return [accuracy[f] for f in fractions], out.seconds + seconds


def compared(
  prefix: str,
  label: str,
  tuner: tuner_lib.Tuner,
  trial: trial_lib.Trial,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **source: Any,
) -> tuple[stage.Stage, ...]:
  """Return the stages of `compare`; arguments as there."""
  fewer = _fewer(fractions)
  first = stage.Stage(
    f"{prefix}all",
    label,
    tuner,
    (trial,),
    "setting",
    min_finite=0,
    judge=judge if len(fewer) < len(fractions) else None,
    **source,
  )
  return first, *selecting(
    prefix, tuner, (trial,), fewer, judge=judge, **source
  )


def _fewer(fractions: Sequence[float]) -> list[float]:
  return [fraction for fraction in fractions if fraction < 1]


def select(
  stages: stages_lib.Stages,
  prefix: str,
  tuner: tuner_lib.Tuner,
  trials: tuple[trial_lib.Trial, ...],
  variables: Any,
  fractions: Sequence[float],
  **source: Any,
) -> tuple[np.ndarray, stage.StageResult, float]:
  """Train new heads on fewer features.

  Args:
    stages: runs the stages.
    prefix: of the stages' names.
    tuner: of all trials.
    trials: R trials, as the queries were trained.
    variables: their {"tuner", "head"}, leaves (R, ...).
    fractions: K fractions of features to keep, each tried with each trial.
    **source: `split`, `rows` and `judge`, as of `selecting`.

  Returns:
    The feature mask (R * K, F) of 0 and 1, all fractions of the first trial
    first; the result of the new heads in that order; seconds of training.
  """
  scoring, selection = selecting(prefix, tuner, trials, fractions, **source)
  frozen_parts = {"tuner": variables["tuner"]}
  scored = stages.run(dataclasses.replace(scoring, frozen_parts=frozen_parts))
  scores = np.asarray(head_lib.feature_scores(scored.variables["head"]))
  feature_mask = np.stack(
    [
      head_lib.feature_mask(of_run, fraction)
      for of_run in scores
      for fraction in fractions
    ]
  )
  repeat = lambda x: np.repeat(x, len(fractions), axis=0)
  selected = stages.run(
    dataclasses.replace(
      selection,
      frozen_parts=jax.tree.map(repeat, frozen_parts),
      feature_mask=feature_mask,
    )
  )
  return feature_mask, selected, scored.seconds + selected.seconds


def selecting(
  prefix: str,
  tuner: tuner_lib.Tuner,
  trials: tuple[trial_lib.Trial, ...],
  fractions: Sequence[float],
  *,
  split: str = "trainval",
  rows: np.ndarray | None = None,
  judge: tuple[str, np.ndarray | None] | None = None,
) -> tuple[stage.Stage, stage.Stage]:
  """Return the two stages of `select`, without their frozen parts.

  Args:
    prefix: as of `select`.
    tuner: the same.
    trials: the same.
    fractions: the same.
    split: split to train on.
    rows: rows of the split; None: all.
    judge: (split, rows) whose accuracy is wanted, or None. If given, a head may
      diverge and is judged as 0.
  """
  rate = RATE if tuner.reader.init else 1.0
  trials = tuple(
    dataclasses.replace(trial, lr=trial.lr * rate) for trial in trials
  )
  both = dict(
    split=split, rows=rows, trains=("head",), min_finite=0 if judge else None
  )
  scores = stage.Stage(
    f"{prefix}scores", "scores", tuner, trials, "head", lasso=LASSO, **both
  )
  selected = stage.Stage(
    f"{prefix}selected",
    "selected",
    tuner,
    tuple(trial for trial in trials for _ in fractions),
    "head",
    judge=judge,
    keeps_weights=judge is None,
    **both,
  )
  return scores, selected
