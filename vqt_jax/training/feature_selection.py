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

from vqt_jax.models import head as head_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import loop
from vqt_jax.training import stage
from vqt_jax.training import stages as stages_lib

LASSO = 1e-4
RATE = 0.5  # Of the first head's rate, with queries.


def compare(
  stages: stages_lib.Stages,
  prefix: str,
  label: str,
  tuner: tuner_lib.Tuner,
  run: loop.Run,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **examples: Any,
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
    prefix, label, tuner, run, fractions, judge=judge, **examples
  )
  out = stages.run(first)
  fewer = _fewer(fractions)
  _, selected, seconds = select(
    stages,
    prefix,
    tuner,
    (run,),
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
  run: loop.Run,
  fractions: Sequence[float],
  *,
  judge: tuple[str, np.ndarray | None],
  **examples: Any,
) -> tuple[stage.Stage, ...]:
  """The stages of `compare`, of whose arguments these are some."""
  fewer = _fewer(fractions)
  first = stage.Stage(
    f"{prefix}all",
    label,
    tuner,
    (run,),
    "setting",
    least=0,
    judge=judge if len(fewer) < len(fractions) else None,
    **examples,
  )
  return first, *selecting(
    prefix, tuner, (run,), fewer, judge=judge, **examples
  )


def _fewer(fractions: Sequence[float]) -> list[float]:
  return [fraction for fraction in fractions if fraction < 1]


def select(
  stages: stages_lib.Stages,
  prefix: str,
  tuner: tuner_lib.Tuner,
  runs: tuple[loop.Run, ...],
  variables: Any,
  fractions: Sequence[float],
  **examples: Any,
) -> tuple[np.ndarray, stage.Outcome, float]:
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
  scoring, selection = selecting(prefix, tuner, runs, fractions, **examples)
  held = {"tuner": variables["tuner"]}
  scored = stages.run(dataclasses.replace(scoring, held=held))
  scores = np.asarray(head_lib.scores(scored.variables["head"]))
  kept = np.stack(
    [
      head_lib.best(of_run, fraction)
      for of_run in scores
      for fraction in fractions
    ]
  )
  repeat = lambda x: np.repeat(x, len(fractions), axis=0)
  selected = stages.run(
    dataclasses.replace(selection, held=jax.tree.map(repeat, held), kept=kept)
  )
  return kept, selected, scored.seconds + selected.seconds


def selecting(
  prefix: str,
  tuner: tuner_lib.Tuner,
  runs: tuple[loop.Run, ...],
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
  runs = tuple(dataclasses.replace(run, lr=run.lr * rate) for run in runs)
  both = dict(
    split=split, rows=rows, trains=("head",), least=0 if judge else None
  )
  scores = stage.Stage(
    f"{prefix}scores", "scores", tuner, runs, "head", lasso=LASSO, **both
  )
  selected = stage.Stage(
    f"{prefix}selected",
    "selected",
    tuner,
    tuple(run for run in runs for _ in fractions),
    "head",
    judge=judge,
    keeps_weights=judge is None,
    **both,
  )
  return scores, selected
