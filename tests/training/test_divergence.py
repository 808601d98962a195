"""Losses that are not finite: what is said, and who goes on."""

import re

import numpy as np
import pytest

import main
from tests import helpers
from tests import runs
from vqt_jax import checkpoints

TOO_HIGH = 3e38 * 256 / 12  # As a peak rate: the largest float32.


def command(material, workdir, **changes):
  return runs.command(material, workdir, method="linear", **changes)


def test_a_run_stops_with_epoch_step_and_setting(material, tmp_path, capfd):
  for _ in range(2):  # Started again it comes to the same end.
    assert main.main(command(material, tmp_path, lr=TOO_HIGH)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    told = re.fullmatch(
      r"error: The loss became (nan|inf) in epoch 2, step (\d) of 4 \(lr"
      r" 6\.4e\+39 \(x 12/256 = 3e\+38\), weight decay 0.0001, seed 7,"
      r" stage seeds\)\. .*",
      error,
    )
    assert told and 2 <= int(told[2]) <= 4, error
  assert [row["epoch"] for row in runs.metrics(tmp_path)] == [1, 1]
  assert not (tmp_path / "results.json").exists()


def test_in_a_search_the_others_go_on(material, tmp_path, capfd):
  changes = dict(lr=f"{TOO_HIGH},0.1", checkpoint_seconds=0)
  assert main.main(command(material, tmp_path / "a", **changes)) == 0
  found = runs.results(tmp_path / "a")
  assert found["search"]["diverged"] == [0]
  assert found["chosen"]["lr"] == pytest.approx(0.1 * 12 / 256)
  losses = [row["loss"] for row in runs.metrics(tmp_path / "a")]
  assert losses[:2] == [pytest.approx(losses[0]), losses[1]]
  assert losses[4] is None and losses[5] > 0
  assert (
    "0 of 1 others within 0.5 points, 1 diverged)" in capfd.readouterr().err
  )
  # And the runs beside it did not notice.
  assert main.main(command(material, tmp_path / "b", lr="0.1")) == 0
  alone = runs.results(tmp_path / "b")
  assert alone["test_accuracy"] == found["test_accuracy"]
  assert alone["seeds"]["history"] == found["seeds"]["history"]


def test_a_search_in_which_all_diverge(material, tmp_path, capfd):
  lr = f"{TOO_HIGH},{TOO_HIGH / 2}"
  assert main.main(command(material, tmp_path, lr=lr)) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert re.search(r"in epoch \d, step \d of 4 .*stage search\)", error)


def test_inputs_that_are_not_finite(material, tmp_path, capfd):
  """Here the backbone makes them so, from the first step on."""
  backbone = helpers.tiny_backbone(image_size=(8, 8))
  backbone.params["embedding"]["bias"][0] = np.finfo(np.float32).max
  checkpoints.save_npz(tmp_path / "vit.npz", backbone)
  changes = dict(init=tmp_path / "vit.npz", lr=0.1)
  assert main.main(command(material, tmp_path / "run", **changes)) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert "The loss became nan in epoch 1, step 1 of 4 (lr 0.1 (" in error
