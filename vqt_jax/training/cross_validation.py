"""The search of protocol=best: more out of the same labels.

Beside learning rates and weight decays it tries query counts, normalisation and
query dropout. The finalists on val (and the choice of the full protocol) are
compared by cross-validation on all of trainval, and so are the fractions of
features to keep. The test set plays no part.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import feature_selection
from vqt_jax.training import setup
from vqt_jax.training import stage
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import trial as trial_lib

Setting = tuple[tuner_lib.Tuner, trial_lib.Trial]


def setting(tuner: tuner_lib.Tuner, trial: trial_lib.Trial) -> dict[str, Any]:
  """Return a trial without its seed, JSON-able."""
  chosen = dataclasses.asdict(trial)
  del chosen["seed"]
  if not tuner.has_queries:
    return {name: chosen[name] for name in ("lr", "weight_decay")}
  return {"num_queries": tuner.num_queries, **chosen}


def simplest(pair: Setting) -> tuple[Any, ...]:
  """Sort key: of equally good settings the smallest one is taken."""
  tuner, trial = pair
  return (
    tuner.num_queries,
    trial.lr,
    trial.weight_decay,
    trial.query_dropout,
    not trial.normalize,
  )


def folds(count: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Return (rows to train on, rows to judge by) of each fold.

  Blocks of consecutive rows, from the end: with 1,000 rows and 5 folds the
  first one is VTAB's own split into train800 and val200.

  Raises:
    UserError: there are fewer rows than folds.
  """
  if count < number:
    raise errors.UserError(
      f"config.best.folds={number}: expected at most one fold per training"
      f" example, found {count} examples."
    )
  rows = np.arange(count)
  edges = [count * i // number for i in range(number, -1, -1)]
  judged = [rows[low:high] for high, low in itertools.pairwise(edges)]
  return [(np.setdiff1d(rows, some), some) for some in judged]


def search(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  known: dict[str, Any] | None,
  first: trial_lib.Trial,
  count: int,
) -> tuple[dict[str, Any], tuner_lib.Tuner, trial_lib.Trial, float]:
  """Search for the setting with the best cross-validated accuracy.

  The full protocol has found `known`, and chosen `first`, which is a finalist
  in any case; trainval has `count` examples.

  Returns:
    What was found, for `results.json`; the chosen tuner, trial and fraction of
    features to keep.
  """
  c, first = context.config.best, (context.tuner, first)
  parts = folds(count, c.folds)
  val, seconds = _wide(context, stages, known)
  ranked = sorted(val, key=lambda pair: (-val[pair], *simplest(pair)))
  finalists = list(dict.fromkeys([*ranked[: c.finalists], first]))

  accuracy, more = _cross_validate(stages, finalists, parts)
  seconds += more
  chosen = min(finalists, key=lambda p: (-accuracy[p], *simplest(p)))

  by_fraction = {1.0: accuracy[chosen]}
  if context.tuner.reads_blocks:
    tried = {*context.config.keep_fraction, *c.keep_fractions} - {1.0}
    fractions, more = _fractions(stages, *chosen, sorted(tried), parts)
    by_fraction |= fractions
    seconds += more
  keep = min(by_fraction, key=lambda f: (-by_fraction[f], -f))

  setting_chosen = _format_setting(chosen, context.config.batch_size)
  context.console.note(
    f"{setting_chosen}, {100 * keep:g} % of the features ({len(parts)} folds:"
    f" {100 * by_fraction[keep]:.1f} %; the full protocol's choice"
    f" {100 * accuracy[first]:.1f} %)",
    "chosen",
  )
  found = {
    "searched": len(val),
    "finalists": [
      {
        **setting(*p),
        "val_accuracy": val.get(p),
        "cv_accuracy": accuracy[p],
        "full": p == first,
      }
      for p in finalists
    ],
    "keep_fractions": [
      {"keep_fraction": f, "cv_accuracy": by_fraction[f]}
      for f in sorted(by_fraction)
    ],
    "folds": len(parts),
    "chosen": {**setting(*chosen), "keep_fraction": keep},
    "seconds": seconds,
  }
  return found, *chosen, keep


def _format_setting(pair: Setting, batch_size: int) -> str:
  """Describe a setting."""
  tuner, trial = pair
  text = trial.describe(batch_size)
  if not tuner.has_queries:
    return text
  norm = "" if trial.normalize else "not "
  return f"queries {tuner.num_queries}, {text}, {norm}normalised"


def _wide(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  known: dict[str, Any] | None,
) -> tuple[dict[Setting, float], float]:
  """Return the val accuracy of every setting that did not diverge; seconds."""
  c = context.config
  val, seconds = {}, 0.0
  if known:
    val = {
      (context.tuner, trial_lib.Trial(**trial)): known["val_accuracy"][i]
      for i, trial in enumerate(known["runs"])
      if i not in known["diverged"]
    }
  tried = [trial_lib.Trial(**trial) for trial in known["runs"]] if known else []
  wide = (c.best.query_dropout, (True, False))
  counts = sorted({context.tuner.num_queries, *c.best.num_queries})
  if not context.tuner.has_queries:
    wide, counts = ((0.0,), (c.normalize,)), [context.tuner.num_queries]
  for num_queries in counts:
    tuner = dataclasses.replace(context.tuner, num_queries=num_queries)
    trials = tuple(
      trial_lib.Trial(
        lr * c.batch_size / 256, decay, trial_lib.SEARCH_SEED, *rest
      )
      for lr, decay, *rest in itertools.product(c.lr, c.weight_decay, *wide)
    )
    if tuner == context.tuner:
      trials = tuple(trial for trial in trials if trial not in tried)
    if not trials:
      continue
    out = stages.run(
      stage.settings_stage(
        f"search_{num_queries}",
        "search",
        tuner,
        trials,
        ("val", None),
        split="train",
      )
    )
    seconds += out.seconds
    val |= {
      (tuner, trial): out.accuracy[i]
      for i, trial in enumerate(trials)
      if i not in out.diverged
    }
  return val, seconds


def _cross_validate(
  stages: stages_lib.Stages,
  finalists: list[Setting],
  parts: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[dict[Setting, float], float]:
  """Return the cross-validated accuracy of every finalist; seconds.

  A setting that diverges in a fold gets nothing right there.
  """
  right, seconds = dict.fromkeys(finalists, 0.0), 0.0
  for number, (rows, judged) in enumerate(parts, start=1):
    for tuner in dict.fromkeys(tuner for tuner, _ in finalists):
      trials = tuple(trial for other, trial in finalists if other == tuner)
      out = stages.run(
        stage.settings_stage(
          f"fold_{number}_{tuner.num_queries}",
          f"fold {number}",
          tuner,
          trials,
          ("trainval", judged),
          rows=rows,
        )
      )
      seconds += out.seconds
      for trial, share in zip(trials, out.accuracy):
        right[tuner, trial] += share * len(judged)
  return _shares(right, parts), seconds


def _fractions(
  stages: stages_lib.Stages,
  tuner: tuner_lib.Tuner,
  trial: trial_lib.Trial,
  fractions: list[float],
  parts: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[dict[float, float], float]:
  """Return the cross-validated accuracy of every fraction; seconds."""
  right, seconds = dict.fromkeys(fractions, 0.0), 0.0
  for number, (rows, judged) in enumerate(parts, start=1):
    planned = feature_selection.comparison_stages(
      f"keep_{number}_",
      f"fold {number}",
      tuner,
      trial,
      fractions,
      rows=rows,
      judge=("trainval", judged),
    )
    accuracy, more = feature_selection.compare(stages, planned, fractions)
    seconds += more
    for fraction, share in zip(fractions, accuracy):
      right[fraction] += share * len(judged)
  return _shares(right, parts), seconds


def _shares(right: dict[Any, float], parts: list[Any]) -> dict[Any, float]:
  count = sum(len(judged) for _, judged in parts)
  return {key: value / count for key, value in right.items()}
