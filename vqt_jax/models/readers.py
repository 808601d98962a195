"""Readers, which look at the stream and never change it.

A `Reader` is a few functions. Those that learn read by one pure step per block,

    step(block_params, weights, tokens, carry) -> (carry, output)

with the frozen parameters of one block, the reader's own weights of that block,
the block's tokens LN_0(z_m) (B, N, D), and a carry for readers that pass state
upward (`combo` sums one). `scan` runs it over depth, on tokens from the
backbone or from a store.
No gradient enters the backbone unless an editor has changed the stream; then
queries pass through the edited blocks as any token would, and each block's
weights are a pair (the reader's, the edit's).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from etils import epy

from vqt_jax.models import vit_config

with epy.lazy_imports():  # Slow; a config reads the table at the end only.
  import jax
  import jax.numpy as jnp

  from vqt_jax.models import attention
  from vqt_jax.models import chunked_attention
  from vqt_jax.models import chunks
  from vqt_jax.models import combo
  from vqt_jax.models import head
  from vqt_jax.models import vit
  from vqt_jax.runtime import mesh

Step = Callable[[Any, Any, "jax.Array", Any], tuple[Any, "jax.Array"]]


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader, as functions of a tuner `t`: its `config`, options, and `t.read`.

  Attributes:
    read: (t, variables, tokens, rows, key) -> groups of features (G, B, K),
      float32, and the outputs of queries (L, B, T, D) or None; arguments as of
      `Tuner.__call__`. None: the final feature is all that is read.
    group_features: (t) -> number K of features in a group.
    num_groups: (t) -> number G of groups; by default a block is a group.
    init: (t, key) -> a dict of trainable weights; None: only the head trains.
    window: (t) -> number of successive tokens of which it reads the mean, and
      the store keeps nothing else; None: it reads the tokens.
    gradient_numbers: (t) -> numbers per image that a gradient keeps, besides
      features and weights.
    has_queries: its weights hold "queries" (L, T, D), which drop out in
      training, and `read` takes a store of keys and values as well.
    is_fixed: its weights stay as they were drawn; only the head is fitted.
    is_network: the head is the last layer of a network: it sees what the reader
      gives, as it is, and not the final feature.
    members: methods that answer together, each with weights and head of its
      own; their probabilities are mixed.
  """

  read: Callable[..., tuple[jax.Array, jax.Array | None]] | None = None
  group_features: Callable[[Any], int] = lambda t: 0
  num_groups: Callable[[Any], int] = lambda t: t.config.depth
  init: Callable[[Any, jax.Array], dict[str, Any]] | None = None
  window: Callable[[Any], int] | None = None
  gradient_numbers: Callable[[Any], int] = lambda t: 0
  has_queries: bool = False
  is_fixed: bool = False
  is_network: bool = False
  members: tuple[str, ...] = ()


# Ways to turn the outputs of a block's queries into features, see `combine`.
COMBINE = ("concat", "mean", "weighted_sum")


def query_step(
  config: vit_config.ViTConfig, edit: attention.Edit | None = None
) -> Step:
  """Make the step of visual query tuning (VQT, section 3.2).

  Its weights are a block's queries (T, D), or (B, T, D) if dropout makes them
  differ by example; with an edit, a pair of these and the edit's. Its outputs
  are (B, T, D), float32.
  """
  block = vit.Block(config, edit=edit)

  def step(block_params, weights, tokens, carry, rows=None):
    queries, own = weights if edit else (weights, None)
    if rows is None:  # With rows each chunk is cast when it is fetched.
      tokens = tokens.astype(config.dtype)
    params = {"params": block_params}
    out = block.apply(params, tokens, queries, own, rows, method="read")
    return carry, out

  return step


def attention_step(
  config: vit_config.ViTConfig, edit: attention.Edit | None = None
) -> Step:
  """Make a step like `query_step` that gives attention weights (B, H, T, N)."""
  block = vit.Block(config, edit=edit)

  def step(block_params, weights, tokens, carry):
    queries, own = weights if edit else (weights, None)
    params = {"params": block_params}
    out = block.apply(params, tokens, queries, own, method="attention_weights")
    return carry, out

  return step


def scan(
  step: Step,
  blocks: Any,
  weights: Any,
  tokens: jax.Array,
  rows: jax.Array | None = None,
  fetches: bool = False,
  carry: Any = None,
  row: tuple[int, int] | None = None,
) -> tuple[Any, jax.Array]:
  """Scan a reader's step over depth.

  A gradient keeps the results of matrix products, and computes GELU, softmax
  and LayerNorm (and fetches rows of tokens) again: that takes less memory than
  keeping everything, and no more time.

  Args:
    step: the reader's step.
    blocks: frozen block parameters, leaves stacked over depth (L, ...).
    weights: the reader's weights, leaves stacked over depth.
    tokens: (L, B, N, D); with `rows` a store of them, (L, n, N, D), or sharded
      (L, n, S, 128), see `features.store`; or if the step fetches of their keys
      and values (L, n, 2, H, N, K).
    rows: (B,) int32, the examples to read. Each block fetches its own rows, so
      that a batch never exists for all blocks at once. None: all, in order.
    fetches: the step can be called with the store of all blocks (L * n, ...) in
      place of tokens, and with the rows to fetch (chunks, b) as fifth argument.
    carry: given to the step of the first block.
    row: (N, D), of a sharded store.

  Returns:
    The carry of the last block, and the outputs, stacked over depth (L, B,
    ...).
  """
  if rows is None:
    return _scan(step, blocks, weights, tokens, carry)
  depth, size = tokens.shape[:2]
  flat = tokens.reshape(depth * size, *tokens.shape[2:])
  count = _num_chunks(tokens, rows) if fetches else 1

  def fetch(block_params, own, index, carry):
    if count > 1 or tokens.ndim > 4:
      return step(block_params, own, flat, carry, index.reshape(count, -1))
    fetched = jnp.take(flat, index, axis=0, mode="clip")
    fetched = mesh.constrain(fetched, "data")
    if row and fetched.shape[1:] != row:  # Sharded.
      fetched = fetched.reshape(len(fetched), -1)[:, : math.prod(row)]
      fetched = fetched.reshape(-1, *row)
    return step(block_params, own, fetched, carry)

  index = rows + size * jnp.arange(depth, dtype=rows.dtype)[:, None]
  return _scan(fetch, blocks, weights, index, carry)


def _scan(step: Step, blocks: Any, weights: Any, tokens: jax.Array, carry: Any):
  @functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_from_both_policies(
      jax.checkpoint_policies.dots_saveable,
      jax.checkpoint_policies.save_only_these_names(
        chunked_attention.RESIDUALS
      ),
    ),
  )
  def body(carry, inputs):
    return step(*inputs, carry)

  return jax.lax.scan(body, carry, (blocks, weights, tokens))


def _num_chunks(tokens: jax.Array, rows: jax.Array) -> int:
  """Number of chunks in which a batch is read from a store.

  Of keys and values only one of the two counts: the keys are done with before
  the values are read.
  """
  row = tokens.shape[2:] if tokens.ndim == 4 else tokens.shape[3:]
  each = math.prod(row) * tokens.dtype.itemsize
  return chunks.count(len(rows), each, 8)


def window(config: vit_config.ViTConfig, target_size: int) -> int:
  """Number of tokens per window, for about `target_size` features per block.

  As in the program of Head2Toe, https://arxiv.org/abs/2201.03529: the N tokens
  of D features each are divided into target_size / D windows, or into one if
  that is less than two; but a window has at least one token.
  """
  tokens = config.num_tokens
  return min(max(tokens * config.width // target_size, 1), tokens)


def pool(
  config: vit_config.ViTConfig, tokens: jax.Array, size: int
) -> jax.Array:
  """Average windows of `size` successive tokens, (L, B, N // size, D).

  Leave out the last tokens, if they fill no window, and prompts.

  Args:
    config: of the backbone.
    tokens: LN_0(z_m) of every block (L, B, N, D), or with P prompts after the
      class token (L, B, N + P, D).
    size: tokens in a window.
  """
  tokens = without_prompts(config, tokens)
  depth, batch, count, width = tokens.shape
  tokens = tokens[:, :, : count - count % size]
  parts = tokens.reshape(depth, batch, -1, size, width)
  return parts.mean(axis=3, dtype=jnp.float32).astype(tokens.dtype)


def without_prompts(
  config: vit_config.ViTConfig, tokens: jax.Array
) -> jax.Array:
  """Leave out the P prompts after the class token: (..., N + P, D) to N."""
  prompts = tokens.shape[-2] - config.num_tokens
  if not prompts:
    return tokens
  first = int(config.has_class_token)
  own = (tokens[..., :first, :], tokens[..., first + prompts :, :])
  return jnp.concatenate(own, axis=-2)


def flatten(
  tokens: jax.Array, size: int, rows: jax.Array | None = None
) -> jax.Array:
  """Flatten each block's tokens into features, (L, B, size), float32.

  Args:
    tokens: (L, B, N, D), or if `rows` are given a store of them, (L, n, N, D)
      or sharded (L, n, S, 128).
    size: N D.
    rows: (B,) int32, the examples to read; None: all, in order.
  """
  if rows is not None:
    found = jnp.take(tokens, rows, axis=1, mode="clip")
    tokens = mesh.constrain(found, None, "data")
  flat = tokens.reshape(*tokens.shape[:2], -1)
  return flat[..., :size].astype(jnp.float32)


def token_bound(config: vit_config.ViTConfig) -> float:
  """Bound of the authors' uniform initialisation of queries and prompts.

  sqrt(6 / (3 * patch area + D)).
  """
  height, width = config.patch_size
  return (6 / (3 * height * width + config.width)) ** 0.5


def combine(
  outputs: jax.Array, how: str, weights: jax.Array | None = None
) -> jax.Array:
  """Turn outputs (L, B, T, D) of the queries into features (L, B, F).

  Args:
    outputs: of the queries, per block.
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


def moments(config: vit_config.ViTConfig, tokens: jax.Array) -> jax.Array:
  """Describe a block's tokens (B, N, D) without weights, (B, 2 or 3, D).

  Mean and standard deviation over the patches, and the class token if there is
  one, float32.
  """
  tokens = tokens.astype(jnp.float32)
  patches = tokens[:, config.num_prefix_tokens :]
  found = [patches.mean(axis=1), patches.std(axis=1)]
  if config.has_class_token:
    found.append(tokens[:, 0])
  return jnp.stack(found, axis=1)


def _moments_and_queries(config: vit_config.ViTConfig, edit: None) -> Step:
  """Make a step that joins `moments` and `query_step`, (B, 2 or 3 + T, D).

  Each vector is divided by its L2 norm.
  """
  read = query_step(config, edit)

  def step(block_params, queries, tokens, carry):
    carry, outputs = read(block_params, queries, tokens, carry)
    both = (moments(config, tokens), outputs)
    return carry, head.normalize(jnp.concatenate(both, axis=1))

  return step


def _sum_step(
  config: vit_config.ViTConfig, edit: attention.Edit | None = None
) -> Step:
  """Make a step that adds a projection of the tokens to the carry (B, N, R).

  Its weights are a kernel (D, R), and factors (B,) of what each image adds, or
  None. Tokens are first normalised to mean 0 and variance 1, so that all blocks
  count alike.
  """

  def step(block_params, weights, tokens, carry):
    del block_params
    kernel, factors = weights[0] if edit else weights
    tokens = without_prompts(config, tokens).astype(jnp.float32)
    tokens = jax.nn.standardize(tokens, epsilon=config.layer_norm_epsilon)
    dtype = config.dtype
    added = jnp.dot(
      tokens.astype(dtype),
      kernel.astype(dtype),
      preferred_element_type=jnp.float32,
    )
    if factors is not None:
      added *= factors[:, None, None]
    return carry + added, None

  return step


def _read_sum(tuner, variables, tokens, rows, key):
  own, depth = variables["tuner"], tuner.config.depth
  size = tokens.shape[1] if rows is None else len(rows)
  shape = (size, tuner.config.num_tokens, combo.WIDTH)
  start = jnp.zeros(shape, jnp.float32)
  factors, rngs = None, None
  if key is not None:
    block_key, network_key = jax.random.split(key)
    rngs = {"dropout": network_key}
    factors = combo.draw_blocks(block_key, depth, size)
    factors = mesh.constrain(factors, None, "data")
  total, _ = tuner.read(
    _sum_step,
    variables,
    (own["kernel"], factors),
    tokens,
    rows,
    carry=mesh.constrain(start, "data"),
  )
  found = combo.Network().apply(
    {"params": own["network"]}, total, training=key is not None, rngs=rngs
  )
  return found[None], None


def _init_sum(tuner, key):
  c = tuner.config
  kernel_key, network_key = jax.random.split(key)
  shape = (c.depth, c.width, combo.WIDTH)
  kernel = jax.random.normal(kernel_key, shape, jnp.float32)
  kernel /= math.sqrt(c.width)
  example = jnp.zeros((1, c.num_tokens, combo.WIDTH), jnp.float32)
  network = combo.Network().init(network_key, example)["params"]
  return {"kernel": kernel, "network": network}


def _read_fixed(tuner, variables, tokens, rows, key):
  del key
  queries = variables["tuner"]["queries"]
  _, found = tuner.read(_moments_and_queries, variables, queries, tokens, rows)
  return found.reshape(*found.shape[:2], -1), None


def _read_queries(tuner, variables, tokens, rows, key):
  del key
  own = variables["tuner"]
  _, outputs = tuner.read(
    query_step, variables, own["queries"], tokens, rows, fetches=True
  )
  return combine(outputs, tuner.combine, own.get("combine")), outputs


def _draw_queries(tuner, key):
  """Draw queries uniformly within `token_bound`."""
  c, bound = tuner.config, token_bound(tuner.config)
  shape = (c.depth, tuner.num_queries, c.width)
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _init_queries(tuner, key):
  queries = _draw_queries(tuner, key)
  if tuner.combine != "weighted_sum":
    return {"queries": queries}
  weights = jnp.ones(queries.shape[:2], jnp.float32)
  return {"queries": queries, "combine": weights}


def _gradient_numbers(tuner):
  """Count scores, hidden units, a few tokens, and what is temporary.

  Keys and values too, if they are projected where they are read.
  """
  c = tuner.config
  kept = c.num_heads * c.num_tokens + c.mlp_dim + 4 * c.width
  temporary = 2 * c.num_heads * c.width + 2 * c.mlp_dim
  keys = 0 if c.absorbs_keys else 2 * c.depth * c.num_tokens * c.width
  return tuner.num_queries * (c.depth * kept + temporary) + keys


READERS = {
  "vqt": Reader(
    read=_read_queries,
    group_features=lambda t: (
      t.config.width * (t.num_queries if t.combine == "concat" else 1)
    ),
    init=_init_queries,
    gradient_numbers=_gradient_numbers,
    has_queries=True,
  ),
  "head2toe": Reader(
    read=lambda t, variables, tokens, rows, key: (
      flatten(tokens, t.reader.group_features(t), rows),
      None,
    ),
    group_features=lambda t: t.config.width * (t.config.num_tokens // t.window),
    window=lambda t: window(t.config, t.target_size),
  ),
  "combo": Reader(
    read=_read_sum,
    group_features=lambda t: combo.WIDTH,
    num_groups=lambda t: 1,
    init=_init_sum,
    gradient_numbers=lambda t: combo.gradient_numbers(t.config.num_tokens),
    is_network=True,
  ),
  "instant": Reader(
    read=_read_fixed,
    group_features=lambda t: (
      t.config.width * (t.num_queries + 2 + t.config.has_class_token)
    ),
    init=lambda t, key: {"queries": _draw_queries(t, key)},
    is_fixed=True,
  ),
  "linear": Reader(),
  "auto": Reader(members=("instant", "combo")),
}
