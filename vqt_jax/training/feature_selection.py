"""Feature selection as the official program does it.

A new head on the frozen queries, trained with a group lasso over the features,
tells how much each of them is used; another new head is trained on those used
most. Both train for as long as the first, at half its rate; for features that
nothing but the head learns from, at its rate, as the program of Head2Toe does.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from vqt_jax.features import examples as examples_lib
from vqt_jax.models import head as head_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import stage
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import trial as trial_lib

LASSO = 1e-4
RATE = 0.5  # Of the first head's rate, with queries.


def compare(
  stages: stages_lib.Stages,
  prefix: str,
  label: str,
  tuner: tuner_lib.Tuner,
  trial: trial_lib.Trial,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **examples: examples_lib.Examples,
) -> tuple[list[float], float]:
  """Trains a run, then new heads on each of some fractions of its features.

  All of them, a fraction of 1, are judged with the run's own head: that is what
  a run without a selection gives.

  Args:
    stages: does the work.
    prefix: of the stages' names.
    label: of the first one, for people.
    tuner: of the run.
    run: what is trained first.
    fractions: of features to keep.
    judge: split and rows whose accuracy is wanted.
    **examples: `split` and `rows` to train on, as of `select`.

  Returns:
    Accuracy of each fraction; seconds of training.
  """
  first, *_ = compared(
    prefix, label, tuner, trial, fractions, judge=judge, **examples
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
    **examples,
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
  **examples: examples_lib.Examples,
) -> tuple[stage.Stage, ...]:
  """The stages of `compare`, of whose arguments these are some."""
  fewer = _fewer(fractions)
  first = stage.Stage(
    f"{prefix}all",
    label,
    tuner,
    (trial,),
    "setting",
    min_finite=0,
    judge=judge if len(fewer) < len(fractions) else None,
    **examples,
  )
  return first, *selecting(
    prefix, tuner, (trial,), fewer, judge=judge, **examples
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
  **examples: examples_lib.Examples,
) -> tuple[np.ndarray, stage.StageResult, float]:
  """Trains new heads on fewer features.

  Args:
    stages: does the work.
    prefix: of the stages' names.
    tuner: of all runs.
    runs: R runs as the queries were trained.
    variables: {"tuner", "head"} of them, leaves (R, ...).
    fractions: of features to keep; each is tried on each of the runs.
    **examples: `split`, `rows` and `judge`, as of `selecting`.

  Returns:
    The kept features (R * K, F) of 0 and 1, all fractions of the first run
    first; the outcome of the new heads in that order; seconds of training.
  """
  scoring, selection = selecting(prefix, tuner, trials, fractions, **examples)
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
  """The two stages of `select`, without the weights that they hold.

  Args:
    prefix: as of `select`.
    tuner: the same.
    runs: the same.
    fractions: the same.
    split: trained on.
    rows: of the split; None: all.
    judge: split and rows whose accuracy is wanted, or None. With it a head that
      diverges is only judged badly.
  """
  rate = RATE if tuner.has_queries else 1.0
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
