"""From feature groups to logits."""

import math

import jax
import jax.numpy as jnp

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
  kernel = scale * jax.random.normal(key, (num_features, num_classes))
  bias = jnp.full(num_classes, -math.log(99.0), jnp.float32)
  return {"kernel": kernel, "bias": bias}


def logits(params: dict, features: jax.Array) -> jax.Array:
  """Linear head in full float32: (B, F) -> (B, classes)."""
  return (
      jnp.dot(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
      + params["bias"]
  )
