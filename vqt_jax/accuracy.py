"""Accuracies with their uncertainty, as numbers and as text.

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


def summary(
  seeds: Sequence[int], accuracy: Sequence[float], images: int
) -> dict[str, Any]:
  """Summarise the accuracy of several seeds on the same images."""
  mean = float(np.mean(accuracy))
  return {
    "mean": mean,
    "std": float(np.std(accuracy, ddof=1)) if len(seeds) > 1 else None,
    "interval": list(interval(mean, images)),
    "per_seed": dict(zip(map(str, seeds), accuracy)),
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
  z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
  each = z**2 / images
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
