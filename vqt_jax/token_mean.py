"""The weighted mean of tokens that queries read, from rows of a store by parts.

Reading goes over a block's tokens four times with little arithmetic: scores and
mean, and the gradient of both. A CPU does the two of each direction from its
cache if a part of the batch fits there; all that follows (projections, MLP) is
better done for the whole batch. So only this is done by parts, with a gradient
of its own: JAX's would keep the tokens of all parts.
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
  """Softmax-weighted means of tokens, `softmax(tokens u) tokens`.

  Args:
    u: (H, T, D), or (B, H, T, D) for each example its own; its dtype is that
      of the products.
    tokens: (n, N, D), what is stored; not differentiated.
    rows: (parts, b) int32, the B = parts * b examples to read.

  Returns:
    (B, H, T, D), float32.
  """
  return _forward(u, tokens, rows)[0]


def _forward(u, tokens, rows):
  def part(inputs):
    mine, some = inputs
    mine = u if mine is None else mine
    found = _take(tokens, some, u.dtype)
    # Tokens first, here and in the gradient: with the few columns of a run's
    # queries first a CPU's product takes up to three times as long.
    scores = dot(f"bnd,{_axes(u)}->bnht", found, mine)
    weights = jax.nn.softmax(jnp.moveaxis(scores, 1, 3), axis=3)
    return dot("bhtn,bnd->bhtd", weights.astype(u.dtype), found), weights

  mean, weights = jax.lax.map(part, (_cut(u, rows), rows))
  mean, weights = (
      ad_checkpoint.checkpoint_name(x, KEPT)
      for x in (mean.reshape(-1, *mean.shape[2:]), weights)
  )
  return mean, (u, tokens, rows, weights)


def _backward(kept, cotangent):
  u, tokens, rows, weights = kept
  cotangent = cotangent.astype(u.dtype).reshape(*rows.shape, *u.shape[-3:])

  def part(total, inputs):
    some, weights, of_mean = inputs
    found = _take(tokens, some, u.dtype)
    of_weights = dot("bnd,bhtd->bnht", found, of_mean)
    of_weights = jnp.moveaxis(of_weights, 1, 3)
    of_scores = of_weights - (weights * of_weights).sum(3, keepdims=True)
    of_scores = (weights * of_scores).astype(u.dtype)
    of_u = dot(f"bhtn,bnd->{_axes(u)}", of_scores, found)
    return (total, of_u) if u.ndim == 4 else (total + of_u, None)

  zero = jnp.zeros(() if u.ndim == 4 else u.shape, jnp.float32)
  total, each = jax.lax.scan(part, zero, (rows, weights, cotangent))
  of_u = total if each is None else each.reshape(u.shape)
  return of_u.astype(u.dtype), None, None


by_parts.defvjp(_forward, _backward)


def _axes(u: jax.Array) -> str:
  return "bhtd" if u.ndim == 4 else "htd"


def _cut(u: jax.Array, rows: jax.Array) -> jax.Array | None:
  return u.reshape(*rows.shape, *u.shape[1:]) if u.ndim == 4 else None


def _take(tokens: jax.Array, rows: jax.Array, dtype) -> jax.Array:
  return jnp.take(tokens, rows, axis=0, mode="clip").astype(dtype)
