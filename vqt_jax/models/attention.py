"""Multi-head attention of frozen blocks, and queries that read it."""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqt_jax.models import chunked_attention
from vqt_jax.models import fused_attention
from vqt_jax.models import vit_config
from vqt_jax.runtime import mesh

EPSILON = 1e-6

# (name, weights, x, y) -> y; weights are the edit's own of this block (at the
# ends those of the whole), a dict by operation.
Edit = Callable[[str, Any, jax.Array, jax.Array], jax.Array]

# Modules of a block whose output an edit sees; it sees the MLP's in `Block`.
EDITED = (
  "LayerNorm_0",
  "query",
  "key",
  "value",
  "out",
  "LayerNorm_1",
  "Dense_0",
  "Dense_1",
)


def layer_norm() -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32)


dot = chunked_attention.dot


class Attention(nn.Module):
  """Multi-head attention with Flax's `MultiHeadDotProductAttention` leaves."""

  config: vit_config.ViTConfig

  def setup(self):
    c = self.config
    heads = functools.partial(
      nn.DenseGeneral, (c.num_heads, c.head_dim), dtype=c.dtype
    )
    self.query, self.key, self.value = heads(), heads(), heads()
    self.out = nn.DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype)

  def __call__(self, queries: jax.Array, tokens: jax.Array) -> jax.Array:
    """Attends, with one head (of each `model` shard) at a time.

    So the scores (B, N, N), float32 and the largest array of a frozen forward
    pass, exist for one head only; or, where fused attention takes them, never.
    """
    q, k, v = self.query(queries), self.key(tokens), self.value(tokens)
    if fused_attention.takes(q, k):
      return self.out(fused_attention.attend(q, k, v))
    shards = math.gcd(mesh.axis_size("model"), self.config.num_heads)

    def by_head(x):
      return jnp.moveaxis(x.reshape(*x.shape[:2], shards, -1, x.shape[3]), 3, 0)

    heads = jax.lax.map(
      lambda x: jax.nn.dot_product_attention(*x),
      (by_head(q), by_head(k), by_head(v)),
    )
    return self.out(jnp.moveaxis(heads, 0, 3).reshape(q.shape))

  def weights(self, queries: jax.Array, tokens: jax.Array) -> jax.Array:
    """How much each query attends to each token, without projecting tokens.

    Per head, the key projection moves to the query: `u = W_k q`, scores
    `tokens u`. The key bias adds the same to all scores of a query, so the
    softmax removes it.

    Args:
      queries: (T, D), or (B, T, D).
      tokens: (B, N, D).

    Returns:
      (B, H, T, N), float32, sums to 1 over N.
    """
    u = self._keys_of(queries)
    shape = "bhtd" if u.ndim == 4 else "htd"
    return jax.nn.softmax(dot(f"bnd,{shape}->bhtn", tokens, u), axis=-1)

  def absorbed(
    self,
    queries: jax.Array,
    tokens: jax.Array,
    rows: jax.Array | None = None,
  ) -> jax.Array:
    """`self(queries, tokens)` with the projections absorbed; (B, T, D).

    With few queries it is cheaper to project the weighted mean of the tokens
    to values than all tokens before it; the value bias is added once.

    Args:
      queries: (T, D), or (B, T, D).
      tokens: (B, N, D), or with `rows` (n, N, D).
      rows: (parts, b), of the B examples to read; see `token_mean.by_parts`.
    """
    c = self.config
    if rows is None:
      weights = self.weights(queries, tokens).astype(c.dtype)
      mean = dot("bhtn,bnd->bhtd", weights, tokens)
    else:
      mean = chunked_attention.by_parts(self._keys_of(queries), tokens, rows)
    mean = mean.astype(c.dtype)
    # The kernel first: so a CPU's product has D last, as its reader does.
    return self._out_of(dot("dhk,bhtd->bthk", self._kernel("value"), mean))

  def projected(
    self, queries: jax.Array, projections: jax.Array, rows: jax.Array
  ) -> jax.Array:
    """As `absorbed`, of stored `project(tokens)` (n, 2, H, N, K)."""
    c = self.config
    q = jnp.swapaxes(self.query(queries), -2, -3) * c.head_dim**-0.5
    heads = chunked_attention.by_parts(q.astype(c.dtype), projections, rows)
    return self._out_of(jnp.swapaxes(heads, 1, 2))

  def project(self, tokens: jax.Array) -> jax.Array:
    """Keys and values (B, 2, H, N, K) of tokens (B, N, D), without biases.

    That of the keys makes no difference; that of the values is added to what is
    read of them.
    """
    both = [
      dot("bnd,dhk->bhnk", tokens, self._kernel(name))
      for name in ("key", "value")
    ]
    return jnp.stack(both, axis=1).astype(self.config.dtype)

  def _out_of(self, heads: jax.Array) -> jax.Array:
    """What heads read (B, T, H, K), to (B, T, D)."""
    heads = heads + self.value.variables["params"]["bias"]
    return self.out(heads.astype(self.config.dtype))

  def _keys_of(self, queries: jax.Array) -> jax.Array:
    """What tokens are scored by, `W_k q / sqrt(head_dim)`, (..., H, T, D)."""
    c = self.config
    # The kernel first: so a CPU's product has D last, as its reader does.
    u = dot("dhk,...thk->...htd", self._kernel("key"), self.query(queries))
    return (u * c.head_dim**-0.5).astype(c.dtype)

  def _kernel(self, name: str) -> jax.Array:
    params = getattr(self, name).variables["params"]
    return params["kernel"].astype(self.config.dtype)


def projections_edited(weights: Any) -> bool:
  """Whether keys or values are edited: they cannot be absorbed then."""
  return bool({"key", "value"} & set(weights or {}))
