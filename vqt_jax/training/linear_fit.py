"""A linear head that `ridge`, `selected_ridge` or `logistic` computed."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearFit:
  """A linear head, and how its penalty was chosen.

  Attributes:
    kernel: (F, C) float32.
    bias: (C,) float32.
    penalty: as a multiple of the mean squared norm of the centred features.
    accuracy: on examples that a fit did not see.
    loss: mean cross-entropy of these, nats.
    tried: of every penalty {"penalty", "accuracy", "loss"}, increasing.
    temperature: factor of kernel and bias that fits the softmax of the logits
      to the labels; None: the fit itself does.
    keep_fractions: of every fraction of the features that was tried
      {"keep_fraction", "cv_accuracy"}; None: all features are in use.
    keep_fraction: the chosen one.
  """

  kernel: np.ndarray
  bias: np.ndarray
  penalty: float
  accuracy: float
  loss: float
  tried: list[dict[str, float]]
  temperature: float | None = None
  keep_fractions: list[dict[str, float]] | None = None
  keep_fraction: float = 1.0


def example_weights(
  labels: np.ndarray, class_weights: np.ndarray | None
) -> np.ndarray:
  """Return the weights of examples (n,) float32; 1 without class weights."""
  if class_weights is None:
    return np.ones(len(labels), np.float32)
  return class_weights[labels].astype(np.float32)
