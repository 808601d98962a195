"""Protocols: which trials are trained, and how one is chosen without the test.

`full` is the authors' protocol: every setting is trained on train; the one that
is best on val is trained with every seed on trainval; then features are
selected. If several fractions of features are given, val chooses one. `best`
gets more out of the same labels: it also searches query counts, normalisation
and the fraction of features, and chooses by cross-validation on trainval.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import statistics
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax.features import examples as examples_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import cross_validation
from vqt_jax.training import feature_selection
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import trial as trial_lib


@dataclasses.dataclass
class Candidate:
  """A setting trained with every seed on trainval, to be tested.

  Attributes:
    name: "all" or "selected" (features), with "best_" before it in the search
      of protocol=best.
    tuner: of all trials.
    trials: one per seed, R in all.
    variables: {"tuner", "head"}, leaves (R, ...).
    trained: result of training, before any selection.
    keep_fraction: fraction of the features in use.
    feature_mask: (R, F) of 0 and 1; None: all features are in use.
    seconds: time of all training that led to it.
  """

  name: str
  tuner: tuner_lib.Tuner
  trials: tuple[trial_lib.Trial, ...]
  variables: Any
  trained: stage_lib.StageResult
  keep_fraction: float
  feature_mask: np.ndarray | None
  seconds: float

  @property
  def num_trained(self) -> int:
    """Number of parameters of one trial that were trained.

    Queries, and head rows in use.
    """
    size = lambda tree: sum(x[0].size for x in jax.tree.leaves(tree))
    if self.tuner.members:
      return sum(
        size(each["head"] if member.reader.is_fixed else each)
        for member in self.tuner.members
        for each in [self.variables["tuner"][member.method]]
      )
    if self.tuner.reader.is_fixed:
      return size(self.variables["head"])
    kernel = self.variables["head"]["kernel"][0]
    left_out = (
      0 if self.feature_mask is None else int((self.feature_mask[0] == 0).sum())
    )
    return size(self.variables) - left_out * kernel.shape[1]

  @property
  def kept_share(self) -> list[float] | None:
    """Share in use of the final feature and of each group that is read.

    Mean over the trials; None: all are in use.
    """
    if self.feature_mask is None:
      return None
    each = max(1, self.tuner.reader.group_features(self.tuner))
    starts = range(self.tuner.config.width, self.tuner.num_features, each)
    groups = np.split(self.feature_mask, starts, axis=1)
    return [float(group.mean()) for group in groups]

  @property
  def setting(self) -> dict[str, Any]:
    """The setting, JSON-able."""
    if self.tuner.members:
      methods = [each.method for each in self.tuner.members]
      weights = self.variables["head"]["weights"][0].tolist()
      return {**dict(zip(methods, weights)), "keep_fraction": 1.0}
    chosen = cross_validation.setting(self.tuner, self.trials[0])
    if solved := self.trained.solved:
      chosen = {"penalty": statistics.median(x["penalty"] for x in solved)}
      if self.tuner.reader.is_fixed:
        chosen["num_queries"] = self.tuner.num_queries
    return {**chosen, "keep_fraction": self.keep_fraction}


def candidates(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  examples: examples_lib.Examples,
) -> tuple[dict[str, Any], list[Candidate]]:
  """Train as `config.protocol` says.

  Returns:
    What was found on the way, for `results.json`; and the candidates to test,
    of which the last one is the protocol's result.
  """
  c = context.config
  if c.solver == "exact":
    return _solve(context, stages)
  if c.protocol == "best":  # Fail before hours have gone by.
    cross_validation.folds(examples.count("trainval"), c.best.folds)
    examples.check_rows("trainval")
  searched, chosen = search(context, stages, context.tuner)
  selection_found, keep = _fraction(context, stages, chosen)
  found = {"search": searched, "selection": selection_found, "best": None}
  spent = sum(each["seconds"] for each in found.values() if each)
  made = _finish(stages, "", context.tuner, chosen, keep, c.seeds, spent)
  if c.protocol == "full":
    return found, made
  found["best"], tuner, chosen, keep = cross_validation.search(
    context, stages, searched, chosen, examples.count("trainval")
  )
  spent += found["best"]["seconds"]
  made += _finish(stages, "best_", tuner, chosen, keep, c.seeds, spent)
  return found, made


def planned(
  config: ml_collections.ConfigDict, tuner: tuner_lib.Tuner
) -> list[stage_lib.Stage]:
  """Return all stages of `protocol="full"`, in order.

  What only training can tell is left open: the chosen setting is some setting
  of the grid, and frozen parts are missing.
  """
  if config.solver == "exact":
    return [exact_stage(config, tuner)]
  first = search_stage(config, tuner)
  chosen, fractions = first.trials[0], config.keep_fraction
  found = [first] if len(first.trials) > 1 else []
  if len(fractions) > 1:
    found += _fraction_stages(config, tuner, chosen)
  seeds = seeds_stage(tuner, chosen, config.seeds)
  found.append(seeds)
  if min(fractions) < 1:
    found += feature_selection.selection_stages(
      "", tuner, seeds.trials, fractions[:1]
    )
  return found


def exact_stage(
  config: ml_collections.ConfigDict, tuner: tuner_lib.Tuner
) -> stage_lib.Stage:
  """Return the stage that computes the heads on trainval.

  One if there is nothing random, else one per seed.
  """
  fixed = tuner.reader.is_fixed
  selects = tuner.reads_blocks and not fixed
  seeds = config.seeds if fixed else config.seeds[:1]
  solver = "ridge" if fixed else "selected ridge" if selects else "logistic"
  return stage_lib.Stage(
    "seeds",
    "head",
    tuner,
    tuple(
      trial_lib.Trial(0.0, 0.0, seed, normalize=config.normalize)
      for seed in seeds
    ),
    "seed",
    trains=("head",),
    solver=solver,
    fractions=config.keep_fraction if selects else (),
  )


def candidate(
  name: str,
  stage: stage_lib.Stage,
  out: stage_lib.StageResult,
  spent: float = 0.0,
) -> Candidate:
  """Return the candidate that a stage has trained, with all features in use.

  Args:
    name: see `Candidate`.
    stage: of one trial per seed.
    out: its result.
    spent: seconds of training that led to it.
  """
  return Candidate(
    name=name,
    tuner=stage.tuner,
    trials=stage.trials,
    variables=out.variables,
    trained=out,
    keep_fraction=1.0,
    feature_mask=None,
    seconds=spent + out.seconds,
  )


def _solve(
  context: setup.RunContext, stages: stages_lib.Stages
) -> tuple[dict[str, Any], list[Candidate]]:
  """Compute the heads, and what their solver searches."""
  stage = exact_stage(context.config, context.tuner)
  out = stages.run(stage)
  found = {"search": None, "selection": None, "best": None}
  made = candidate("all", stage, out)
  if stage.fractions:
    solved = out.solved[0]
    keep, tried = solved["keep_fraction"], solved["keep_fractions"]
    found["selection"] = {"keep_fractions": tried, "chosen": keep}
    if keep < 1:
      kernel = out.variables["head"]["kernel"]
      made = dataclasses.replace(
        made,
        name="selected",
        keep_fraction=keep,
        feature_mask=kernel.any(axis=-1).astype(np.float32),
      )
  return found, [made]


def search_stage(
  config: ml_collections.ConfigDict, tuner: tuner_lib.Tuner
) -> stage_lib.Stage:
  """Return the stage that trains the grid on train and judges it on val."""
  trials = tuple(
    trial_lib.Trial(
      lr * config.batch_size / 256,
      decay,
      trial_lib.SEARCH_SEED,
      config.query_dropout if tuner.has_queries else 0.0,
      config.normalize,
    )
    for lr, decay in itertools.product(config.lr, config.weight_decay)
  )
  return stage_lib.settings_stage(
    "search",
    "search",
    tuner,
    trials,
    ("val", None),
    split="train",
    min_finite=1,
  )


def seeds_stage(
  tuner: tuner_lib.Tuner,
  chosen: trial_lib.Trial,
  seeds: Sequence[int],
  prefix: str = "",
) -> stage_lib.Stage:
  """Return the stage that trains a setting with every seed on trainval."""
  trials = tuple(dataclasses.replace(chosen, seed=seed) for seed in seeds)
  return stage_lib.Stage(f"{prefix}seeds", "seeds", tuner, trials, "seed")


def search(
  context: setup.RunContext,
  stages: stages_lib.Stages,
  tuner: tuner_lib.Tuner,
) -> tuple[dict[str, Any] | None, trial_lib.Trial]:
  """Search the grid, unless it has only one setting.

  Returns:
    What was found, for `results.json`, or None; and the chosen trial.
  """
  stage = search_stage(context.config, tuner)
  trials = stage.trials
  if len(trials) == 1:
    return None, trials[0]
  out = stages.run(stage)
  chosen = trial_lib.best_trial(trials, out.accuracy, set(out.diverged))
  found = {
    "chosen": chosen,
    "runs": [dataclasses.asdict(trial) for trial in trials],
    "val_accuracy": out.accuracy,
    "diverged": out.diverged,
    "seconds": out.seconds,
  }
  context.console.note(_choice(found, context.config.batch_size), "chosen")
  return found, trials[chosen]


def _fraction_stages(
  config: ml_collections.ConfigDict,
  tuner: tuner_lib.Tuner,
  chosen: trial_lib.Trial,
) -> tuple[stage_lib.Stage, ...]:
  """Return the stages that try the fractions of features on val."""
  return feature_selection.comparison_stages(
    "keep_",
    "keep",
    tuner,
    chosen,
    config.keep_fraction,
    split="train",
    judge=("val", None),
  )


def _fraction(
  context: setup.RunContext, stages: stages_lib.Stages, chosen: trial_lib.Trial
) -> tuple[dict[str, Any] | None, float]:
  """Choose the fraction of features on val, unless there is only one.

  On a tie the larger fraction wins.
  """
  fractions = context.config.keep_fraction
  if len(fractions) == 1:
    return None, fractions[0]
  planned = _fraction_stages(context.config, context.tuner, chosen)
  accuracy, seconds = feature_selection.compare(stages, planned, fractions)
  by_fraction = dict(sorted(zip(fractions, accuracy)))
  keep = min(by_fraction, key=lambda f: (-by_fraction[f], -f))
  context.console.note(
    f"{100 * keep:g} % of the features (val {100 * by_fraction[keep]:.1f} %)",
    "chosen",
  )
  found = {
    "keep_fractions": [
      {"keep_fraction": fraction, "val_accuracy": share}
      for fraction, share in by_fraction.items()
    ],
    "chosen": keep,
    "seconds": seconds,
  }
  return found, keep


def _finish(
  stages: stages_lib.Stages,
  prefix: str,
  tuner: tuner_lib.Tuner,
  chosen: trial_lib.Trial,
  keep_fraction: float,
  seeds: Sequence[int],
  spent: float,
) -> list[Candidate]:
  """Train the chosen setting with every seed, then with selected features."""
  stage = seeds_stage(tuner, chosen, seeds, prefix)
  out = stages.run(stage)
  everything = candidate(f"{prefix}all", stage, out, spent)
  if keep_fraction == 1:
    return [everything]
  fractions = [keep_fraction]
  feature_mask, selected, seconds = feature_selection.select(
    stages,
    feature_selection.selection_stages(prefix, tuner, stage.trials, fractions),
    out.variables,
    fractions,
  )
  return [
    everything,
    dataclasses.replace(
      everything,
      name=f"{prefix}selected",
      variables=selected.variables,
      keep_fraction=keep_fraction,
      feature_mask=feature_mask,
      seconds=everything.seconds + seconds,
    ),
  ]


def _choice(found: dict[str, Any], batch_size: int) -> str:
  """Describe the chosen setting, and by how much it is ahead."""
  trial, accuracy = found["runs"][found["chosen"]], found["val_accuracy"]
  top, diverged = accuracy[found["chosen"]], found["diverged"]
  near = [a for i, a in enumerate(accuracy) if i not in diverged]
  near = sum(a >= top - 0.005 for a in near) - 1
  lost = f", {len(diverged)} diverged" if diverged else ""
  text = trial_lib.Trial(**trial).describe(batch_size)
  return (
    f"{text} (val {100 * top:.1f} %; {near} of {len(accuracy) - 1} others"
    f" within 0.5 points{lost}{_at_an_end(trial, found['runs'])})"
  )


def _at_an_end(trial: dict[str, Any], trials: Sequence[dict[str, Any]]) -> str:
  """Return a remark if the chosen rate lies at an end of the grid."""
  rates = sorted({each["lr"] for each in trials})
  if len(rates) < 3 or trial["lr"] not in (rates[0], rates[-1]):
    return ""
  which = "smallest" if trial["lr"] == rates[0] else "largest"
  return f"; the {which} lr that was tried"
