"""Readers: what looks at the stream and never changes it.

A reader is one pure step per block,

    step(block_params, weights, tokens, carry) -> (carry, output)

with one block's frozen parameters, the reader's own weights of that block, the
block's tokens LN_0(z_m) (B, N, D), and whatever it passes upward. `read` scans
it over depth. Tokens come from the backbone or from a store (which for
`query_step` may hold their keys and values), and unless an editor has changed
them no gradient reaches what produced them. In a block that an editor changes a
reader's tokens pass through what the editor put there, as any others would; its
weights then come with the reader's.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from vqt_jax.models import attention
from vqt_jax.models import chunked_attention
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.runtime import mesh

Step = Callable[[Any, Any, jax.Array, Any], tuple[Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Reader:
  """A line of the table.

  Attributes:
    blocks: whether it reads the tokens of every block, or the final feature
      only.
    queries: whether it reads them with queries; if not, their means in windows
      are its features.
  """

  blocks: bool
  queries: bool


READERS = {
  "vqt": Reader(blocks=True, queries=True),
  "head2toe": Reader(blocks=True, queries=False),
  "linear": Reader(blocks=False, queries=False),
}


def query_step(
  config: vit_config.ViTConfig, edit: attention.Edit | None = None
) -> Step:
  """The step of visual query tuning; its weights are a block's queries.

  Queries are (T, D), or (B, T, D) when dropout makes them differ by example;
  outputs are (B, T, D), float32. VQT, section 3.2. With an edit, weights are
  (queries, the edit's of the block).
  """
  block = vit.Block(config, edit=edit)

  def step(block_params, weights, tokens, carry, rows=None):
    params = {"params": block_params}
    if rows is None:  # Else each part is cast when it is fetched.
      tokens = tokens.astype(config.dtype)  # They may be kept in another one.
    queries = weights if edit is None else weights[0]
    own = None if edit is None else weights[1]
    out = block.apply(params, tokens, queries, own, rows, method="read")
    return carry, out

  return step


def attention_step(
  config: vit_config.ViTConfig, edit: attention.Edit | None = None
) -> Step:
  """As `query_step`, but tells where queries look: (B, H, T, N)."""
  block = vit.Block(config, edit=edit)

  def step(block_params, weights, tokens, carry):
    params = {"params": block_params}
    queries = weights if edit is None else weights[0]
    own = None if edit is None else weights[1]
    out = block.apply(params, tokens, queries, own, method="attention")
    return carry, out

  return step


def read(
  step: Step,
  blocks: Any,
  weights: Any,
  tokens: jax.Array,
  rows: jax.Array | None = None,
) -> jax.Array:
  """Scans a reader over depth.

  A gradient keeps the results of matrix products, and computes GELU, softmax
  and LayerNorm (and fetches rows of tokens) again: less memory than keeping
  all, and no more time.

  Args:
    step: the reader's step.
    blocks: frozen block parameters, leaves stacked over depth (L, ...).
    weights: the reader's weights, leaves stacked over depth.
    tokens: (L, B, N, D), or if `rows` are given (L, n, N, D) or keys and
      values (L, n, 2, H, N, K).
    rows: (B,) int32, the examples to read; each block fetches its own, so that
      a batch is never held for all blocks at once. None: all, in order.

  Returns:
    The outputs, stacked over depth (L, B, ...).
  """
  if rows is None:
    return _scan(step, blocks, weights, tokens)
  depth, count = tokens.shape[:2]
  flat = tokens.reshape(depth * count, *tokens.shape[2:])

  def fetch(block, mine, index, carry):
    if parts > 1 or tokens.ndim > 4:
      return step(block, mine, flat, carry, index.reshape(parts, -1))
    found = jnp.take(flat, index, axis=0, mode="clip")
    return step(block, mine, mesh.constrain(found, "data"), carry)

  index = rows + count * jnp.arange(depth, dtype=rows.dtype)[:, None]
  parts = _parts(tokens, rows)
  return _scan(fetch, blocks, weights, index)


def _scan(step: Step, blocks: Any, weights: Any, tokens: jax.Array):
  @functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.dots_saveable,
      jax.checkpoint_policies.save_only_these_names(chunked_attention.KEPT),
    ),
  )
  def body(carry, inputs):
    return step(*inputs, carry)

  return jax.lax.scan(body, None, (blocks, weights, tokens))[1]


# Of one block's tokens, that a CPU keeps at hand: a part of a usual L3 cache.
CACHE_BYTES = 8 * 2**20


def _parts(tokens: jax.Array, rows: jax.Array) -> int:
  """In how many parts the tokens of a batch are read from a store.

  On a CPU, where a part fits in the cache; see `token_mean`. Keys are read, and
  done with, before values.
  """
  if mesh.backend() != "cpu" or mesh.axis_size("data") > 1:
    return 1
  count = len(rows)
  row = tokens.shape[2:] if tokens.ndim == 4 else tokens.shape[3:]
  size = count * math.prod(row) * tokens.dtype.itemsize
  some = range(-(-size // CACHE_BYTES), count // 8 + 1)
  return next((parts for parts in some if count % parts == 0), 1)


def window(config: vit_config.ViTConfig, target_size: int) -> int:
  """Tokens in a mean, so that a block gives about `target_size` features.

  As in the program of Head2Toe, https://arxiv.org/abs/2201.03529: of D
  features a token the N tokens are parted into target_size / D windows, and
  all are in one if that is less than two; but a window has a token at least.
  """
  tokens = config.num_tokens
  return min(max(tokens * config.width // target_size, 1), tokens)


def pool(
  config: vit_config.ViTConfig, tokens: jax.Array, size: int
) -> jax.Array:
  """Means of `size` successive tokens, (L, B, N // size, D), of their dtype.

  Tokens that fill no window, the last ones, are left out, and so are prompts.

  Args:
    config: of the backbone.
    tokens: LN_0(z_m) of every block (L, B, N, D), or with prompts behind the
      class token (L, B, N + P, D).
    size: tokens in a window.
  """
  first = int(config.has_class_token)
  prompts = tokens.shape[2] - config.num_tokens
  if prompts:
    own = (tokens[:, :, :first], tokens[:, :, first + prompts :])
    tokens = jnp.concatenate(own, axis=2)
  depth, batch, count, width = tokens.shape
  tokens = tokens[:, :, : count - count % size]
  parts = tokens.reshape(depth, batch, -1, size, width)
  return parts.mean(axis=3, dtype=jnp.float32).astype(tokens.dtype)


def flat(tokens: jax.Array, rows: jax.Array | None = None) -> jax.Array:
  """All that is kept of each block as its features, (L, B, N * D), float32.

  Args:
    tokens: (L, B, N, D), or if `rows` are given (L, n, N, D).
    rows: (B,) int32, the examples to read; None: all, in order.
  """
  if rows is not None:
    found = jnp.take(tokens, rows, axis=1, mode="clip")
    tokens = mesh.constrain(found, None, "data")
  return tokens.reshape(*tokens.shape[:2], -1).astype(jnp.float32)


def token_bound(config: vit_config.ViTConfig) -> float:
  """Bound of the uniform draw that the authors start queries and prompts from.

  sqrt(6 / (3 * patch area + D)).
  """
  height, width = config.patch_size
  return (6 / (3 * height * width + config.width)) ** 0.5


def init_queries(
  config: vit_config.ViTConfig, num_queries: int, key: jax.Array
) -> jax.Array:
  """Queries (L, T, D), uniform within sqrt(6 / (3 * patch area + D))."""
  bound = token_bound(config)
  shape = (config.depth, num_queries, config.width)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


COMBINE = ("concat", "mean", "weighted_sum")


COMBINE = ("concat", "mean", "weighted_sum")


def combine(
  outputs: jax.Array, how: str, weights: jax.Array | None = None
) -> jax.Array:
  """Outputs (L, B, T, D) of the queries to features per block (L, B, F).

  Args:
    outputs: what the queries read.
    how: "concat" (F = T * D, token-major), "mean" or "weighted_sum" (F = D).
    weights: (L, T) for "weighted_sum"; no softmax is applied.
  """
  match how:
    case "concat":
      return outputs.reshape(*outputs.shape[:2], -1)
    case "mean":
      return outputs.mean(axis=2)
    case "weighted_sum":
      return jnp.einsum("lbtd,lt->lbd", outputs, weights)
  raise ValueError(f"combine must be concat, mean or weighted_sum, not {how!r}")
