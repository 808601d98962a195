"""Accuracies with what is uncertain about them, as numbers and as words.

An accuracy is a dict as in `results.json`:

  mean      of the seeds, 0..1
  std       standard deviation over the seeds; None of one seed
  interval  [low, high], see `interval`
  per_seed  seed -> accuracy
  images    that it was measured on

Of earlier programs `std` may be 0 where there is one seed, and `interval` may
be missing: take them from here.
"""

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any

import numpy as np

LEVEL = 0.95


def summary(
  seeds: Sequence[int], accuracy: Sequence[float], images: int
) -> dict[str, Any]:
  """The accuracy of several seeds on the same images."""
  mean = float(np.mean(accuracy))
  return {
    "mean": mean,
    "std": float(np.std(accuracy, ddof=1)) if len(seeds) > 1 else None,
    "interval": list(interval(mean, images)),
    "per_seed": dict(zip(map(str, seeds), accuracy)),
    "images": images,
  }


def interval(share: float, images: int) -> tuple[float, float]:
  """The Wilson score interval of a share of n images that is right.

  All seeds are tested on the same images, so of their mean, too, n is the
  number of images. SciPy's `proportion_ci` takes whole numbers of successes
  only, which a mean need not have.

  Args:
    share: 0..1.
    images: n, at least 1.
  """
  z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
  each = z**2 / images
  centre = (share + each / 2) / (1 + each)
  half = math.sqrt(share * (1 - share) * each + each**2 / 4) / (1 + each)
  return max(0.0, centre - half), min(1.0, centre + half)


def spread(test: Mapping[str, Any]) -> float | None:
  """Standard deviation over the seeds; None of one seed."""
  return test["std"] if len(test["per_seed"]) > 1 else None


def bounds(test: Mapping[str, Any]) -> tuple[float, float] | None:
  """The interval; None if it is not known on how many images it was tested."""
  images = test.get("images")
  return interval(test["mean"], images) if images else None


def told(test: Mapping[str, Any], decimals: int = 2, sign: str = "+-") -> str:
  """Mean and spread in per cent, e.g. "97.72 +- 0.35"; of one seed the mean."""
  parts = (test["mean"], spread(test))
  return f" {sign} ".join(
    f"{100 * x:.{decimals}f}" for x in parts if x is not None
  )


def told_bounds(test: Mapping[str, Any]) -> str:
  """The interval in per cent, e.g. "96.4 to 98.6"; "" if it is unknown."""
  return " to ".join(f"{100 * x:.1f}" for x in bounds(test) or ())


def columns(test: Mapping[str, Any]) -> dict[str, str]:
  """What CSV files have of it; empty where it is unknown."""
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
  """A legend of what `told` gives of some accuracies."""
  most = max(len(test["per_seed"]) for test in tests)
  if most == 1:
    return "one seed"
  return f"mean and standard deviation over {most} seeds"
