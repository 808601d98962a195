"""Choosing a setting by val, as the official program does and where not."""

import json

import pytest

from tests import helpers
from vqt_jax.train import loop

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
    runs.append(loop.Run(run["lr"], run["wd"], 100))
    accuracy.append(values[-1] if values else float("nan"))
    epochs.append(len(values))
  diverged = {i for i, n in enumerate(epochs) if n < max(epochs)}
  chosen = runs[loop.choose(tuple(runs), accuracy, diverged)]
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


def test_a_tie_of_equal_rates_goes_to_the_smaller_decay():
  assert _choose("tie_same_lr_first_file_wins")[0] == (0.5, 0.0)


def test_a_diverged_run_never_wins():
  ours, theirs = _choose("diverged_run_uses_its_last_recorded_epoch")
  assert theirs == (0.5, 0.01)
  assert ours == (0.25, 0.01)
