"""Accuracies and what is uncertain about them."""

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from vqt_jax import accuracy


@pytest.mark.parametrize("right, images", [(0, 7), (7, 7), (731, 797), (1, 1)])
def test_the_interval_is_wilsons(right, images):
  found = accuracy.interval(right / images, images)
  expected = scipy.stats.binomtest(right, images).proportion_ci(method="wilson")
  assert found == pytest.approx(tuple(expected), abs=1e-12)


def test_the_interval_of_a_difference_is_newcombes():
  """Of his example, 56 of 70 and 48 of 80 (1998, table II a, method 10)."""
  tests = [accuracy.summary([1], [a / n], n) for a, n in ((56, 70), (48, 80))]
  found = accuracy.difference(*tests)
  assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_differences_image_by_image():
  """Of the counts of McNemar's table; what both have right says nothing."""
  both, ours, theirs, neither = 59, 6, 16, 80  # Images that each has right.
  right = np.repeat([1.0, 1, 0, 0], (both, ours, theirs, neither))
  other = np.repeat([1.0, 0, 1, 0], (both, ours, theirs, neither))
  n = len(right) + 2
  p, q = (ours + 1) / n, (theirs + 1) / n
  half = scipy.stats.norm.ppf(0.975) * np.sqrt((p + q - (p - q) ** 2) / n)
  found = accuracy.paired_difference(right, other)
  assert found == pytest.approx((p - q - half, p - q + half))
  a, b = accuracy.paired_difference(right, right)
  assert -a == pytest.approx(b) and 0 < b < 0.02
  ones = np.ones(2)
  assert accuracy.paired_difference(ones, 0 * ones)[1] == 1


def test_differences_of_the_same_seeds():
  """Those that both have; as the t test of pairs has it."""
  a, b = [0.9, 0.92, 0.97, 0.5], [0.1, 0.88, 0.91, 0.94]
  found = accuracy.seed_difference(
    accuracy.summary([1, 2, 3, 4], a, 100),
    accuracy.summary([5, 1, 2, 3], b, 100),
  )
  expected = scipy.stats.ttest_rel(a[:3], b[1:]).confidence_interval(0.95)
  assert found == pytest.approx(tuple(expected))
  one = accuracy.summary([1], [0.9], 100)
  assert accuracy.seed_difference(one, one) is None


@pytest.mark.parametrize("missing", ["nothing", "label", "prediction", "both"])
def test_scores_are_those_of_scikit_learn(missing):
  rng = np.random.default_rng(0)
  label, predicted = rng.choice(5, (2, 200), p=(0.5, 0.2, 0.1, 0.1, 0.1))
  if missing in ("label", "both"):
    label[label == 3] = 0
  if missing in ("prediction", "both"):
    predicted[predicted == 3] = 0
  tally = accuracy.tally(predicted, label, 5)
  for ours, theirs in (
    (accuracy.accuracy, metrics.accuracy_score(label, predicted)),
    (accuracy.macro_f1, metrics.f1_score(label, predicted, average="macro")),
  ):
    assert ours(tally) == pytest.approx(theirs, abs=1e-12)
  recall = metrics.recall_score(
    label, predicted, labels=np.unique(label), average="macro", zero_division=0
  )
  assert accuracy.balanced(tally) == pytest.approx(recall, abs=1e-12)


def test_images_count_once_whatever_the_number_of_seeds():
  one = accuracy.summary([7], [0.75], 40)
  two = accuracy.summary([7, 8], [0.7, 0.8], 40)
  assert one["interval"] == pytest.approx(two["interval"])
  assert two["std"] == pytest.approx(0.1 / 2**0.5)
  assert two["per_seed"] == {"7": 0.7, "8": 0.8} and two["images"] == 40
  assert accuracy.format_mean(two) == "75.00 +- 7.07"
  assert accuracy.format_mean(two, 1, "±") == "75.0 ± 7.1"
  assert accuracy.format_interval(two) == "59.8 to 85.8"


@pytest.mark.parametrize("std", [None, 0.0])  # 0: of an earlier program.
def test_one_seed_has_no_spread(std):
  test = accuracy.summary([7], [0.75], 40)
  assert test["std"] is None
  test["std"] = std
  assert accuracy.spread(test) is None
  assert accuracy.format_mean(test) == "75.00"
  assert accuracy.columns(test)["std_percent"] == ""
  assert accuracy.over_seeds([test]) == "one seed"


def test_an_earlier_program_did_not_write_the_interval():
  test = accuracy.summary([7, 8], [0.7, 0.8], 40)
  written = accuracy.columns(test)
  assert written == {
    "accuracy_percent": "75.00",
    "std_percent": "7.07",
    "interval_low_percent": "59.81",
    "interval_high_percent": "85.81",
  }
  del test["interval"]
  assert accuracy.columns(test) == written
  del test["images"]
  assert accuracy.bounds(test) is None and accuracy.format_interval(test) == ""
  assert accuracy.columns(test)["interval_low_percent"] == ""
