"""From feature groups to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np

NORM_FLOOR = 1e-12


def normalize(x: jax.Array) -> jax.Array:
  """Divides by the L2 norm over the last axis, floored at 1e-12.

  As torch's, the gradient of an all-zero group is that of x / 1e-12, not NaN.
  """
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  safe = jnp.where(square > NORM_FLOOR**2, square, 1.0)
  return x / jnp.where(square > NORM_FLOOR**2, jnp.sqrt(safe), NORM_FLOOR)


def init(num_features: int, num_classes: int, key: jax.Array) -> dict:
  """Kaiming normal in fan-out mode, bias -log(99): the official VQT head."""
  scale = math.sqrt(2 / num_classes)
  shape = (num_features, num_classes)
  kernel = scale * jax.random.normal(key, shape, jnp.float32)
  bias = jnp.full(num_classes, -math.log(99.0), jnp.float32)
  return {"kernel": kernel, "bias": bias}


def logits(params: dict, features: jax.Array) -> jax.Array:
  """Linear head in full float32: (B, F) -> (B, classes)."""
  return (
    jnp.dot(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    + params["bias"]
  )


def scores(params: dict) -> jax.Array:
  """How much the head uses each feature, (F,): L2 norm over the classes.

  The gradient at a row of zeros is 0, as torch's, not NaN.
  """
  square = jnp.sum(params["kernel"] ** 2, axis=-1)
  safe = jnp.where(square > 0, square, 1.0)
  return jnp.where(square > 0, jnp.sqrt(safe), 0.0)


def best(scores: np.ndarray, fraction: float) -> np.ndarray:
  """The features to keep, (..., F) float32 of 0 and 1, by scores (..., F).

  Of F features the int(F * fraction) (but at least 1) with the largest scores,
  of equal ones the first.
  """
  count = max(1, int(scores.shape[-1] * fraction))
  rank = np.argsort(-scores, axis=-1, kind="stable")
  kept = np.zeros(scores.shape, np.float32)
  np.put_along_axis(kept, rank[..., :count], 1, axis=-1)
  return kept


def select(params: dict, kept: jax.Array) -> dict:
  """The head without the features that are not kept, (F,) of 0 and 1."""
  return {**params, "kernel": params["kernel"] * kept[..., None]}
