"""Linear heads in closed form, and what leaving each example out would give.

Ridge regression of one-hot labels on features, with a bias that is not
penalised, is a linear smoother: what it predicts of an example that it was not
fitted to follows from the fit to all (Allen, 1974, "PRESS"). So penalty and
temperature are chosen by all n examples and no validation split.

With features and one-hot labels X (n, F) and Y (n, C), centred and multiplied
by the square root s of the examples' weights, and u = s / |s|:

  dual, n <= F     A = X X^T + p I + q u u^T    a = A^-1 Y        W = X^T a
                   1 - h_i = p [A^-1]_ii - u_i^2 p / (p + q)
  primal, n > F    A = X^T X + p I              W = A^-1 X^T Y
                   1 - h_i = 1 - x_i^T A^-1 x_i - u_i^2
  without i        y_i - (Y - X W)_i / (s_i (1 - h_i))

X^T u = 0, so any q > 0 gives the same W; with q = 0 the small 1 - h_i would be
a difference of large numbers.

Everything is float32; A is factorised (Cholesky), never inverted to solve.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqt_jax import errors
from vqt_jax.runtime import memory
from vqt_jax.runtime import units
from vqt_jax.training import linear_fit

# Penalties that are tried, as multiples of the mean squared norm of the centred
# features; then others around the best. Smaller ones drown in rounding.
PENALTIES = tuple(10.0**e for e in range(-4, 3))
FINER = tuple(10.0 ** (e / 4) for e in (-3, -2, -1, 1, 2, 3))
TEMPERATURES = (0.1, 100.0)  # Bounds of the factor of the logits.
# Where all images are told apart with ease, losses near 0 and rounding would
# choose. So losses that agree to these digits are equal, the larger penalty
# wins, and a temperature rises no more where it would not change them.
DIGITS = 5
AT_ONCE = 4096  # Rows or columns of features that are on the device.
# Matrices of the size of A that there are at a time: A, its factor, an inverse.
MATRICES = 4
PARTS = 3  # Likewise, arrays of so many rows.
# Where memory does not suffice.
ADVICE = (
  "Take fewer images or queries (config.num_queries), another method, or if it"
  " is head2toe config.solver=gradient."
)


@dataclasses.dataclass(frozen=True)
class Centred:
  """Examples whose features and targets have mean 0, weighted by s.

  Attributes:
    features: X (n, F) float32, on the host.
    target: Y (n, C).
    mean: (F,), of the features before.
    target_mean: (C,).
    one_hot: labels (n, C).
    root: s (n, 1).
    share: u^2 (n,), which add up to 1.
  """

  features: np.ndarray
  target: np.ndarray
  mean: np.ndarray
  target_mean: np.ndarray
  one_hot: np.ndarray
  root: np.ndarray
  share: np.ndarray


def centre(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  class_weights: np.ndarray | None = None,
) -> Centred:
  """Centre and weight examples; arguments are those of `fit`."""
  weights = linear_fit.example_weights(labels, class_weights)
  share = weights / weights.sum()
  one_hot = np.eye(num_classes, dtype=np.float32)[labels]
  target_mean, mean = share @ one_hot, share @ features
  features -= mean
  root = np.sqrt(weights)[:, None]
  if class_weights is not None:
    features *= root
  target = root * (one_hot - target_mean)
  return Centred(features, target, mean, target_mean, one_hot, root, share)


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  class_weights: np.ndarray | None = None,
) -> linear_fit.LinearFit:
  """Fit a head, with the penalty that is best if each example is left out.

  Args:
    features: (n, F) float32, finite, on the host; overwritten.
    labels: (n,) whole numbers below `num_classes`.
    num_classes: C.
    class_weights: (C,), weights of the examples of each class; None: all 1.

  Raises:
    UserError: there are fewer than two examples, or the matrix to factorise
      does not fit in memory.
  """
  check(*features.shape)
  return fit_centred(centre(features, labels, num_classes, class_weights))


def fit_centred(examples: Centred) -> linear_fit.LinearFit:
  """Fit a head as `fit` does, to centred examples, which stay as they are."""
  features, target, share = examples.features, examples.target, examples.share
  count, width = features.shape
  scale = float(np.einsum("nf,nf->", features, features) / count) or 1.0
  dual = count <= width
  if dual:
    matrix = squared(features.T)
    matrix += scale * np.outer(np.sqrt(share), np.sqrt(share))
    evaluate = functools.partial(_solve_dual, matrix, scale)
  else:
    matrix = squared(features)
    side = transpose_times(features, target)
    evaluate = functools.partial(_solve_primal, matrix, side, features)
  tried, best, solution = {}, None, None
  rank = lambda penalty: (round(tried[penalty][0], DIGITS), -penalty)
  for factors in (PENALTIES, FINER):
    middle = best or 1.0
    for penalty in (middle * factor for factor in factors):
      found, error = evaluate(target, share, jnp.float32(penalty * scale))
      predicted = examples.one_hot - error / examples.root
      temperature, loss, right = judge(predicted, examples.one_hot, share)
      tried[penalty] = (float(loss), float(right) / count, float(temperature))
      if penalty == min(tried, key=rank):
        best, solution = penalty, found
  loss, accuracy, temperature = tried[best]
  kernel = np.asarray(solution)
  if dual:
    kernel = transpose_times(features, kernel)
  kernel = temperature * kernel
  return linear_fit.LinearFit(
    kernel=kernel,
    bias=temperature * examples.target_mean - examples.mean @ kernel,
    penalty=best,
    temperature=temperature,
    accuracy=accuracy,
    loss=loss,
    tried=[
      {"penalty": p, "accuracy": tried[p][1], "loss": tried[p][0]}
      for p in sorted(tried)
    ],
  )


def largest_program(
  count: int, width: int, num_classes: int
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
  """Return the function that solves for a penalty, with its arguments' shapes.

  Args:
    count: n.
    width: F.
    num_classes: C.
  """
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  if count <= width:
    last = (shape(count, num_classes), shape(count), shape())
    return _solve_dual, (shape(count, count), shape(), *last)
  rows = min(count, AT_ONCE)
  first = (shape(width, width), shape(width, num_classes), shape())
  some = (shape(rows, width), shape(rows, num_classes), shape(rows))
  return _solve_first_rows, (*first, *some)


def check(count: int, width: int, matrices: int = MATRICES) -> None:
  """Raise a `UserError` if n examples with F features are too few or many.

  Args:
    count: n.
    width: F.
    matrices: of the size to factorise that are held at a time.
  """
  if count < 2:
    raise errors.UserError(
      f"Expected at least two images to train on, found {count}."
    )
  size = min(count, width)
  needed = 4 * size * (matrices * size + PARTS * min(count, AT_ONCE))
  available = memory.device_memory()
  if needed > available:
    raise errors.UserError(
      f"The exact head of {count:,} images and {width:,} features needs"
      f" {units.format_bytes(needed)} of a device, which has"
      f" {units.format_bytes(available)}. {ADVICE}"
    )


def squared(x: np.ndarray) -> jax.Array:
  """Return x^T x, a few rows of x at a time."""
  matrix = jnp.zeros((x.shape[1],) * 2, jnp.float32)
  for start in range(0, len(x), AT_ONCE):
    matrix = _add_square(matrix, x[start : start + AT_ONCE])
  return matrix


@functools.partial(jax.jit, donate_argnums=0)
def _add_square(matrix: jax.Array, x: jax.Array) -> jax.Array:
  return matrix + _product(x.T, x)


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST)


def transpose_times(features: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Return features^T right, (F, C), a few columns of features at a time."""
  starts = range(0, features.shape[1], AT_ONCE)
  parts = [_product(features[:, s : s + AT_ONCE].T, right) for s in starts]
  return np.concatenate([np.asarray(part) for part in parts])


@jax.jit
def _solve_dual(
  matrix: jax.Array,
  shift: float,
  target: jax.Array,
  share: jax.Array,
  penalty: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return a (n, C), and the errors of predictions without each example.

  Args:
    matrix: A without the penalty.
    shift: q.
    target: Y.
    share: u^2.
    penalty: p.
  """
  unit = jnp.eye(len(matrix))
  factor = jnp.linalg.cholesky(matrix + penalty * unit)
  solution = jax.scipy.linalg.cho_solve((factor, True), target)
  inverse = jax.scipy.linalg.solve_triangular(factor, unit, lower=True)
  kept = jnp.sum(inverse**2, axis=0) - share / (penalty + shift)
  return solution, solution / kept[:, None]


def _solve_primal(
  matrix: jax.Array,
  side: np.ndarray,
  features: np.ndarray,
  target: np.ndarray,
  share: np.ndarray,
  penalty: jax.Array,
) -> tuple[jax.Array, np.ndarray]:
  """Return W (F, C), and the errors of predictions without each example.

  A few examples at a time are on the device.
  """
  parts = [
    [x[start : start + AT_ONCE] for x in (features, target, share)]
    for start in range(0, len(features), AT_ONCE)
  ]
  factor, kernel, error = _solve_first_rows(matrix, side, penalty, *parts[0])
  found = [error, *(_errors(factor, kernel, *part) for part in parts[1:])]
  return kernel, np.concatenate([np.asarray(each) for each in found])


@jax.jit
def _solve_first_rows(
  matrix: jax.Array,
  side: jax.Array,
  penalty: jax.Array,
  features: jax.Array,
  target: jax.Array,
  share: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the factor of A, W, and the errors of the first examples."""
  factor = jnp.linalg.cholesky(matrix + penalty * jnp.eye(len(matrix)))
  kernel = jax.scipy.linalg.cho_solve((factor, True), side)
  return factor, kernel, _errors(factor, kernel, features, target, share)


@jax.jit
def _errors(
  factor: jax.Array,
  kernel: jax.Array,
  features: jax.Array,
  target: jax.Array,
  share: jax.Array,
) -> jax.Array:
  half = jax.scipy.linalg.solve_triangular(factor, features.T, lower=True)
  kept = 1 - jnp.sum(half**2, axis=0) - share
  return (target - _product(features, kernel)) / kept[:, None]


@jax.jit
def judge(
  predicted: jax.Array, one_hot: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return temperature, cross-entropy and number of right predictions.

  The cross-entropy is infinite where the matrix could not be factorised.

  Args:
    predicted: (n, C), of fits that did not see the example.
    one_hot: labels (n, C).
    share: (n,), weights that add up to 1.
  """
  temperature = _temperature(predicted, one_hot, share)
  loss = jnp.maximum(0, _loss(temperature * predicted, one_hot, share))
  right = jnp.argmax(predicted, axis=1) == jnp.argmax(one_hot, axis=1)
  return temperature, jnp.where(jnp.isfinite(loss), loss, jnp.inf), right.sum()


def _loss(logits: jax.Array, one_hot: jax.Array, share: jax.Array) -> jax.Array:
  return share @ optax.softmax_cross_entropy(logits, one_hot)


def _temperature(
  logits: jax.Array, one_hot: jax.Array, share: jax.Array
) -> jax.Array:
  """Return the factor of logits with the least cross-entropy.

  It is convex in the factor, so bisection on its derivative finds it.
  """
  slope = jax.grad(lambda factor: _loss(factor * logits, one_hot, share))

  def halve(_, bounds):
    low, high = bounds
    middle = jnp.sqrt(low * high)
    rising = middle * slope(middle) > -(10**-DIGITS)
    return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

  bounds = tuple(map(jnp.float32, TEMPERATURES))
  low, high = jax.lax.fori_loop(0, 30, halve, bounds)
  return jnp.sqrt(low * high)
