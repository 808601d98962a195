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


def comparison_stages(
  prefix: str,
  label: str,
  tuner: tuner_lib.Tuner,
  trial: trial_lib.Trial,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **source: Any,
) -> tuple[stage.Stage, ...]:
  """Return the stages of `compare`: one with all features, scores, selected.

  Without the first one if only heads train and it is not judged: the others
  need nothing of it.
  """
  fewer = _fewer(fractions)
  selection = selection_stages(
    prefix, tuner, (trial,), fewer, judge=judge, **source
  )
  if len(fewer) == len(fractions) and not tuner.shapes()["tuner"]:
    return selection
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
  return first, *selection


def compare(
  stages: stages_lib.Stages,
  planned: Sequence[stage.Stage],
  fractions: Sequence[float],
) -> tuple[list[float], float]:
  """Train a trial, then new heads on several fractions of its features.

  The fraction 1 is judged with the trial's own head, which is the result of a
  run without selection.

  Returns:
    Accuracy of each fraction; seconds of training.
  """
  *first, scores, selected = planned
  accuracy, variables, seconds = {}, {"tuner": {}}, 0.0
  for everything in first:
    out = stages.run(everything)
    variables, seconds = out.variables, out.seconds
    accuracy[1.0] = out.accuracy and out.accuracy[0]
  fewer = _fewer(fractions)
  _, out, more = select(stages, (scores, selected), variables, fewer)
  accuracy |= dict(zip(fewer, out.accuracy))
  return [accuracy[f] for f in fractions], seconds + more


def _fewer(fractions: Sequence[float]) -> list[float]:
  return [fraction for fraction in fractions if fraction < 1]


def selection_stages(
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
    prefix: of the stages' names.
    tuner: of all trials.
    trials: R trials, as the queries were trained.
    fractions: K fractions of features to keep, each tried with each trial.
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


def select(
  stages: stages_lib.Stages,
  planned: Sequence[stage.Stage],
  variables: Any,
  fractions: Sequence[float],
) -> tuple[np.ndarray, stage.StageResult, float]:
  """Train new heads on fewer features.

  Returns:
    The feature mask (R * K, F) of 0 and 1, all fractions of the first trial
    first; the result of the new heads in that order; seconds of training.
  """
  scoring, selection = planned
  frozen_parts = {"tuner": variables["tuner"]}
  scored = stages.run(dataclasses.replace(scoring, frozen_parts=frozen_parts))
  scores = np.asarray(head_lib.feature_scores(scored.variables["head"]))
  feature_mask = np.stack(
    [
      head_lib.feature_mask(of_trial, fraction)
      for of_trial in scores
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
