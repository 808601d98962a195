"""Multinomial logistic regression, solved to its end.

The objective is convex: its one minimum depends on no seed and no learning
rate. The penalty is chosen by cross-validation; fits to all examples and to
those of each fold run side by side, from the largest penalty to the smallest,
each from where the one before ended.

The curvature of the cross-entropy is at most X^T X / 2 for every class
(Böhning, 1992). Where this and the penalty are the unit matrix, in the
eigenvectors of X^T X scaled by (eigenvalue / 2 + penalty)^-1/2, a gradient step
of size 1 never overshoots, so there is no line search, and momentum may
restart (O'Donoghue and Candès, 2015).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqt_jax.training import linear_fit

# Penalties that are tried, as multiples of the mean squared norm of the centred
# features, until so many in a row are worse than the best. C of scikit-learn is
# 1 / (n * penalty), of features of norm 1.
PENALTIES = tuple(10.0 ** (-e / 2) for e in range(4, 19))
WORSE = 2
# A fit ends at this norm of the gradient, scaled as above, or after so many
# steps.
TOLERANCE = 1e-4
STEPS = 1000


def fit(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  folds: Sequence[np.ndarray],
  class_weights: np.ndarray | None = None,
  penalties: Sequence[float] = PENALTIES,
) -> linear_fit.LinearFit:
  """Fit a head, with the penalty that is best in cross-validation.

  Minimise mean_i w_i ce_i + penalty / 2 |kernel|^2, features having a mean
  squared norm of 1; the bias is not penalised.

  Args:
    features: (n, F) float32, on the host.
    labels: (n,) whole numbers below `num_classes`.
    num_classes: C.
    folds: rows that each fold leaves out and is judged by.
    class_weights: (C,), weights of the examples of each class; None: all 1.
    penalties: to try, from the largest on.
  """
  count = len(features)
  weights = linear_fit.example_weights(labels, class_weights)
  weights /= weights.sum()
  mean = weights @ features
  x = features - mean
  scale = np.sqrt(np.einsum("n,nf,nf->", weights, x, x)) or np.float32(1)
  x /= scale
  eigenvalues, vectors = np.linalg.eigh((x.T * weights) @ x)
  uses = np.ones((1 + len(folds), count), np.float32)
  for use, rows in zip(uses[1:], folds):
    use[rows] = 0
  problem = jax.device_put(
    (
      x @ vectors,
      np.eye(num_classes, dtype=np.float32)[labels],
      weights,
      uses,
      np.maximum(eigenvalues, 0),
    )
  )
  params = (
    np.zeros((len(uses), x.shape[1], num_classes), np.float32),
    np.zeros((len(uses), num_classes), np.float32),
  )
  best, tried = None, []
  for penalty in sorted(penalties, reverse=True):
    # A call for each, between which a signal can end the run.
    params, loss, right = _fit_all(params, *problem, jnp.float32(penalty))
    accuracy, loss = float(right) / count, float(loss)
    tried.append({"penalty": penalty, "accuracy": accuracy, "loss": loss})
    if best is None or loss < best["loss"]:
      best, kernel, bias = tried[-1], *(np.asarray(x)[0] for x in params)
    elif best not in tried[-WORSE:]:
      break
  kernel = vectors @ kernel / scale
  return linear_fit.LinearFit(
    kernel=kernel, bias=bias - mean @ kernel, **best, tried=tried[::-1]
  )


def _logits(params, x):
  kernel, bias = params
  return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias


def _loss(params, x, one_hot, share, penalty):
  """Return the cross-entropy, weighted by `share`, and the penalty.

  Args:
    params: kernel (F, C) and bias (C,).
    x: (n, F).
    one_hot: (n, C).
    share: (n,), adds up to 1.
    penalty: (F,), of the features' squared weights.
  """
  losses = optax.softmax_cross_entropy(_logits(params, x), one_hot)
  return share @ losses + jnp.sum(penalty[:, None] * params[0] ** 2) / 2


def _minimize(params, problem, rates):
  """Descend from `params`, with momentum, until the gradient is small.

  Args:
    params: kernel and bias.
    problem: further arguments of `_loss`.
    rates: of kernel and bias.
  """
  gradient_of = jax.grad(_loss)

  def going(carry):
    *_, norm, step = carry
    return (norm > TOLERANCE) & (step < STEPS)

  def improve(carry):
    params, ahead, momentum, _, step = carry
    gradient = gradient_of(ahead, *problem)
    moved = jax.tree.map(lambda p, g, r: p - r * g, ahead, gradient, rates)
    change = optax.tree.sub(moved, params)
    # Uphill, the momentum is given up.
    momentum = jnp.where(optax.tree.vdot(gradient, change) > 0, 1.0, momentum)
    grown = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
    ahead = optax.tree.add_scale(moved, (momentum - 1) / grown, change)
    return moved, ahead, grown, optax.tree.norm(gradient), step + 1

  start = (params, params, jnp.float32(1), jnp.float32(jnp.inf), 0)
  return jax.lax.while_loop(going, improve, start)[0]


@jax.jit
def _fit_all(params, x, one_hot, weights, uses, eigenvalues, penalty):
  """Fit to all examples, and to those of each fold, with a penalty.

  Args:
    params: kernels (K + 1, F, C) and biases (K + 1, C) to start from.
    x: (n, F), centred, in the basis of the eigenvectors of X^T X.
    one_hot: (n, C).
    weights: (n,), of the examples, adding up to 1.
    uses: (K + 1, n), 1 for examples that a fit uses: first all, then those of
      each of K folds.
    eigenvalues: (F,).
    penalty: scalar.

  Returns:
    Fitted params; loss, and number of right predictions, of each example by the
    fold without it.
  """
  share = uses * weights
  kept = share.sum(axis=1, keepdims=True)
  share /= kept
  left_out = (1 - uses[1:]) * weights
  scale = 1 / jnp.sqrt(eigenvalues / 2 / kept.min() + penalty)

  def fit_one(params, share):
    kernel, bias = params
    problem = (x * scale, one_hot, share, penalty * scale**2)
    start = (kernel / scale[:, None], bias)
    kernel, bias = _minimize(start, problem, (1.0, 2 * kept.min()))
    return kernel * scale[:, None], bias

  params = jax.vmap(fit_one)(params, share)
  logits = jax.vmap(_logits, (0, None))(params, x)
  losses = optax.softmax_cross_entropy(logits[1:], one_hot)
  same = jnp.argmax(logits[1:], axis=2) == jnp.argmax(one_hot, axis=1)
  return (
    params,
    jnp.sum(losses * left_out) / left_out.sum(),
    jnp.sum(same * (1 - uses[1:])),
  )
