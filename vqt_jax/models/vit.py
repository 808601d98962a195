"""The frozen Vision Transformer, with a path for queries through every block.

Architecture and parameter names are Big Vision's (and so those of the ViT
paper, https://arxiv.org/abs/2010.11929): one `Block` scanned over depth, its
leaves stacked on a first axis as in Big Vision's `scan=True` models. Queries
pass through `Block.read` (visual query tuning, section 3.2 of
https://arxiv.org/abs/2212.03220).

An editor (see `editors`) changes the stream here and nowhere else: its
`attention.Edit` gets input x and output y of every named operation and returns
the value that replaces y. In a block the operations are its leaf modules,
"input" (x and y: the stream before the block) and "MlpBlock_0" (y: the MLP's
output, x: the residual stream that it is added to). Outside of the blocks they
are "embedding" (x: images, y: patches), "embedded" (z_0, what the blocks get),
"output" (of the last block) and "encoder_norm". Without an edit nothing is
added to the computation.

Letters: B batch, N tokens, D width, L depth, H heads, K head size, T queries.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.models import attention as attention_lib
from vqt_jax.models import chunks
from vqt_jax.models import vit_config


def posemb_sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed position embedding (1, N, D) of MoCo v3, row-major tokens."""
  y, x = np.mgrid[: grid[0], : grid[1]]
  if width % 4:
    raise ValueError(f"sincos2d positions need a width divisible by 4: {width}")
  omega = np.arange(width // 4) / (width // 4 - 1)
  omega = 1.0 / (10_000**omega)
  y = np.einsum("m,d->md", y.flatten(), omega)
  x = np.einsum("m,d->md", x.flatten(), omega)
  table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
  return table.astype(np.float32)[None]


def _quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), of CLIP's program."""
  return x * jax.nn.sigmoid(1.702 * x)


_GELU = {
  "tanh": functools.partial(nn.gelu, approximate=True),
  "exact": functools.partial(nn.gelu, approximate=False),
  "quick": _quick_gelu,
}

# Of the products on a chunk of the batch: with fewer they are slower.
_LEAST_ROWS = 256


class Mlp(nn.Module):
  """Dense, GELU, dense (Big Vision's `MlpBlock`).

  If gated: `silu(gate(x)) * Dense_0(x)`, dense.
  """

  config: vit_config.ViTConfig

  def setup(self):
    c = self.config
    self.Dense_0 = nn.Dense(c.mlp_dim, dtype=c.dtype)
    if c.gated_mlp:
      self.gate = nn.Dense(c.mlp_dim, dtype=c.dtype)
    self.Dense_1 = nn.Dense(c.width, dtype=c.dtype)

  def __call__(
    self,
    x: jax.Array,
    edited: attention_lib.BoundEdit = attention_lib.unedited,
  ) -> jax.Array:
    y = edited("Dense_0", x, self.Dense_0(x))
    if self.config.gated_mlp:
      y *= nn.silu(edited("gate", x, self.gate(x)))
    else:
      y = _GELU[self.config.gelu](y)
    return edited("Dense_1", y, self.Dense_1(y))


class Block(nn.Module):
  """One pre-norm encoder block.

  Attributes:
    config: architecture.
    collect: what the scan over blocks returns of each: "tokens", the normalised
      inputs LN_0(z_m), which are all that a reader needs, and "blocks", the
      outputs z_{m+1}.
    edit: changes the stream, with weights that come with each call; queries
      pass through the edited block.
  """

  config: vit_config.ViTConfig
  collect: tuple[str, ...] = ()
  edit: attention_lib.Edit | None = None

  def setup(self):
    self.LayerNorm_0 = attention_lib.layer_norm(self.config)
    self.MultiHeadDotProductAttention_0 = attention_lib.Attention(self.config)
    self.LayerNorm_1 = attention_lib.layer_norm(self.config)
    self.MlpBlock_0 = Mlp(self.config)

  def __call__(
    self, z: jax.Array, weights: Any = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return z_{m+1} of z_m (B, N, D), and what is collected.

    A CPU takes the batch in chunks, see `chunks`, if nothing is edited.
    """
    count = 1 if self.edit else self._num_chunks(z)
    if count == 1:
      return self.whole(z, weights)
    block, variables = self.unbind()
    run = lambda z: block.apply(variables, z, method="whole")
    return chunks.join(jax.lax.map(run, chunks.split(z, count)))

  def _num_chunks(self, z: jax.Array) -> int:
    batch, tokens, _ = z.shape
    hidden = tokens * self.config.mlp_dim * np.dtype(self.config.dtype).itemsize
    return chunks.count(batch, hidden, -(-_LEAST_ROWS // tokens))

  def whole(
    self, z: jax.Array, weights: Any = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Do the same with the batch in one piece."""
    edited = attention_lib.bind_edit(self.edit, weights)
    z = edited("input", z, z)
    tokens = edited("LayerNorm_0", z, self.LayerNorm_0(z))
    tokens = tokens.astype(self.config.dtype)
    attention = self.MultiHeadDotProductAttention_0
    z = z + attention(tokens, tokens, edited, have_places=True)
    z = self._add_mlp(z, edited)
    found = {"tokens": tokens, "blocks": z}
    return z, {name: found[name] for name in self.collect}

  def read(
    self,
    tokens: jax.Array,
    queries: jax.Array,
    weights: Any = None,
    rows: jax.Array | None = None,
  ) -> jax.Array:
    """Pass queries through this block; they attend to the stream only.

    Args:
      tokens: LN_0(z_m), (B, N, D); with `rows` a store of them (n, N, D), or of
        `project(tokens)` (n, 2, H, N, K).
      queries: (T, D) shared by all examples, or (B, T, D). float32.
      weights: of the edit, in this block.
      rows: (chunks, b), the examples to read, chunk by chunk; only of a stream
        without an edit.

    Returns:
      The queries' outputs (B, T, D), float32.
    """
    edited = attention_lib.bind_edit(self.edit, weights)
    attention = self.MultiHeadDotProductAttention_0
    needs_keys = self._needs_keys(weights) and tokens.ndim == 3
    if needs_keys:
      if rows is not None:
        tokens = jnp.take(tokens, rows.reshape(-1), axis=0, mode="clip")
        tokens = tokens.astype(self.config.dtype)
      shape = (tokens.shape[0], *queries.shape[-2:])
      queries = jnp.broadcast_to(queries, shape)
    q = edited("LayerNorm_0", queries, self.LayerNorm_0(queries))
    if needs_keys:
      y = attention(q, tokens, edited)
    elif tokens.ndim == 3:
      y = attention.absorbed(q, tokens, rows, edited)
    else:
      y = attention.projected(q, tokens, rows, edited)
    return self._add_mlp(queries + y, edited)

  def project(self, tokens: jax.Array) -> jax.Array:
    """Keys and values (B, 2, H, N, K) of LN_0(z_m) (B, N, D)."""
    return self.MultiHeadDotProductAttention_0.project(tokens)

  def attention_weights(
    self, tokens: jax.Array, queries: jax.Array, weights: Any = None
  ) -> jax.Array:
    """Attention weights of `read`: (B, H, T, N), float32."""
    edited = attention_lib.bind_edit(self.edit, weights)
    attention = self.MultiHeadDotProductAttention_0
    queries = edited("LayerNorm_0", queries, self.LayerNorm_0(queries))
    if self._needs_keys(weights):
      return attention.direct_weights(queries, tokens, edited)
    return attention.weights(queries, tokens, edited)

  def _needs_keys(self, weights: Any) -> bool:
    """Return whether queries read keys and values, and not the tokens."""
    edits_projections = attention_lib.edits_projections(weights)
    return edits_projections or not self.config.absorbs_keys

  def _add_mlp(
    self, z: jax.Array, edited: attention_lib.BoundEdit
  ) -> jax.Array:
    y = edited("LayerNorm_1", z, self.LayerNorm_1(z))
    return z + edited("MlpBlock_0", z, self.MlpBlock_0(y, edited))


class MapHead(nn.Module):
  """Attention pooling by one learned probe (Big Vision's `MAPHead`)."""

  config: vit_config.ViTConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    c = dataclasses.replace(self.config, posemb="learn")  # It has no places.
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, c.width))
    probe = jnp.tile(probe, (tokens.shape[0], 1, 1)).astype(c.dtype)
    attention = attention_lib.Attention(
      c, name="MultiHeadDotProductAttention_0"
    )
    x = attention(probe, tokens)
    y = attention_lib.layer_norm(c, "LayerNorm_0")(x)
    return (x + Mlp(c, name="MlpBlock_0")(y))[:, 0]


class Encoder(nn.Module):
  """The blocks, scanned, and the final LayerNorm.

  With `remat` a gradient keeps the blocks' inputs and recomputes all else.
  """

  config: vit_config.ViTConfig
  collect: tuple[str, ...] = ()
  edit: attention_lib.Edit | None = None
  remat: bool = False

  @nn.compact
  def __call__(
    self, z: jax.Array, weights: Any = None
  ) -> tuple[jax.Array, nn.LayerNorm, dict[str, jax.Array]]:
    """Return z_L, the final LayerNorm to be applied, and what is collected."""
    blocks = nn.scan(
      nn.remat(Block, prevent_cse=False) if self.remat else Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.config.depth,
      # The check traces the block twice. `init` would draw other numbers
      # without it; nothing else depends on it.
      check_constancy_invariants=self.is_initializing(),
    )(self.config, self.collect, self.edit, name="encoderblock")
    z, collected = blocks(z, weights) if self.edit else blocks(z)
    return z, attention_lib.layer_norm(self.config, "encoder_norm"), collected


def show_shapes(record: Any) -> str:
  """Describe a dataclass of arrays in a line: dtype and shape of each."""
  shown = lambda x: f"{x.dtype}{[*x.shape]}" if hasattr(x, "shape") else x
  fields = (f.name for f in dataclasses.fields(record))
  texts = (f"{name}={shown(getattr(record, name))}" for name in fields)
  return f"{type(record).__name__}({', '.join(texts)})"


@flax.struct.dataclass
class Stream:
  """Intermediate and final results of a ViT.

  Attributes:
    tokens: LN_0(z_m) of every block, (L, B, N, D), or None if they were not
      collected; prompts of an editor are among the N.
    blocks: outputs z_1..z_L of the blocks, (L, B, N, D), or None likewise.
    encoded: after the final LayerNorm, (B, N, D), float32.
    final: pooled, before any representation layer, (B, D), float32. Readers
      take this (the official VQT code ignores `pre_logits` as well).
    pooled: input of the pre-trained head, (B, rep_size or D), float32.
    logits: of the pre-trained head (B, num_classes), float32, or None.
  """

  tokens: jax.Array | None
  blocks: jax.Array | None
  encoded: jax.Array
  final: jax.Array
  pooled: jax.Array
  logits: jax.Array | None

  __repr__ = show_shapes


class ViT(nn.Module):
  """A Vision Transformer with Big Vision's parameter names."""

  config: vit_config.ViTConfig

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    collect: tuple[str, ...] = (),
    embedding_mask: jax.Array | None = None,
    edit: attention_lib.Edit | None = None,
    weights: Any = None,
    remat: bool = False,
  ) -> Stream:
    """Run the model.

    Args:
      images: (B, height, width, 3), float, scaled as in pre-training.
      collect: which of "tokens" and "blocks" the stream holds.
      embedding_mask: (B, N, D), multiplies the embedded tokens (the official
        VQT program's dropout on embeddings), or None.
      edit: changes the stream, or None.
      weights: of the edit; those of the blocks, {"encoderblock": leaves}, are
        stacked over depth.
      remat: recompute the inside of the blocks in a gradient.
    """
    c = self.config
    edited = attention_lib.bind_edit(edit, weights)
    patches = nn.Conv(
      features=c.width,
      kernel_size=c.patch_size,
      strides=c.patch_size,
      padding="VALID",
      dtype=c.dtype,
      name="embedding",
    )
    z = edited("embedding", images, patches(images.astype(c.dtype)))
    z = z.reshape(z.shape[0], -1, c.width)
    if c.posemb == "learn":
      init = nn.initializers.normal(stddev=1 / math.sqrt(c.width))
      z += self.param("pos_embedding", init, (1, *z.shape[1:])).astype(z.dtype)
    elif c.posemb == "sincos2d":
      z += jnp.asarray(posemb_sincos_2d(c.grid, c.width), z.dtype)
    for name, count in (("registers", c.registers), ("cls", c.has_class_token)):
      if count:
        token = self.param(name, nn.initializers.zeros, (1, count, c.width))
        token = jnp.tile(token.astype(z.dtype), (z.shape[0], 1, 1))
        z = jnp.concatenate([token, z], axis=1)
    if c.pre_norm:
      z = attention_lib.layer_norm(c, "pre_norm")(z).astype(z.dtype)
    if embedding_mask is not None:
      z *= embedding_mask.astype(z.dtype)
    z = edited("embedded", z, z)

    encoder = Encoder(c, collect, edit, remat, name="Transformer")
    block_weights = weights.get("encoderblock", {}) if edit else None
    z, encoder_norm, collected = encoder(z, block_weights)
    z = edited("output", z, z)
    norm = lambda z: edited("encoder_norm", z, encoder_norm(z))
    encoded = norm(z)
    match c.pool_type:
      case "tok" | "0":
        final = encoded[:, 0]
      case "gap":
        final = encoded[:, c.num_prefix_tokens :].mean(axis=1)
      case "map":
        patches = encoded[:, c.num_prefix_tokens :]
        final = MapHead(c, name="MAPHead_0")(patches)
      case "mae":
        patches = z[:, c.num_prefix_tokens :].astype(jnp.float32)
        final = norm(patches.mean(axis=1))
    final = final.astype(jnp.float32)

    pooled, logits = final, None
    if c.rep_size:
      dense = nn.Dense(c.rep_size, dtype=c.dtype, name="pre_logits")
      pooled = jnp.tanh(dense(pooled))
    if c.num_classes:
      logits = nn.Dense(c.num_classes, dtype=c.dtype, name="head")(pooled)
      logits = logits.astype(jnp.float32)
    return Stream(
      tokens=collected.get("tokens"),
      blocks=collected.get("blocks"),
      encoded=encoded,
      final=final,
      pooled=pooled.astype(jnp.float32),
      logits=logits,
    )


def init_params(config: vit_config.ViTConfig, key: jax.Array) -> Any:
  """Draw float32 parameters of a ViT, a nested dict of arrays."""
  images = jnp.zeros((1, *config.image_size, 3), jnp.float32)
  return ViT(config).init(key, images)["params"]


@functools.cache
def param_shapes(config: vit_config.ViTConfig) -> Any:
  """Shapes and dtypes of the parameters, a nested dict."""

  def make(key):  # As `init` does, but a block is traced once.
    images = jnp.zeros((1, *config.image_size, 3), jnp.float32)
    run = functools.partial(ViT(config).apply, {}, mutable=["params"])
    return run(images, rngs={"params": key})[1]["params"]

  return jax.eval_shape(make, jax.random.key(0))
