"""The search of protocol=best: more out of the same labels.

Beside learning rates and weight decays it tries query counts, normalisation and
query dropout, and rates and decays beyond an end of the grid that is best. The
finalists on val (and the choice of the full protocol) are compared by
cross-validation on all of trainval, and so are the fractions of features to
keep. The test set plays no part.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import feature_selection
from vqt_jax.training import grid
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
  searched, seconds = _wide(context, stages, known)
  beyond = {}
  if context.config.extend_grid:
    beyond, more = _extend(context, stages, searched)
    seconds += more
  searched |= beyond
  val = _finite(searched)
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
    "tried": [
      {**setting(*p), "val_accuracy": searched[p], "extended": p in beyond}
      for p in searched
    ],
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
) -> tuple[dict[Setting, float | None], float]:
  """Return the val accuracy of every setting, None if it diverged; seconds."""
  c = context.config
  tried, seconds = {}, 0.0
  if known:
    tried = {
      (context.tuner, trial_lib.Trial(**trial)): known["val_accuracy"][i]
      if i not in known["diverged"]
      else None
      for i, trial in enumerate(known["runs"])
    }
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
    trials = tuple(trial for trial in trials if (tuner, trial) not in tried)
    if trials:
      found, more = _try(stages, f"search_{num_queries}", tuner, trials)
      tried |= found
      seconds += more
  return tried, seconds


def _try(
  stages: stages_lib.Stages,
  name: str,
  tuner: tuner_lib.Tuner,
  trials: tuple[trial_lib.Trial, ...],
) -> tuple[dict[Setting, float | None], float]:
  """Train on train; return accuracy on val, None if diverged; seconds."""
  out = stages.run(
    stage.settings_stage(
      name, "search", tuner, trials, ("val", None), split="train"
    )
  )
  found = {
    (tuner, trial): None if i in out.diverged else out.accuracy[i]
    for i, trial in enumerate(trials)
  }
  return found, out.seconds


def _finite(tried: dict[Setting, float | None]) -> dict[Setting, float]:
  """Return those that did not diverge."""
  return {pair: share for pair, share in tried.items() if share is not None}


def _extend(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  tried: dict[Setting, float | None],
) -> tuple[dict[Setting, float | None], float]:
  """Search beyond the grid while the best on val lies at an end of it.

  New rates are tried with all decays, and new decays with all rates, that were
  tried with the query count, dropout and normalisation of the best. It ends
  when the best is inside: a rate that diverged is an end beyond which there is
  nothing. Each axis is extended `grid.ROUNDS` times at most.

  Returns:
    What was added, as `_wide` returns it; seconds.
  """
  added, seconds = {}, 0.0
  rounds = {"lr": 0, "weight_decay": 0}
  for number in itertools.count(1):
    val = _finite(tried | added)
    if not val:
      break
    tuner, best = min(val, key=lambda pair: (-val[pair], *simplest(pair)))
    alike = [
      trial
      for other, trial in tried | added
      if other == tuner
      and dataclasses.replace(trial, lr=best.lr, weight_decay=best.weight_decay)
      == best
    ]
    axes = {n: sorted({getattr(t, n) for t in alike}) for n in rounds}
    new = {n: grid.beyond(axes[n], getattr(best, n)) for n in rounds}
    name = next((n for n in rounds if new[n] and rounds[n] < grid.ROUNDS), None)
    if name is None:
      if any(new.values()):
        context.console.note("the best is still at an end of its grid", "grid")
      break
    rounds[name] += 1
    scale = 256 / context.config.batch_size if name == "lr" else 1
    shown = [f"{x * scale:g}" for x in (getattr(best, name), *new[name])]
    context.console.note(
      f"{name} {shown[0]}, the best, is at an end of its grid: beyond it,"
      f" {', '.join(shown[1:])}",
      "grid",
    )
    trials = tuple(
      dataclasses.replace(best, lr=lr, weight_decay=decay)
      for lr, decay in itertools.product(*(axes | {name: new[name]}).values())
    )
    stage_name = f"search_{tuner.num_queries}_beyond_{number}"
    found, more = _try(stages, stage_name, tuner, trials)
    added |= found
    seconds += more
  return added, seconds


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
