"""Ridge regression on selected features, as in Head2Toe.

A head on all features scores them by the norms of their weights, and the result
is fitted to those with the highest scores. How many these are, and the penalty,
is chosen in folds. Each of them scores features without the examples that it is
judged by: scores that have seen these choose features that fit them.

Heads are found in products of the examples, (n, n), as in the dual form of
`ridge`. So a feature costs what its products do, and a fraction of the features
is a sum of the products of fewer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.models import head as head_lib
from vqt_jax.training import linear_fit
from vqt_jax.training import ridge

# Penalties to try, as multiples of the one that is best with all features.
PENALTY_FACTORS = tuple(10.0 ** (e / 2) for e in range(-2, 3))
# (n, n) matrices at a time: products of all and of kept features, and 5 of
# `_solve`.
MATRICES = 7


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  folds: Sequence[np.ndarray],
  fractions: Sequence[float],
  class_weights: np.ndarray | None = None,
) -> linear_fit.LinearFit:
  """Fit a head to the fraction of the features that is best in the folds.

  Args:
    features: (n, F) float32, finite, on the host; overwritten.
    labels: (n,) whole numbers below `num_classes`.
    num_classes: C.
    folds: rows that each fold is judged by; together all.
    fractions: K fractions of the features, to try.
    class_weights: (C,), weights of the examples of each class; None: all 1.

  Returns:
    The head; rows of its kernel are 0 for features that are left out. `tried`
    are the penalties of the chosen fraction.

  Raises:
    UserError: as of `ridge.fit`.
  """
  count, width = features.shape
  ridge.check(count, max(count, width), MATRICES)
  examples = ridge.centre(features, labels, num_classes, class_weights)
  one_hot, share = examples.one_hot, examples.share
  whole = ridge.fit_centred(examples)
  fractions = sorted(fractions)
  penalties = whole.penalty * np.array(PENALTY_FACTORS, np.float32)
  # With few features, products say too little for smaller ones.
  penalties = np.unique(np.maximum(penalties, min(ridge.PENALTIES)))
  predicted = _cross_validate(
    examples, folds, fractions, penalties, whole.penalty
  )
  judged = np.array(
    [
      [ridge.judge(each, one_hot, share) for each in of_fraction]
      for of_fraction in predicted
    ],
    np.float64,
  )  # (K, penalties, 3)
  losses = judged[:, :, 1].round(ridge.DIGITS)
  # Of equal losses, the largest penalty of the largest fraction.
  k, i = np.argwhere(losses == losses.min())[-1]
  penalty, (temperature, loss, right) = penalties[i], judged[k, i]

  kept = _rank(whole.kernel)[: head_lib.count_kept(width, fractions[k])]
  chosen = examples.features[:, kept]
  solution, _ = _solve(
    ridge.squared(chosen.T),
    examples.root,
    one_hot,
    np.ones(count, np.float32),
    penalty[None],
  )
  kernel = np.zeros((width, num_classes), np.float32)
  kernel[kept] = ridge.transpose_times(chosen, np.asarray(solution[0]))
  kernel *= np.float32(temperature)
  accuracy = judged[:, :, 2] / count
  return linear_fit.LinearFit(
    kernel=kernel,
    bias=np.float32(temperature) * examples.target_mean
    - examples.mean @ kernel,
    penalty=float(penalty),
    temperature=float(temperature),
    accuracy=float(right / count),
    loss=float(loss),
    tried=[
      {"penalty": float(p), "accuracy": float(a), "loss": float(found[1])}
      for p, a, found in zip(penalties, accuracy[k], judged[k])
    ],
    keep_fractions=[
      {"keep_fraction": fraction, "cv_accuracy": float(each[best])}
      for fraction, each, best in zip(
        fractions, accuracy, losses.argmin(axis=1)
      )
    ],
    keep_fraction=fractions[k],
  )


def _cross_validate(
  examples: ridge.Centred,
  folds: Sequence[np.ndarray],
  fractions: Sequence[float],
  penalties: np.ndarray,
  scoring_penalty: float,
) -> np.ndarray:
  """Return predictions (K, penalties, n, C) by the fold without the example.

  Args:
    examples: n.
    folds: rows that each fold is judged by.
    fractions: K, increasing.
    penalties: of the heads on selected features.
    scoring_penalty: of the head on all features.
  """
  features, one_hot = examples.features, examples.one_hot
  shape = (len(fractions), len(penalties), *one_hot.shape)
  predicted = np.empty(shape, np.float32)
  products = ridge.squared(features.T)
  for judged in folds:
    use = np.ones(len(features), np.float32)
    use[judged] = 0
    fixed = (examples.root, one_hot, use)
    solution, _ = _solve(products, *fixed, np.float32([scoring_penalty]))
    kernel = ridge.transpose_times(features, np.asarray(solution[0]))
    ranked, done, of_kept = _rank(kernel), 0, 0
    for fraction, found in zip(fractions, predicted):
      number = head_lib.count_kept(features.shape[1], fraction)
      added = ranked[done:number]
      if len(added):
        of_kept = of_kept + ridge.squared(features[:, added].T)
      found[:, judged] = _solve(of_kept, *fixed, penalties)[1][:, judged]
      done = number
  return predicted


def largest_program(
  count: int, num_classes: int
) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
  """Return the function that solves for a penalty, with its arguments' shapes.

  Args:
    count: n.
    num_classes: C.
  """
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  some = (shape(count, 1), shape(count, num_classes), shape(count), shape(1))
  return _solve, (shape(count, count), *some)


def _rank(kernel: np.ndarray) -> np.ndarray:
  """Return features (F,), the one with the largest weights first."""
  scores = head_lib.feature_scores({"kernel": kernel})
  return head_lib.rank_features(np.asarray(scores))


@jax.jit
def _solve(
  products: jax.Array,
  root: jax.Array,
  one_hot: jax.Array,
  use: jax.Array,
  penalties: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Fit to some of the examples, with each of P penalties.

  Args:
    products: X X^T (n, n), of features that were centred on all examples and
      weighted.
    root: (n, 1), root of the weights.
    one_hot: labels (n, C).
    use: (n,), 1 for the examples to fit to, else 0.
    penalties: (P,), as multiples of the mean squared norm of these.

  Returns:
    a (P, n, C), of which the kernel is X^T a, and what the fits predict of all
    examples, (P, n, C).
  """
  dot = lambda *x: jnp.dot(*x, precision=jax.lax.Precision.HIGHEST)
  weights = use[:, None] * root**2
  target_mean = jnp.sum(weights * one_hot, axis=0) / weights.sum()
  # X, centred on those in use, is (1 - root mean) X.
  mean = (use[:, None] * root / weights.sum()).T
  products = products - dot(root, dot(mean, products))
  products = products - dot(dot(products, mean.T), root.T)
  used = use[:, None] * products * use
  scale = jnp.trace(used) / use.sum()
  scale = jnp.where(scale > 0, scale, 1.0)
  target = use[:, None] * root * (one_hot - target_mean)

  def solve(penalty):
    factor = jax.scipy.linalg.cho_factor(
      used + scale * penalty * jnp.eye(len(used)), lower=True
    )
    solution = jax.scipy.linalg.cho_solve(factor, target)
    return solution, dot(products, solution) / root + target_mean

  return jax.lax.map(solve, penalties)
