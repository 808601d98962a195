"""The weighted mean of tokens that queries read, from rows of a store by parts.

Reading goes over a block's tokens four times with little arithmetic: scores and
mean, and the gradient of both. A CPU does the two of each direction from its
cache if a part of the batch fits there; all that follows (projections, MLP) is
better done for the whole batch. So only this is done by parts, with a gradient
of its own: JAX's would keep the tokens of all parts.

A store holds tokens, which then are the keys and the values of all heads, or
the keys and values of each head (see `train.store`).
"""

import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

# A name for `jax.checkpoint` policies: what the gradient needs of the tokens.
KEPT = "token_mean"

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def by_parts(u: jax.Array, tokens: jax.Array, rows: jax.Array) -> jax.Array:
  """Softmax-weighted means of values, `softmax(keys u) values`.

  Args:
    u: (H, T, K), or (B, H, T, K) for each example its own; its dtype is that
      of the products.
    tokens: what is stored, (n, N, D) and then K = D, or keys and values
      (n, 2, H, N, K); not differentiated.
    rows: (parts, b) int32, the B = parts * b examples to read.

  Returns:
    (B, H, T, K), float32.
  """
  return _forward(u, tokens, rows)[0]


def _forward(u, tokens, rows):
  read = "bnd" if tokens.ndim == 3 else "bhnd"

  def part(inputs):
    mine, some = inputs
    mine = u if mine is None else mine
    keys, values = _take(tokens, some, u.dtype)
    weights = jax.nn.softmax(_scores(keys, read, mine), axis=3)
    return dot(f"bhtn,{read}->bhtd", weights.astype(u.dtype), values), weights

  mean, weights = jax.lax.map(part, (_cut(u, rows), rows))
  mean, weights = (
    ad_checkpoint.checkpoint_name(x, KEPT)
    for x in (mean.reshape(-1, *mean.shape[2:]), weights)
  )
  return mean, (u, tokens, rows, weights)


def _backward(kept, cotangent):
  u, tokens, rows, weights = kept
  cotangent = cotangent.astype(u.dtype).reshape(*rows.shape, *u.shape[-3:])
  read = "bnd" if tokens.ndim == 3 else "bhnd"

  def part(total, inputs):
    some, weights, of_mean = inputs
    keys, values = _take(tokens, some, u.dtype)
    of_weights = _scores(values, read, of_mean)
    of_scores = of_weights - (weights * of_weights).sum(3, keepdims=True)
    of_scores = (weights * of_scores).astype(u.dtype)
    of_u = dot(f"bhtn,{read}->{_axes(u)}", of_scores, keys)
    return (total, of_u) if u.ndim == 4 else (total + of_u, None)

  zero = jnp.zeros(() if u.ndim == 4 else u.shape, jnp.float32)
  total, each = jax.lax.scan(part, zero, (rows, weights, cotangent))
  of_u = total if each is None else each.reshape(u.shape)
  return of_u.astype(u.dtype), None, None


by_parts.defvjp(_forward, _backward)


def _scores(keys: jax.Array, read: str, u: jax.Array) -> jax.Array:
  """(b, H, T, N), of keys with the axes `read`.

  Tokens come first in the product: with the few columns of a run's queries
  first a CPU takes up to three times as long.
  """
  axes = "bnht" if read == "bnd" else "bhnt"
  scores = dot(f"{read},{_axes(u)}->{axes}", keys, u)
  return jnp.moveaxis(scores, axes.index("n"), 3)


def _axes(u: jax.Array) -> str:
  return "bhtd" if u.ndim == 4 else "htd"


def _cut(u: jax.Array, rows: jax.Array) -> jax.Array | None:
  return u.reshape(*rows.shape, *u.shape[1:]) if u.ndim == 4 else None


def _take(tokens: jax.Array, rows: jax.Array, dtype) -> list[jax.Array]:
  """Keys and values of some examples."""
  take = lambda array, index: jnp.take(array, index, axis=0, mode="clip")
  if tokens.ndim == 3:
    return [take(tokens, rows).astype(dtype)] * 2
  each = tokens.reshape(-1, *tokens.shape[2:])  # One copy of each, not two.
  return [take(each, 2 * rows + i).astype(dtype) for i in range(2)]
