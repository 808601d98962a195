"""The frozen Vision Transformer, with query-token passthrough in every block.

Architecture and parameter names are Big Vision's (and so those of the ViT
paper, https://arxiv.org/abs/2010.11929): one `Block` scanned over depth, its
leaves stacked on a first axis as in Big Vision's `scan=True` models. The query
path of a block is `Block.read` (visual query tuning, section 3.2 of
https://arxiv.org/abs/2212.03220).

What changes the stream (see `editors`) hooks in here and nowhere else: an
`Edit` sees every named operation's input x and output y, and gives what takes
the place of y. Names in a block are those of its leaf modules, and "input" (x
and y: what enters the block) and "MlpBlock_0" (y: the MLP's output, x: the
residual stream that it is added to). Names at the ends: "embedding" (x: images,
y: patches), "embedded" (tokens with positions), "output" (of the last block)
and "encoder_norm". Without an edit nothing is computed that would not be.

Letters: B batch, N tokens, D width, L depth, H heads, K head size, T queries.
"""

import contextlib
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


class Mlp(nn.Module):
  """Dense, GELU, dense (Big Vision's `MlpBlock`)."""

  config: vit_config.ViTConfig

  def setup(self):
    c = self.config
    self.Dense_0 = nn.Dense(c.mlp_dim, dtype=c.dtype)
    self.Dense_1 = nn.Dense(c.width, dtype=c.dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.Dense_0(x)
    return self.Dense_1(nn.gelu(x, approximate=self.config.gelu == "tanh"))


class Block(nn.Module):
  """One pre-norm encoder block; `collect` names what else the scan returns.

  "tokens" are the normalised inputs LN_0(z_m), all that a reader needs;
  "blocks" are the outputs z_{m+1}. `edit` changes the stream, with weights that
  come with each call; what reads the stream passes through the edited block.
  """

  config: vit_config.ViTConfig
  collect: tuple[str, ...] = ()
  edit: attention_lib.Edit | None = None

  def setup(self):
    self.LayerNorm_0 = attention_lib.layer_norm()
    self.MultiHeadDotProductAttention_0 = attention_lib.Attention(self.config)
    self.LayerNorm_1 = attention_lib.layer_norm()
    self.MlpBlock_0 = Mlp(self.config)

  def __call__(
    self, z: jax.Array, weights: Any = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    with self._edited(weights) as edited:
      z = edited("input", z, z)
      tokens = self.LayerNorm_0(z).astype(self.config.dtype)
      z = z + self.MultiHeadDotProductAttention_0(tokens, tokens)
      z = z + edited("MlpBlock_0", z, self.MlpBlock_0(self.LayerNorm_1(z)))
    seen = {"tokens": tokens, "blocks": z}
    return z, {name: seen[name] for name in self.collect}

  def read(
    self,
    tokens: jax.Array,
    queries: jax.Array,
    weights: Any = None,
    rows: jax.Array | None = None,
  ) -> jax.Array:
    """Passes queries through this block; they see the stream, nobody sees them.

    Args:
      tokens: LN_0(z_m), (B, N, D), or with `rows` (n, N, D) or what `project`
        makes of them, (n, 2, H, N, K).
      queries: (T, D) shared by all examples, or (B, T, D). float32.
      weights: of the edit, in this block.
      rows: (parts, b), of the examples to read, part by part; only of a stream
        that nothing edits.

    Returns:
      The queries' outputs (B, T, D), float32.
    """
    attention = self.MultiHeadDotProductAttention_0
    attend = functools.partial(
      attention.absorbed if tokens.ndim == 3 else attention.projected,
      rows=rows,
    )
    if attention_lib.projections_edited(weights):  # Then they have to be there.
      attend = attention
      shape = (tokens.shape[0], *queries.shape[-2:])
      queries = jnp.broadcast_to(queries, shape)
    with self._edited(weights) as edited:
      x = queries + attend(self.LayerNorm_0(queries), tokens)
      return x + edited("MlpBlock_0", x, self.MlpBlock_0(self.LayerNorm_1(x)))

  def project(self, tokens: jax.Array) -> jax.Array:
    """Keys and values (B, 2, H, N, K) of LN_0(z_m) (B, N, D)."""
    return self.MultiHeadDotProductAttention_0.project(tokens)

  def attention(
    self, tokens: jax.Array, queries: jax.Array, weights: Any = None
  ) -> jax.Array:
    """Where `read` looks: (B, H, T, N), float32."""
    attention = self.MultiHeadDotProductAttention_0
    with self._edited(weights):
      queries = self.LayerNorm_0(queries)
      if not attention_lib.projections_edited(weights):
        return attention.weights(queries, tokens)
      q, k = attention.query(queries), attention.key(tokens)
      scores = (
        attention_lib.dot("...thk,bnhk->bhtn", q, k)
        * self.config.head_dim**-0.5
      )
      return jax.nn.softmax(scores, axis=-1)

  @contextlib.contextmanager
  def _edited(self, weights: Any):
    """Edits what modules give meanwhile; yields the edit for the rest."""
    if self.edit is None:
      yield lambda name, x, y: y
      return
    edited = lambda name, x, y: self.edit(name, weights, x, y)

    def intercept(call, args, kwargs, context):
      y = call(*args, **kwargs)
      if context.method_name != "__call__":
        return y
      name = context.module.name
      return edited(name, args[0], y) if name in attention_lib.EDITED else y

    with nn.intercept_methods(intercept):
      yield edited


class MapHead(nn.Module):
  """Attention pooling by one learned probe (Big Vision's `MAPHead`)."""

  config: vit_config.ViTConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    c = self.config
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, c.width))
    probe = jnp.tile(probe, (tokens.shape[0], 1, 1)).astype(c.dtype)
    attention = attention_lib.Attention(
      c, name="MultiHeadDotProductAttention_0"
    )
    x = attention(probe, tokens)
    y = nn.LayerNorm(
      epsilon=attention_lib.EPSILON, dtype=jnp.float32, name="LayerNorm_0"
    )(x)
    return (x + Mlp(c, name="MlpBlock_0")(y))[:, 0]


class Encoder(nn.Module):
  """The blocks, scanned, and the final LayerNorm.

  `remat`: a gradient keeps the blocks' inputs and computes all else again.
  """

  config: vit_config.ViTConfig
  collect: tuple[str, ...] = ()
  edit: attention_lib.Edit | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, z: jax.Array, weights: Any = None):
    blocks = nn.scan(
      nn.remat(Block, prevent_cse=False) if self.remat else Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.config.depth,
    )(self.config, self.collect, self.edit, name="encoderblock")
    z, seen = blocks(z, weights) if self.edit else blocks(z)
    norm = nn.LayerNorm(
      attention_lib.EPSILON, dtype=jnp.float32, name="encoder_norm"
    )
    return z, norm, seen


def show_shapes(record: Any) -> str:
  """One line of a dataclass of arrays: the dtype and shape of each."""
  shown = lambda x: f"{x.dtype}{[*x.shape]}" if hasattr(x, "shape") else x
  fields = (f.name for f in dataclasses.fields(record))
  texts = (f"{name}={shown(getattr(record, name))}" for name in fields)
  return f"{type(record).__name__}({', '.join(texts)})"


@flax.struct.dataclass
class Stream:
  """What flows through a frozen ViT, as far as it was asked for.

  Attributes:
    tokens: LN_0(z_m) of every block, (L, B, N, D), or None; an edit may have
      made N larger.
    blocks: outputs z_1..z_L of the blocks, (L, B, N, D), or None.
    encoded: after the final LayerNorm, (B, N, D), float32.
    final: pooled, before any representation layer, (B, D), float32: what
      readers read (the official VQT code ignores `pre_logits` as well).
    pooled: what goes into the pre-trained head, (B, rep_size or D), float32.
    logits: of the pre-trained head (B, num_classes), or None. float32.
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
    """Runs the encoder.

    Args:
      images: (B, height, width, 3), float, scaled as in pre-training.
      collect: which of "tokens", "blocks" to keep.
      embedding_mask: (B, N, D), multiplies the embedded tokens (the official
        VQT program's dropout on embeddings), or None.
      edit: changes the stream, or None.
      weights: its own; those of the blocks, {"encoderblock": leaves}, are
        stacked over depth.
      remat: whether a gradient computes the inside of the blocks again.

    Returns:
      The stream.
    """
    c = self.config
    edited = lambda name, x, y: edit(name, weights, x, y) if edit else y
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
    else:
      z += jnp.asarray(posemb_sincos_2d(c.grid, c.width), z.dtype)
    if c.has_class_token:
      cls = self.param("cls", nn.initializers.zeros, (1, 1, c.width))
      cls = jnp.tile(cls.astype(z.dtype), (z.shape[0], 1, 1))
      z = jnp.concatenate([cls, z], axis=1)
    if embedding_mask is not None:
      z *= embedding_mask.astype(z.dtype)
    z = edited("embedded", z, z)

    encoder = Encoder(c, collect, edit, remat, name="Transformer")
    of_blocks = weights.get("encoderblock", {}) if edit else None
    z, encoder_norm, seen = encoder(z, of_blocks)
    z = edited("output", z, z)
    norm = lambda z: edited("encoder_norm", z, encoder_norm(z))
    encoded = norm(z)
    match c.pool_type:
      case "tok" | "0":
        final = encoded[:, 0]
      case "gap":
        final = encoded.mean(axis=1)
      case "map":
        final = MapHead(c, name="MAPHead_0")(encoded)
      case "mae":
        final = norm(z[:, 1:].astype(jnp.float32).mean(axis=1))
    final = final.astype(jnp.float32)

    pooled, logits = final, None
    if c.rep_size:
      dense = nn.Dense(c.rep_size, dtype=c.dtype, name="pre_logits")
      pooled = jnp.tanh(dense(pooled))
    if c.num_classes:
      logits = nn.Dense(c.num_classes, dtype=c.dtype, name="head")(pooled)
      logits = logits.astype(jnp.float32)
    return Stream(
      tokens=seen.get("tokens"),
      blocks=seen.get("blocks"),
      encoded=encoded,
      final=final,
      pooled=pooled.astype(jnp.float32),
      logits=logits,
    )


def init_params(config: vit_config.ViTConfig, key: jax.Array) -> Any:
  """Fresh float32 parameters of a ViT, a nested dict of arrays."""
  images = jnp.zeros((1, *config.image_size, 3), jnp.float32)
  return ViT(config).init(key, images)["params"]


@functools.cache
def param_shapes(config: vit_config.ViTConfig) -> Any:
  """Shapes and dtypes of the parameters, without computing any."""
  init = functools.partial(init_params, config)
  return jax.eval_shape(init, jax.random.key(0))
