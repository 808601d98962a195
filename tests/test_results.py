"""Results that are read: right types and lengths, or a sentence."""

import copy
import json

import numpy as np
import pytest

from benchmarks import mutate_files
from vqt_jax import errors
from vqt_jax import results
from vqt_jax.runtime import files

GOOD = mutate_files.RESULTS


def changed(place, value):
  new = copy.deepcopy(GOOD)
  *holders, last = place.split("/")
  within = new
  for key in holders:
    within = within[int(key) if key.isdigit() else key]
  if value is KeyError:
    del within[last]
  else:
    within[last] = value
  return new


def test_good_results(tmp_path):
  files.write_json(tmp_path / "results.json", GOOD)
  assert results.read(tmp_path) == results.read_to_compare(tmp_path) == GOOD


@pytest.mark.parametrize(
  "place, value",
  [
    ("test_accuracy", None),
    ("test_accuracy/mean", 1.5),
    ("test_accuracy/mean", "0.5"),
    ("test_accuracy/per_seed", {}),
    ("test_accuracy/per_seed/1", -0.1),
    ("test_accuracy/std", None),
    ("test_accuracy/images", 0),
    ("tested", []),
    ("tested", {}),
    ("tested/0/kept_share", []),
    ("tested/0/trained_parameters", None),
    ("search/chosen", 2),
    ("search/chosen", -1),
    ("search/val_accuracy", [0.5]),
    ("search/runs", [1]),
    ("selection/chosen", 0.7),
    ("selection/keep_fractions", [{"keep_fraction": 0.5}]),
    ("seeds/history", []),
    ("seeds/history", [{"loss": [1.0], "accuracy": [1.0, 1.0]}]),
    ("seconds/training", KeyError),
    ("trained_parameters", 2**63),
    ("trained_parameters", True),
    ("chosen", {"lr": []}),
    ("data/splits", {"test": {"images": 1}}),
    ("backbone", 3),
    ("best", {"finalists": []}),
    ("search", KeyError),
  ],
)
def test_results_that_are_off(tmp_path, place, value):
  path = tmp_path / "results.json"
  path.write_text(json.dumps(changed(place, value)))
  with pytest.raises(errors.UserError, match="Cannot read .*results.json"):
    results.read(tmp_path)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 99])
def test_numbers_that_are_none(tmp_path, text):
  (tmp_path / "a.json").write_text(f'{{"a": [{text}]}}')
  with pytest.raises(errors.UserError, match="out of range"):
    files.read_json(tmp_path / "a.json")


def test_answers_are_read_with_the_results_they_belong_to(tmp_path):
  path = tmp_path / results.PREDICTIONS
  assert results.read_predictions(tmp_path, GOOD) is None
  mutate_files.write_predictions(tmp_path)
  found = results.read_predictions(tmp_path, GOOD)
  assert [x.shape for x in found] == [(100,), (2, 100), (100,), (100,)]
  assert found.right.mean() == pytest.approx(GOOD["test_accuracy"]["mean"])
  for place, value in (("images", 99), ("per_seed", {"1": 0.5, "2": 0.5})):
    other = changed(f"test_accuracy/{place}", value)
    with pytest.raises(errors.UserError, match="Cannot read .*Delete it to"):
      results.read_predictions(tmp_path, other)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match="Cannot read .*Delete it to"):
    results.read_predictions(tmp_path, GOOD)


def test_probabilities_that_are_unknown(tmp_path):
  """Of seeds that have diverged, or were not tested together."""
  mutate_files.write_predictions(tmp_path)
  label, predicted, together, _ = results.read_predictions(tmp_path, GOOD)
  seeds, unknown = [*GOOD["test_accuracy"]["per_seed"]], np.full(100, np.nan)
  for last, kept in ((together, together), (np.full(100, -1), None)):
    rows = np.stack([*predicted, last])
    results.write_predictions(tmp_path, seeds, label, rows, unknown)
    found = results.read_predictions(tmp_path, GOOD)
    np.testing.assert_array_equal(found.together, kept)
    assert found.probability is None


def test_what_earlier_versions_left_out(tmp_path):
  old = copy.deepcopy(GOOD)
  del old["memory"], old["tuned_bytes"], old["seconds"]["epoch"]
  del old["data"], old["weights"], old["test_accuracy"]["images"]
  files.write_json(tmp_path / "results.json", old)
  assert results.read_to_compare(tmp_path) == old
