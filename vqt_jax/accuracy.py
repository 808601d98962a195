"""Accuracies with their uncertainty, as numbers and as text.

They are computed from a tally, (3, C), numbers of examples of each class: right
ones; those that are taken for it; those that are of it.

An accuracy is a dict as in `results.json`:

  mean      of the seeds, 0..1
  std       standard deviation over the seeds; None for one seed
  interval  [low, high], see `interval`
  per_seed  seed -> accuracy
  images    number of test images

Earlier versions wrote `std` 0 for one seed, and no `interval`: use `spread` and
`bounds`.
"""

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any

import numpy as np

LEVEL = 0.95
_Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


def tally(
  predicted: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
  """Count the examples of each class, (3, C), see the top of this file.

  Args:
    predicted: (n,) classes.
    label: (n,) classes.
    num_classes: C.
  """
  right = label[predicted == label]
  return np.stack(
    [np.bincount(x, minlength=num_classes) for x in (right, predicted, label)]
  )


def accuracy(tally: np.ndarray) -> float:
  """Share of the examples that are right."""
  right, _, there = tally
  return float(right.sum() / there.sum())


def balanced(tally: np.ndarray) -> float:
  """Mean accuracy of the classes that there are examples of."""
  right, _, there = tally[:, tally[2] > 0]
  return float(np.mean(right / there))


def macro_f1(tally: np.ndarray) -> float:
  """Mean F1 score of the classes that occur, as labels or predictions."""
  right, taken, there = tally[:, tally[1] + tally[2] > 0]
  return float(np.mean(2 * right / (taken + there)))


def over(seeds: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
  """Summarise a number of several seeds: `mean`, `std` and `per_seed`."""
  return {
    "mean": float(np.mean(values)),
    "std": float(np.std(values, ddof=1)) if len(seeds) > 1 else None,
    "per_seed": dict(zip(map(str, seeds), values)),
  }


def summary(
  seeds: Sequence[int], accuracy: Sequence[float], images: int
) -> dict[str, Any]:
  """Summarise the accuracy of several seeds on the same images."""
  found = over(seeds, accuracy)
  return {
    "mean": found["mean"],
    "std": found["std"],
    "interval": list(interval(found["mean"], images)),
    "per_seed": found["per_seed"],
    "images": images,
  }


def interval(share: float, images: int) -> tuple[float, float]:
  """Return the Wilson score interval of a share of n images.

  All seeds are tested on the same images, so n is the number of images for
  their mean, too. SciPy's `proportion_ci` takes whole numbers of successes
  only.

  Args:
    share: 0..1.
    images: n, at least 1.
  """
  each = _Z**2 / images
  centre = (share + each / 2) / (1 + each)
  half = math.sqrt(share * (1 - share) * each + each**2 / 4) / (1 + each)
  return max(0.0, centre - half), min(1.0, centre + half)


def spread(test: Mapping[str, Any]) -> float | None:
  """Return the standard deviation over the seeds; None for one seed."""
  return test["std"] if len(test["per_seed"]) > 1 else None


def bounds(test: Mapping[str, Any]) -> tuple[float, float] | None:
  """Return the interval; None if the number of images is unknown."""
  images = test.get("images")
  return interval(test["mean"], images) if images else None


def difference(
  test: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[float, float] | None:
  """Return the interval of an accuracy minus another, of other images.

  Newcombe's (1998, method 10) from Wilson's of each, which takes the two to be
  independent: on the same images it is too wide if both err on the same ones.
  None if a number of images is unknown.
  """
  if not (bounds(test) and bounds(other)):
    return None
  (low, high), (other_low, other_high) = bounds(test), bounds(other)
  a, b = test["mean"], other["mean"]
  below = math.hypot(a - low, other_high - b)
  above = math.hypot(high - a, b - other_low)
  return a - b - below, a - b + above


def paired_difference(
  right: np.ndarray, other: np.ndarray
) -> tuple[float, float]:
  """Return the interval of an accuracy minus another, of other such images.

  Of Bonett and Price (2012): the normal interval of the mean of the differences
  image by image, after an image is added that only one has right, and one that
  only the other has. Without these two it would be empty for equal answers, and
  is too narrow where few differ.

  Args:
    right: (n,) shares of the seeds that are right about each image, 0..1.
    other: (n,) those of the other model, of the same images.
  """
  each = np.append(right - other, (1.0, -1.0))
  half = _Z * each.std() / math.sqrt(len(each))
  low, high = each.mean() - half, each.mean() + half
  return max(-1.0, float(low)), min(1.0, float(high))


def seed_difference(
  test: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[float, float] | None:
  """Return the interval of an accuracy minus another, of other seeds.

  Student's t of the differences of the seeds that both have, on the same
  images. None for fewer than two.
  """
  import scipy.special  # Here, as it takes a while.

  theirs = other["per_seed"]
  found = [a - theirs[s] for s, a in test["per_seed"].items() if s in theirs]
  if len(found) < 2:
    return None
  t = scipy.special.stdtrit(len(found) - 1, (1 + LEVEL) / 2)
  half = float(t) * statistics.stdev(found) / math.sqrt(len(found))
  return statistics.mean(found) - half, statistics.mean(found) + half


def format_mean(
  test: Mapping[str, Any], decimals: int = 2, sign: str = "+-"
) -> str:
  """Format mean and spread in per cent: "97.72 +- 0.35"; one seed: "97.72"."""
  parts = (test["mean"], spread(test))
  return f" {sign} ".join(
    f"{100 * x:.{decimals}f}" for x in parts if x is not None
  )


def format_interval(test: Mapping[str, Any]) -> str:
  """Format the interval in per cent: "96.4 to 98.6"; "" if it is unknown."""
  return " to ".join(f"{100 * x:.1f}" for x in bounds(test) or ())


def columns(test: Mapping[str, Any]) -> dict[str, str]:
  """Return columns for CSV files; "" where a value is unknown."""
  low, high = bounds(test) or (None, None)
  values = {
    "accuracy_percent": test["mean"],
    "std_percent": spread(test),
    "interval_low_percent": low,
    "interval_high_percent": high,
  }
  return {
    name: "" if x is None else f"{100 * x:.2f}" for name, x in values.items()
  }


def over_seeds(tests: Sequence[Mapping[str, Any]]) -> str:
  """Return a legend for `format_mean` of some accuracies."""
  most = max(len(test["per_seed"]) for test in tests)
  if most == 1:
    return "one seed"
  return f"mean and standard deviation over {most} seeds"
