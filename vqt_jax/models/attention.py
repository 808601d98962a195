"""Multi-head attention of a frozen block, and queries that read through it.

Few queries need no projected tokens: the key projection can be applied to the
query in place of all tokens, and the value projection to the weighted mean of
the tokens (`weights`, `absorbed`; docs/method.md, "Reading without
projecting"). The key bias adds the same number to all scores of a query, so
the softmax removes it; the value bias is added once. `projected` reads keys
and values that `project` made for a store.

With rotary positions the keys of patches depend on their place, so only keys
can be read (`ViTConfig.absorbs_keys`): from a store, or projected by
`Attention.__call__`. Queries that read have no place and are not rotated, as
the class token.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.models import chunked_attention
from vqt_jax.models import fused_attention
from vqt_jax.models import vit_config
from vqt_jax.runtime import mesh

# (operation, weights, x, y) -> y. `weights` are the editor's own: in a block
# that block's, a dict by operation; at the ends those of the whole model.
Edit = Callable[[str, Any, jax.Array, jax.Array], jax.Array]
# The same with its weights bound: (operation, x, y) -> y.
BoundEdit = Callable[[str, jax.Array, jax.Array], jax.Array]


def unedited(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """The `BoundEdit` of a frozen stream: leave every output as it is."""
  del name, x
  return y


def bind_edit(edit: Edit | None, weights: Any) -> BoundEdit:
  """Return an edit with its weights bound; `unedited` if there is none."""
  if edit is None:
    return unedited
  return lambda name, x, y: edit(name, weights, x, y)


def edits_projections(weights: Any) -> bool:
  """Return whether an edit changes keys or values of a block.

  It does if its weights in the block, a dict by operation, have such entries;
  then these projections cannot be absorbed.
  """
  return bool({"key", "value"} & set(weights or {}))


def layer_norm(
  config: vit_config.ViTConfig, name: str | None = None
) -> nn.LayerNorm:
  epsilon = config.layer_norm_epsilon
  return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)


def rotary_angles(config: vit_config.ViTConfig) -> np.ndarray:
  """Angles (patches, K / 2) of rotary positions, row-major, float32, radians.

  DINOv3's (https://arxiv.org/abs/2508.10104): the centres of the patches lie
  in -1..1 along each axis; first come the angles of the rows, then those of the
  columns.
  """
  periods = config.rope_theta ** np.arange(0, 1, 4 / config.head_dim)
  centres = [2 * (np.arange(n) + 0.5) / n - 1 for n in config.grid]
  places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1)
  angles = 2 * np.pi * places.reshape(-1, 2, 1) / periods
  return angles.reshape(len(angles), -1).astype(np.float32)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Compute `softmax(q k) v`, (..., N, K) each.

  Unlike `jax.nn.dot_product_attention` it has the scores' layout for softmax,
  with N last, from the first product on, which saves a CPU copies of them.
  """
  scores = chunked_attention.dot("...nk,...mk->...nm", q, k)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return chunked_attention.dot("...nm,...mk->...nk", weights, v).astype(v.dtype)


class Attention(nn.Module):
  """Multi-head attention with the leaves of `nn.MultiHeadDotProductAttention`.

  Letters: B batch, N tokens, D width, H heads, K head size, T queries.
  """

  config: vit_config.ViTConfig

  def setup(self):
    c = self.config
    heads = functools.partial(
      nn.DenseGeneral, (c.num_heads, c.head_dim), dtype=c.dtype
    )
    self.query, self.key, self.value = heads(), heads(), heads()
    self.out = nn.DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype)

  def __call__(
    self,
    queries: jax.Array,
    tokens: jax.Array,
    edited: BoundEdit = unedited,
    have_places: bool = False,
  ) -> jax.Array:
    """Attend from queries (B, T, D) to tokens (B, N, D); return (B, T, D).

    The queries have places, and are rotated by them, if they are the tokens.

    Heads (of each `model` shard) are computed one at a time: the scores
    (B, T, N), float32 and the largest array of a frozen forward pass, exist for
    one head only. Fused attention, where it is supported, never stores them.
    """
    q = edited("query", queries, self.query(queries))
    k = self._rotate(edited("key", tokens, self.key(tokens)))
    v = edited("value", tokens, self.value(tokens))
    if have_places:
      q = self._rotate(q)
    if fused_attention.is_supported(q, k):
      return self._merge_heads(fused_attention.attend(q, k, v), edited)
    shards = math.gcd(mesh.axis_size("model"), self.config.num_heads)

    def heads_first(x):  # (heads of a shard, B, shards, N, K)
      return x.reshape(*x.shape[:2], shards, -1, x.shape[3]).transpose(
        3, 0, 2, 1, 4
      )

    q *= self.config.head_dim**-0.5
    heads = jax.lax.map(
      lambda x: _attend(*x), (heads_first(q), heads_first(k), heads_first(v))
    )
    heads = heads.transpose(1, 3, 2, 0, 4).reshape(q.shape)
    return self._merge_heads(heads, edited)

  def _rotate(self, x: jax.Array) -> jax.Array:
    """Rotate what belongs to patches, the last of x (B, N, H, K), if any do."""
    if self.config.posemb != "rope":
      return x
    angles = rotary_angles(self.config)[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    first = x.shape[1] - len(angles)
    a, b = jnp.split(x[:, first:].astype(jnp.float32), 2, axis=-1)
    patches = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([x[:, :first], patches.astype(x.dtype)], axis=1)

  def direct_weights(
    self, queries: jax.Array, tokens: jax.Array, edited: BoundEdit
  ) -> jax.Array:
    """Attention weights (B, H, T, N), float32, of `__call__`.

    Args:
      queries: (T, D), or (B, T, D); without places.
      tokens: (B, N, D).
      edited: changes the query and key projections.
    """
    q = edited("query", queries, self.query(queries))
    k = self._rotate(edited("key", tokens, self.key(tokens)))
    axes = "bthk" if q.ndim == 4 else "thk"
    scores = chunked_attention.dot(f"{axes},bnhk->bhtn", q, k)
    return jax.nn.softmax(scores * self.config.head_dim**-0.5, axis=-1)

  def weights(
    self, queries: jax.Array, tokens: jax.Array, edited: BoundEdit
  ) -> jax.Array:
    """Attention weights of queries on tokens, without projecting the tokens.

    Per head, `u = W_k q`, and the scores are `tokens u`.

    Args:
      queries: (T, D), or (B, T, D).
      tokens: (B, N, D).
      edited: changes the query projection.

    Returns:
      (B, H, T, N), float32, sums to 1 over N.
    """
    u = self._absorb_keys(queries, edited)
    axes = "bhtd" if u.ndim == 4 else "htd"
    scores = chunked_attention.dot(f"bnd,{axes}->bhtn", tokens, u)
    return jax.nn.softmax(scores, axis=-1)

  def absorbed(
    self,
    queries: jax.Array,
    tokens: jax.Array,
    rows: jax.Array | None,
    edited: BoundEdit,
  ) -> jax.Array:
    """Return `self(queries, tokens)` with both projections absorbed, (B, T, D).

    Args:
      queries: (T, D), or (B, T, D).
      tokens: (B, N, D), or with `rows` (n, N, D).
      rows: (chunks, b), the B examples to read; see `chunked_attention.attend`.
      edited: changes the query and output projections.
    """
    c = self.config
    if rows is None:
      weights = self.weights(queries, tokens, edited).astype(c.dtype)
      mean = chunked_attention.dot("bhtn,bnd->bhtd", weights, tokens)
    else:
      u = self._absorb_keys(queries, edited)
      mean = chunked_attention.attend(u, tokens, rows)
    mean = mean.astype(c.dtype)
    # The kernel comes first, as in `_absorb_keys`.
    heads = chunked_attention.dot("dhk,bhtd->bthk", self._kernel("value"), mean)
    return self._merge_heads(self._add_value_bias(heads), edited)

  def projected(
    self,
    queries: jax.Array,
    projections: jax.Array,
    rows: jax.Array,
    edited: BoundEdit,
  ) -> jax.Array:
    """Like `absorbed`, from stored `project(tokens)` (n, 2, H, N, K)."""
    c = self.config
    q = edited("query", queries, self.query(queries))
    q = jnp.swapaxes(q, -2, -3) * c.head_dim**-0.5
    heads = chunked_attention.attend(q.astype(c.dtype), projections, rows)
    heads = self._add_value_bias(jnp.swapaxes(heads, 1, 2))
    return self._merge_heads(heads, edited)

  def project(self, tokens: jax.Array) -> jax.Array:
    """Keys and values (B, 2, H, N, K) of tokens (B, N, D).

    Without biases, but for that of keys that are rotated.
    """
    if not self.config.absorbs_keys:
      keys = self._rotate(self.key(tokens))
      values = chunked_attention.dot(
        "bnd,dhk->bnhk", tokens, self._kernel("value")
      )
      both = jnp.stack([keys, values.astype(keys.dtype)], axis=1)
      return jnp.swapaxes(both, 2, 3)
    both = [
      chunked_attention.dot("bnd,dhk->bhnk", tokens, self._kernel(name))
      for name in ("key", "value")
    ]
    return jnp.stack(both, axis=1).astype(self.config.dtype)

  def _merge_heads(self, heads: jax.Array, edited: BoundEdit) -> jax.Array:
    """Apply the output projection: (B, T, H, K) -> (B, T, D)."""
    return edited("out", heads, self.out(heads))

  def _add_value_bias(self, heads: jax.Array) -> jax.Array:
    heads = heads + self.value.variables["params"]["bias"]
    return heads.astype(self.config.dtype)

  def _absorb_keys(self, queries: jax.Array, edited: BoundEdit) -> jax.Array:
    """Vectors `W_k q / sqrt(K)`, (..., H, T, D), that score tokens directly."""
    c = self.config
    q = edited("query", queries, self.query(queries))
    # The kernel comes first, so that a CPU's result has D last, as it is read.
    u = chunked_attention.dot("dhk,...thk->...htd", self._kernel("key"), q)
    return (u * c.head_dim**-0.5).astype(c.dtype)

  def _kernel(self, name: str) -> jax.Array:
    params = getattr(self, name).variables["params"]
    return params["kernel"].astype(self.config.dtype)
