"""Scaling of pixels to the inputs of a backbone: its value range."""

from collections.abc import Sequence

import numpy as np

from vqt_jax import errors

# Name -> (mean, std) per RGB channel, for images in 0..1.
VALUE_RANGES = {
  "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
  ),
}
_Channels = tuple[float, float, float]


def find_scaling(value_range: str) -> tuple[_Channels, _Channels]:
  """Return (mean, std) per RGB channel of images in 0..1.

  Args:
    value_range: key of `VALUE_RANGES`, or the numbers: "M,M,M/S,S,S".

  Raises:
    UserError: it is neither.
  """
  if value_range in VALUE_RANGES:
    return VALUE_RANGES[value_range]
  try:
    mean, std = (
      tuple(float(number) for number in part.split(","))
      for part in value_range.split("/")
    )
  except (AttributeError, ValueError):
    mean = std = ()
  if len(mean) == len(std) == 3 and np.isfinite(mean + std).all() and all(std):
    return mean, std
  raise errors.UserError(
    f"value_range {value_range!r}: expected one of {', '.join(VALUE_RANGES)},"
    " or mean and standard deviation of images in 0..1 per channel, such as"
    " 0.5,0.5,0.5/0.25,0.25,0.25."
  )


def unscale(images: np.ndarray, value_range: str) -> np.ndarray:
  """Return a backbone's inputs (..., 3) as images in 0..1."""
  mean, std = map(np.array, find_scaling(value_range))
  return np.clip(images * std + mean, 0, 1)


def name_scaling(mean: Sequence[float], std: Sequence[float]) -> str:
  """Return the value range with this mean and deviation per channel."""
  given = tuple(map(float, mean)), tuple(map(float, std))
  names = [name for name, known in VALUE_RANGES.items() if known == given]
  numbers = "/".join(",".join(map(repr, numbers)) for numbers in given)
  return names[0] if names else numbers
