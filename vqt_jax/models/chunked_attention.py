"""Attention of queries to stored tokens, one chunk of the batch at a time.

Reading passes over a block's tokens four times with little arithmetic: for the
scores, for the mean, and for the gradient of both. A CPU does each pair of
passes from its cache if a chunk of the batch fits there; all that follows
(projections, MLP) is faster on the whole batch. So only this part is chunked,
with a gradient of its own: JAX's would keep the tokens of all chunks.

A store holds either tokens, which then serve as the keys and values of all
heads, or the keys and values of each head (see `features.store`).
"""

import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

# Names, for `jax.checkpoint` policies, what the gradient of `attend` reuses.
RESIDUALS = "chunked_attention"

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def attend(u: jax.Array, tokens: jax.Array, rows: jax.Array) -> jax.Array:
  """Softmax-weighted means of values, `softmax(keys u) values`.

  Args:
    u: (H, T, K), or (B, H, T, K) if examples differ; its dtype is that of the
      products.
    tokens: the store, (n, N, D) with K = D, or keys and values
      (n, 2, H, N, K); not differentiated.
    rows: (chunks, b) int32, the B = chunks * b examples to read.

  Returns:
    (B, H, T, K), float32.
  """
  return _forward(u, tokens, rows)[0]


def _forward(u, tokens, rows):
  axes = "bnd" if tokens.ndim == 3 else "bhnd"

  def chunk(inputs):
    own_u, own_rows = inputs
    own_u = u if own_u is None else own_u
    keys, values = _keys_and_values(tokens, own_rows, u.dtype)
    weights = jax.nn.softmax(_scores(keys, axes, own_u), axis=3)
    return dot(f"bhtn,{axes}->bhtd", weights.astype(u.dtype), values), weights

  mean, weights = jax.lax.map(chunk, (_split_into_chunks(u, rows), rows))
  mean, weights = (
    ad_checkpoint.checkpoint_name(x, RESIDUALS)
    for x in (mean.reshape(-1, *mean.shape[2:]), weights)
  )
  return mean, (u, tokens, rows, weights)


def _backward(residuals, cotangent):
  u, tokens, rows, weights = residuals
  cotangent = cotangent.astype(u.dtype).reshape(*rows.shape, *u.shape[-3:])
  axes = "bnd" if tokens.ndim == 3 else "bhnd"

  def chunk(total, inputs):
    own_rows, weights, d_mean = inputs
    keys, values = _keys_and_values(tokens, own_rows, u.dtype)
    d_weights = _scores(values, axes, d_mean)
    d_scores = d_weights - (weights * d_weights).sum(3, keepdims=True)
    d_scores = (weights * d_scores).astype(u.dtype)
    d_u = dot(f"bhtn,{axes}->{_axes(u)}", d_scores, keys)
    return (total, d_u) if u.ndim == 4 else (total + d_u, None)

  zero = jnp.zeros(() if u.ndim == 4 else u.shape, jnp.float32)
  total, each = jax.lax.scan(chunk, zero, (rows, weights, cotangent))
  d_u = total if each is None else each.reshape(u.shape)
  return d_u.astype(u.dtype), None, None


attend.defvjp(_forward, _backward)


def _scores(keys: jax.Array, axes: str, u: jax.Array) -> jax.Array:
  """Scores (b, H, T, N) of keys whose axes are "bnd" or "bhnd".

  Tokens come first in the product: with the few columns of the queries first a
  CPU takes up to three times as long.
  """
  result = "bnht" if axes == "bnd" else "bhnt"
  scores = dot(f"{axes},{_axes(u)}->{result}", keys, u)
  return jnp.moveaxis(scores, result.index("n"), 3)


def _axes(u: jax.Array) -> str:
  return "bhtd" if u.ndim == 4 else "htd"


def _split_into_chunks(u: jax.Array, rows: jax.Array) -> jax.Array | None:
  """Return `u` by chunk of the batch; None if all examples share it."""
  return u.reshape(*rows.shape, *u.shape[1:]) if u.ndim == 4 else None


def _keys_and_values(
  tokens: jax.Array, rows: jax.Array, dtype: jax.typing.DTypeLike
) -> list[jax.Array]:
  """Fetch keys and values of some rows from the store."""
  take = lambda array, index: jnp.take(array, index, axis=0, mode="clip")
  if tokens.ndim == 3:
    return [take(tokens, rows).astype(dtype)] * 2
  flat = tokens.reshape(-1, *tokens.shape[2:])  # One copy of each, not two.
  return [take(flat, 2 * rows + i).astype(dtype) for i in range(2)]
