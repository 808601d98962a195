"""Choosing a setting, and features, as the official program does."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.models import head as head_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import feature_selection
from vqt_jax.training import optim
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial

CASES = {
  case["name"]: case
  for case in json.loads(
    (helpers.GOLDENS / "vqt" / "hparam_selection.json").read_text()
  )["cases"]
}


def _choose(name):
  """What we choose from a golden case; a run cut short has diverged."""
  case = CASES[name]
  runs, accuracy, epochs = [], [], []
  for run in case["runs_in_file_order"]:
    values = run["val_top1_per_epoch"]
    runs.append(trial.Trial(run["lr"], run["wd"], 100))
    accuracy.append(values[-1] if values else float("nan"))
    epochs.append(len(values))
  diverged = {i for i, n in enumerate(epochs) if n < max(epochs)}
  chosen = runs[trial.best_trial(tuple(runs), accuracy, diverged)]
  return (chosen.lr, chosen.weight_decay), (case["best_lr"], case["best_wd"])


@pytest.mark.parametrize(
  "name",
  [
    "plain",
    "last_epoch_counts_not_best",
    "tie_smaller_lr_later",
    "tie_smaller_lr_first",
    "tie_three_way",
    "empty_run_skipped",
    "zero_accuracy",
  ],
)
def test_choice_of_the_official_program(name):
  ours, theirs = _choose(name)
  assert ours == theirs


def test_all_features_are_judged_with_the_head_that_is_shipped():
  """Not with a new one on queries that are good from the start."""
  asked = []

  class Stages:
    def run(self, stage):
      asked.append(stage)
      share = {"keep_all": [0.7], "keep_selected": [0.6, 0.5]}.get(stage.name)
      kernel = np.ones((1, 4, 2), np.float32)
      return stage_lib.StageResult(
        [],
        1.0,
        [],
        share if stage.judge else None,
        {"tuner": {}, "head": {"kernel": kernel}},
      )

  tuner = vqt_jax.make_tuner("vqt", helpers.tiny_config(), 2)
  fractions = (1.0, 0.5, 0.25)
  planned = feature_selection.comparison_stages(
    "keep_",
    "keep",
    tuner,
    trial.Trial(0.1, 0.0, 1),
    fractions,
    judge=("val", None),
    split="train",
  )
  accuracy, _ = feature_selection.compare(Stages(), planned, fractions)
  assert accuracy == [0.7, 0.6, 0.5]
  assert [stage.name for stage in asked] == [
    "keep_all",
    "keep_scores",
    "keep_selected",
  ]


def test_a_tie_of_equal_rates_goes_to_the_smaller_decay():
  assert _choose("tie_same_lr_first_file_wins")[0] == (0.5, 0.0)


def test_a_diverged_run_never_wins():
  ours, theirs = _choose("diverged_run_uses_its_last_recorded_epoch")
  assert theirs == (0.5, 0.01)
  assert ours == (0.25, 0.01)


class Head:
  """Trains heads on the frozen queries of a golden file."""

  def __init__(self, golden, optimizer, lasso):
    self.golden = golden
    self.backbone = helpers.golden_backbone()
    self.tuner = vqt_jax.make_tuner("vqt", self.backbone.config, 7)
    self.recipe = step_lib.StaticSettings(
      optimizer, lasso=lasso, trains=("head",)
    )

  def train(self, kernel, bias, lr, decay, factors, kept=None):
    """Full batch; returns the loss of each step, final kernel and bias."""
    held = {"tuner": {"queries": self.golden["queries"]}}
    start = {**held, "head": {"kernel": kernel, "bias": bias}}
    start = jax.tree.map(lambda x: jnp.asarray(x)[None], start)
    trained, frozen = tuner_lib.partition(
      self.backbone.params, start, self.recipe.trains
    )
    state = step_lib.init(
      self.tuner, self.recipe, self.backbone.params, np.zeros(1, np.uint32)
    ).replace(trained=trained)
    settings = step_lib.Settings(
      jnp.array([lr]),
      jnp.array([decay]),
      frozen_parts={"tuner": start["tuner"]},
      feature_mask=None if kept is None else kept[None],
    )
    data = {"image": self.golden["images"], "label": self.golden["labels"]}
    count = len(data["label"])
    order = np.tile(np.arange(count), (len(factors), 1))
    state, losses, _ = step_lib.train_steps(
      self.tuner,
      self.recipe,
      state,
      frozen,
      settings,
      data,
      order,
      np.ones(order.shape, np.float32),
      np.array(factors, np.float32),
    )
    head = state.trained["head"]
    losses = np.asarray(losses[:, 0]) / count
    return losses, np.asarray(head["kernel"][0]), np.asarray(head["bias"][0])


@pytest.mark.parametrize("coefficient", ["0.0001", "0.01"])
def test_group_lasso_of_the_official_program(coefficient):
  """One step of plain descent shows the gradient; row 3 is all zeros."""
  golden = helpers.golden("lrp_loss")
  kernel, bias = golden["head/kernel"], golden["head/bias"]
  assert not kernel[3].any()
  lasso = float(coefficient)
  head = Head(golden, "sgd", lasso)
  (loss,), moved, moved_bias = head.train(kernel, bias, 1.0, 0.0, [1.0])
  penalty = head_lib.feature_scores({"kernel": kernel}).sum()
  helpers.assert_close(penalty, golden["lrp_norm"])
  expected = lambda name: golden[f"coef_{coefficient}/{name}"]
  helpers.assert_close(loss + lasso * penalty, expected("loss"))
  helpers.assert_close(kernel - moved, expected("grad/head/kernel"))
  helpers.assert_close(bias - moved_bias, expected("grad/head/bias"))


def _start(golden, part):
  kernel, bias = (golden[f"{part}/init/head/{x}"] for x in ("kernel", "bias"))
  curve = optim.schedule(
    int(golden["hparam/epochs"]), int(golden["hparam/warmup_epochs"])
  )
  factors = [float(curve(e)) for e in range(int(golden["hparam/epochs"]))]
  lr = float(golden["hparam/lr_search"]) * feature_selection.RATE
  rates = np.multiply(lr, factors)
  helpers.assert_close(rates, golden[f"{part}/lr_per_epoch"], 1e-7)
  return kernel, bias, lr, float(golden["hparam/weight_decay"]), factors


def test_scores_of_the_official_program():
  golden = helpers.golden("feature_selection")
  assert feature_selection.LASSO == golden["hparam/lrp_coef"]
  head = Head(golden, "adam", feature_selection.LASSO)
  losses, kernel, bias = head.train(*_start(golden, "compress"))
  # Theirs hold the penalty of the head as it was before each update.
  before = [golden["compress/init/head/kernel"]]
  before += [*golden["compress/head_kernel_per_step"][:-1]]
  penalty = [
    head_lib.feature_scores({"kernel": kernel}).sum() for kernel in before
  ]
  helpers.assert_close(
    losses + feature_selection.LASSO * np.array(penalty),
    golden["compress/loss_per_epoch"],
  )
  helpers.assert_close(kernel, golden["compress/head_kernel_per_step"][-1])
  helpers.assert_close(bias, golden["compress/head_bias_per_step"][-1])
  scores = np.asarray(head_lib.feature_scores({"kernel": kernel}))
  helpers.assert_close(scores, golden["scores"])
  for ours in (scores, golden["scores"]):
    kept = head_lib.feature_mask(ours, float(golden["hparam/keep_frac"]))
    np.testing.assert_array_equal(
      np.flatnonzero(kept), golden["kept_indices_sorted"]
    )


@pytest.mark.parametrize("left_out", [0.0, 3.0])
def test_selected_features_of_the_official_program(left_out):
  """Theirs has a smaller head, ours a mask: what it hides does not matter."""
  golden = helpers.golden("feature_selection")
  rows = golden["kept_indices"]
  small, *rest = _start(golden, "select")
  kernel = np.full((int(golden["feat_dim_full"]), 7), left_out, np.float32)
  kernel[rows] = small
  kept = head_lib.feature_mask(
    golden["scores"], float(golden["hparam/keep_frac"])
  )
  head = Head(golden, "adam", 0.0)
  losses, kernel, bias = head.train(kernel, *rest, kept)
  helpers.assert_close(losses, golden["select/loss_per_epoch"])
  helpers.assert_close(kernel[rows], golden["select/head_kernel_per_step"][-1])
  helpers.assert_close(bias, golden["select/head_bias_per_step"][-1])


def test_numbers_of_features_of_the_official_program():
  path = helpers.GOLDENS / "vqt" / "feat_dim_table.json"
  for name, count in json.loads(path.read_text()).items():
    numbers = re.fullmatch(r"D(\d+)_L(\d+)_T(\d+)_keep(.+)", name).groups()
    width, depth, queries = map(int, numbers[:3])
    features = width * (1 + depth * queries)
    kept = head_lib.feature_mask(np.zeros(features), float(numbers[3]))
    assert kept.sum() == count, name
    assert kept[:count].all()  # Of equal ones the first.


def test_at_least_one_feature_is_kept():
  assert head_lib.feature_mask(np.arange(3.0), 0.01).tolist() == [0, 0, 1]
