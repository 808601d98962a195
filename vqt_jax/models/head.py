"""The linear head, and the selection of its features."""

import math

import jax
import jax.numpy as jnp
import numpy as np

NORM_FLOOR = 1e-12


def normalize(x: jax.Array) -> jax.Array:
  """Divide by the L2 norm over the last axis, floored at 1e-12.

  As in torch, the gradient of an all-zero group is that of x / 1e-12, not NaN.
  """
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  safe = jnp.where(square > NORM_FLOOR**2, square, 1.0)
  return x / jnp.where(square > NORM_FLOOR**2, jnp.sqrt(safe), NORM_FLOOR)


def init(num_features: int, num_classes: int, key: jax.Array) -> dict:
  """Initialise as the official VQT head: Kaiming normal (fan-out), -log(99)."""
  scale = math.sqrt(2 / num_classes)
  shape = (num_features, num_classes)
  kernel = scale * jax.random.normal(key, shape, jnp.float32)
  bias = jnp.full(num_classes, -math.log(99.0), jnp.float32)
  return {"kernel": kernel, "bias": bias}


def init_layer(num_features: int, num_classes: int, key: jax.Array) -> dict:
  """Initialise as a layer of a network (LeCun normal, biases 0)."""
  shape = (num_features, num_classes)
  kernel = jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)
  return {"kernel": kernel, "bias": jnp.zeros(num_classes, jnp.float32)}


def logits(params: dict, features: jax.Array) -> jax.Array:
  """Apply the head in full float32: (B, F) -> (B, classes)."""
  return (
    jnp.dot(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    + params["bias"]
  )


def feature_scores(params: dict) -> jax.Array:
  """L2 norm over the classes of each feature's weights, (F,).

  As in torch, the gradient at a row of zeros is 0, not NaN.
  """
  square = jnp.sum(params["kernel"] ** 2, axis=-1)
  safe = jnp.where(square > 0, square, 1.0)
  return jnp.where(square > 0, jnp.sqrt(safe), 0.0)


def rank_features(scores: np.ndarray) -> np.ndarray:
  """Return indices (..., F) that sort scores, the largest first; stable."""
  return np.argsort(-scores, axis=-1, kind="stable")


def count_kept(num_features: int, fraction: float) -> int:
  """Return int(F * fraction), but at least one."""
  return max(1, int(num_features * fraction))


def feature_mask(scores: np.ndarray, fraction: float) -> np.ndarray:
  """Select the features with the largest scores.

  Args:
    scores: (..., F).
    fraction: of the features; see `count_kept`.

  Returns:
    (..., F) float32, 1 for selected features and 0 for others.
  """
  kept = rank_features(scores)[..., : count_kept(scores.shape[-1], fraction)]
  mask = np.zeros(scores.shape, np.float32)
  np.put_along_axis(mask, kept, 1, axis=-1)
  return mask


def mask_features(params: dict, mask: jax.Array) -> dict:
  """Return the head with the rows of features outside of the mask set to 0."""
  return {**params, "kernel": params["kernel"] * mask[..., None]}


def spread_rows(
  rows: np.ndarray, kernel: np.ndarray, num_features: int
) -> np.ndarray:
  """Return the kernel (F, classes) of a head of which some rows are stored.

  Args:
    rows: numbers of the features in use, increasing; the other rows are 0.
    kernel: the rows of these.
    num_features: F.

  Raises:
    ValueError: `rows` are not such numbers, one for each row of `kernel`.
  """
  if not (
    np.issubdtype(rows.dtype, np.integer)
    and rows.shape == kernel.shape[:1]
    and (np.diff(rows.astype(np.int64)) > 0).all()
    and (rows >= 0).all()
    and (rows < num_features).all()
  ):
    raise ValueError(
      f"expected increasing numbers of features below {num_features}, one for"
      " each row of the head"
    )
  whole = np.zeros((num_features, *kernel.shape[1:]), kernel.dtype)
  whole[rows] = kernel
  return whole
