"""method=auto: an exact head at once, then readers stacked with it.

`instant` is fitted first, which takes seconds. Then the members of `auto` are
cross-validated on trainval. Their out-of-fold predictions decide the weights of
a mean of their probabilities, of which the cross-entropy is least (stacking). A
member with little weight is left out. At last the members are trained on
trainval with every seed. The test set plays no part.
"""

from collections.abc import Sequence
import dataclasses
import statistics
from typing import Any

import ml_collections
import numpy as np
from scipy import special

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import data
from vqt_jax.features import examples as examples_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import exact
from vqt_jax.training import protocol
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import trial as trial_lib

# Where the 95 % interval of the quick answer lies above this, nothing else is
# trained.
ENOUGH = 0.98
# A member with less weight is left out: it costs more than it tells.
LEAST_WEIGHT = 0.05
_STEPS = 1000  # Of `mixing_weights`.


def mixing_weights(
  scores: np.ndarray,
  labels: np.ndarray,
  class_weights: np.ndarray | None = None,
) -> np.ndarray:
  """Find the weights of a mean of probabilities with least cross-entropy.

  By expectation maximisation, which cannot leave the simplex, and ends at the
  minimum, as the problem is convex.

  Args:
    scores: log-probabilities of K members, (K, n, C).
    labels: (n,).
    class_weights: (C,), of the cross-entropy; None: all classes weigh 1.

  Returns:
    (K,), at least 0; they sum to 1.
  """
  right = scores[:, np.arange(len(labels)), labels].astype(np.float64)
  counts = None if class_weights is None else class_weights[labels]
  weights = np.full(len(right), 1 / len(right))
  for _ in range(_STEPS):
    with np.errstate(divide="ignore"):  # Of a weight of 0.
      shares = special.softmax(right + np.log(weights)[:, None], axis=0)
    weights = np.average(shares, axis=1, weights=counts)
  return weights


def planned(
  config: ml_collections.ConfigDict, tuner: tuner_lib.Tuner
) -> list[stage_lib.Stage]:
  """Return all stages that may be run, in order.

  What only training can tell is left open, and so are the rows of the folds.
  """
  search = [protocol.search_stage(config, tuner.learner)]
  chosen = search[0].trials[0]
  found = search if len(search[0].trials) > 1 else []
  seeds = [_seeds_stage(config, each, chosen) for each in tuner.members]
  found += [each for each in seeds if each.solver]
  trained = [each for each in seeds if not each.solver]
  for number in range(1, exact.FOLDS + 1):
    found += [_fold_stage(each, f"fold {number}") for each in trained]
  return found + trained


def candidates(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  examples: examples_lib.Examples,
) -> tuple[dict[str, Any], list[protocol.Candidate]]:
  """Train the members; return as `protocol.candidates` does."""
  config, members = context.config, context.tuner.members
  found = {"search": None, "selection": None, "best": None, "auto": None}
  quick = [each for each in members if each.reader.is_fixed]
  made = {
    each.method: _train(stages, _seeds_stage(config, each)) for each in quick
  }
  quick_look = statistics.fmean(
    one["accuracy"] for each in made.values() for one in each.trained.solved
  )
  count = examples.count("trainval")
  if accuracy_lib.interval(quick_look, count)[0] >= ENOUGH:
    context.console.note(
      f"{' and '.join(made)} alone, as {100 * quick_look:.1f} % leave little to"
      " gain",
      "chosen",
    )
    found["auto"] = {"quick_look": quick_look, "members": []}
    return found, list(made.values())
  examples.check_rows("trainval")
  found["search"], chosen = protocol.search(
    context, stages, context.tuner.learner
  )
  planned = [_seeds_stage(config, each, chosen) for each in members]
  judged, weights = _weigh(context, stages, examples, planned)
  found["auto"] = {"quick_look": quick_look, **judged}
  alone = [stage for stage, weight in zip(planned, weights) if weight == 1]
  for stage in alone or planned:
    if stage.tuner.method not in made:
      made[stage.tuner.method] = _train(stages, stage)
  if alone:
    result = made.pop(alone[0].tuner.method)
    others = list(made.values())
  else:
    others = [made[each.method] for each in members]
    result = _mix(context, others, weights)
  spent = sum(each["seconds"] for each in (found["search"], judged) if each)
  result = dataclasses.replace(result, seconds=result.seconds + spent)
  return found, [*others, result]


def _seeds_stage(
  config: ml_collections.ConfigDict,
  member: tuner_lib.Tuner,
  chosen: trial_lib.Trial | None = None,
) -> stage_lib.Stage:
  """Return the stage that trains a member with every seed on trainval."""
  if member.reader.is_fixed:
    stage = protocol.exact_stage(config, member)
  else:
    stage = protocol.seeds_stage(member, chosen, config.seeds)
  label = "quick look" if member.reader.is_fixed else member.method
  return dataclasses.replace(stage, name=f"{member.method}_seeds", label=label)


def _fold_stage(
  seeds: stage_lib.Stage, label: str, rows: np.ndarray | None = None
) -> stage_lib.Stage:
  """Return the stage that trains a member once, on rows of trainval."""
  method = seeds.tuner.method
  return dataclasses.replace(
    seeds,
    name=f"{method}_{label.replace(' ', '_')}",
    label=label,
    trials=(dataclasses.replace(seeds.trials[0], seed=trial_lib.SEARCH_SEED),),
    trial_noun=method,
    rows=rows,
  )


def _train(
  stages: stages_lib.Stages, stage: stage_lib.Stage
) -> protocol.Candidate:
  return protocol.candidate(stage.tuner.method, stage, stages.run(stage))


def _weigh(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  examples: examples_lib.Examples,
  planned: Sequence[stage_lib.Stage],
) -> tuple[dict[str, Any], np.ndarray]:
  """Train on folds; return what was found, and weights of the members."""
  labels, classes = examples.labels("trainval"), context.tuner.num_classes
  class_weights = None
  if context.config.class_weights == "balanced":
    class_weights = data.balanced_weights(labels, classes)
  folds, rows = exact.stratified_folds(labels), np.arange(len(labels))
  scores = np.zeros((len(planned), len(labels), classes), np.float32)
  seconds = 0.0
  for score, seeds in zip(scores, planned):
    if seeds.solver:
      stage = _fold_stage(seeds, "folds")
      score[:], took = stages.cross_validate_head(stage, folds)
      seconds += took
      continue
    for number, judged in enumerate(folds, start=1):
      others = np.setdiff1d(rows, judged)
      stage = _fold_stage(seeds, f"fold {number}", others)
      out = stages.run(stage)
      score[judged] = stages.log_probabilities(stage, out.variables, judged)
      seconds += out.seconds
  weights = exact.of_first_process(
    mixing_weights(scores, labels, class_weights)
  )
  weights[weights < LEAST_WEIGHT] = 0
  weights /= weights.sum()
  mixed = special.logsumexp(scores, axis=0, b=weights[:, None, None])
  methods = [stage.tuner.method for stage in planned]
  share = lambda score: float((score.argmax(axis=-1) == labels).mean())
  found = {
    "folds": len(folds),
    "members": [
      {"method": method, "weight": float(weight), "cv_accuracy": share(score)}
      for method, weight, score in zip(methods, weights, scores)
    ],
    "cv_accuracy": share(mixed),
    "seconds": seconds,
  }
  each = [
    f"{one['method']} {100 * one['cv_accuracy']:.1f} %"
    for one in found["members"]
  ]
  used = [
    f"{weight:.2f} x {method}"
    for method, weight in zip(methods, weights)
    if weight
  ]
  context.console.note(
    f"{' + '.join(used)} ({len(folds)} folds: {', '.join(each)}, this"
    f" {100 * found['cv_accuracy']:.1f} %)",
    "chosen",
  )
  return found, weights


def _mix(
  context: setup.RunContext,
  every: Sequence[protocol.Candidate],
  weights: np.ndarray,
) -> protocol.Candidate:
  """Join members into one candidate, seed by seed."""
  count = len(every[0].trials)
  weights = np.tile(weights.astype(np.float32), (count, 1))
  learned = next(each for each in every if not each.trained.solved)
  return dataclasses.replace(
    learned,
    name=context.tuner.method,
    tuner=context.tuner,
    variables={
      "tuner": {each.name: each.variables for each in every},
      "head": {"weights": weights},
    },
    seconds=sum(each.seconds for each in every),
  )
