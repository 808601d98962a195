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

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import re
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax import fused_attention
from vqt_jax import parallel
from vqt_jax import token_mean

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

# Big Vision's `decode_variant`: (width, depth, mlp_dim, num_heads).
VARIANTS = {
  "mu": (32, 1, 128, 2),
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "M": (512, 12, 2048, 8),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "So400m": (1152, 27, 4304, 16),
  "H": (1280, 32, 5120, 16),
  "g": (1408, 40, 6144, 16),
  "g-opt": (1536, 40, 6144, 16),
  "G": (1664, 48, 8192, 16),
  "G-opt": (1536, 48, 8192, 16),
  "e": (1792, 56, 15360, 16),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """What decides the shape and the arithmetic of a ViT.

  Attributes:
    width: token size D.
    depth: number of blocks L.
    mlp_dim: hidden size of the blocks' MLPs.
    num_heads: attention heads H; divides `width`.
    patch_size: (height, width) of a patch, pixels.
    image_size: (height, width) of the images, pixels. As in Big Vision, pixels
      right of and below the last whole patch are ignored.
    pool_type: "tok" (class token), "gap" (mean over tokens), "map" (attention
      pooling), "0" (the first patch, of a stream without a class token), or
      "mae" (class token in the stream, but the result is the mean over patches
      *before* the final LayerNorm, as fine-tuned MAE models).
    posemb: "learn", or "sincos2d" (fixed, MoCo v3).
    rep_size: size of the tanh representation layer before the head, or None.
    num_classes: size of the pre-trained head, or None.
    gelu: "tanh" (Flax, Big Vision) or "exact" (erf; PyTorch-born models).
    dtype: dtype of the matrix products and of the stream.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: tuple[int, int]
  image_size: tuple[int, int]
  pool_type: Literal["tok", "gap", "map", "0", "mae"] = "tok"
  posemb: Literal["learn", "sincos2d"] = "learn"
  rep_size: int | None = None
  num_classes: int | None = None
  gelu: Literal["tanh", "exact"] = "tanh"
  dtype: str = "float32"

  @property
  def grid(self) -> tuple[int, int]:
    """Patches per column and per row."""
    return (
      self.image_size[0] // self.patch_size[0],
      self.image_size[1] // self.patch_size[1],
    )

  @property
  def has_class_token(self) -> bool:
    return self.pool_type in ("tok", "mae")

  @property
  def num_tokens(self) -> int:
    """Length N of the stream."""
    return math.prod(self.grid) + self.has_class_token

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @property
  def variant(self) -> str:
    """Big Vision's name, e.g. "B/16", or the sizes if it has none."""
    sizes = (self.width, self.depth, self.mlp_dim, self.num_heads)
    names = [name for name, known in VARIANTS.items() if known == sizes]
    patch = "x".join(map(str, dict.fromkeys(self.patch_size)))
    if names:
      return f"{names[0]}/{patch}"
    return f"{self.width}x{self.depth}/{patch}"


def decode_variant(variant: str) -> dict[str, Any]:
  """Big Vision variant, e.g. "B/16", "So400m/14" or "S/16x8", to its sizes.

  Returns:
    width, depth, mlp_dim, num_heads and (with "/P") patch_size (height, width).

  Raises:
    ValueError: unknown variant.
  """
  name, _, patch = variant.partition("/")
  if name not in VARIANTS or (patch and not re.fullmatch(r"\d+(x\d+)?", patch)):
    raise ValueError(
      f"Unknown ViT variant {variant!r}. Expected NAME/PATCH, e.g. B/16, with"
      f" NAME one of {', '.join(VARIANTS)}."
    )
  keys = ("width", "depth", "mlp_dim", "num_heads")
  sizes: dict[str, Any] = dict(zip(keys, VARIANTS[name]))
  if patch:
    height, _, width = patch.partition("x")
    sizes["patch_size"] = (int(height), int(width or height))
  return sizes


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


def _layer_norm() -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32)


_dot = token_mean.dot


class Mlp(nn.Module):
  """Dense, GELU, dense (Big Vision's `MlpBlock`)."""

  config: ViTConfig

  def setup(self):
    c = self.config
    self.Dense_0 = nn.Dense(c.mlp_dim, dtype=c.dtype)
    self.Dense_1 = nn.Dense(c.width, dtype=c.dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.Dense_0(x)
    return self.Dense_1(nn.gelu(x, approximate=self.config.gelu == "tanh"))


class Attention(nn.Module):
  """Multi-head attention with Flax's `MultiHeadDotProductAttention` leaves."""

  config: ViTConfig

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
    shards = math.gcd(parallel.size("model"), self.config.num_heads)

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
    return jax.nn.softmax(_dot(f"bnd,{shape}->bhtn", tokens, u), axis=-1)

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
      mean = _dot("bhtn,bnd->bhtd", weights, tokens)
    else:
      mean = token_mean.by_parts(self._keys_of(queries), tokens, rows)
    mean = mean.astype(c.dtype)
    # The kernel first: so a CPU's product has D last, as its reader does.
    return self._out_of(_dot("dhk,bhtd->bthk", self._kernel("value"), mean))

  def projected(
    self, queries: jax.Array, projections: jax.Array, rows: jax.Array
  ) -> jax.Array:
    """As `absorbed`, of stored `project(tokens)` (n, 2, H, N, K)."""
    c = self.config
    q = jnp.swapaxes(self.query(queries), -2, -3) * c.head_dim**-0.5
    heads = token_mean.by_parts(q.astype(c.dtype), projections, rows)
    return self._out_of(jnp.swapaxes(heads, 1, 2))

  def project(self, tokens: jax.Array) -> jax.Array:
    """Keys and values (B, 2, H, N, K) of tokens (B, N, D), without biases.

    That of the keys makes no difference; that of the values is added to what is
    read of them.
    """
    both = [
      _dot("bnd,dhk->bhnk", tokens, self._kernel(name))
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
    u = _dot("dhk,...thk->...htd", self._kernel("key"), self.query(queries))
    return (u * c.head_dim**-0.5).astype(c.dtype)

  def _kernel(self, name: str) -> jax.Array:
    params = getattr(self, name).variables["params"]
    return params["kernel"].astype(self.config.dtype)


class Block(nn.Module):
  """One pre-norm encoder block; `collect` names what else the scan returns.

  "tokens" are the normalised inputs LN_0(z_m), all that a reader needs;
  "blocks" are the outputs z_{m+1}. `edit` changes the stream, with weights that
  come with each call; what reads the stream passes through the edited block.
  """

  config: ViTConfig
  collect: tuple[str, ...] = ()
  edit: Edit | None = None

  def setup(self):
    self.LayerNorm_0 = _layer_norm()
    self.MultiHeadDotProductAttention_0 = Attention(self.config)
    self.LayerNorm_1 = _layer_norm()
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
    if _projections_edited(weights):  # Then they have to be there.
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
      if not _projections_edited(weights):
        return attention.weights(queries, tokens)
      q, k = attention.query(queries), attention.key(tokens)
      scores = _dot("...thk,bnhk->bhtn", q, k) * self.config.head_dim**-0.5
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
      return edited(name, args[0], y) if name in EDITED else y

    with nn.intercept_methods(intercept):
      yield edited


def _projections_edited(weights: Any) -> bool:
  """Whether keys or values are edited: they cannot be absorbed then."""
  return bool({"key", "value"} & set(weights or {}))


class MapHead(nn.Module):
  """Attention pooling by one learned probe (Big Vision's `MAPHead`)."""

  config: ViTConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    c = self.config
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, c.width))
    probe = jnp.tile(probe, (tokens.shape[0], 1, 1)).astype(c.dtype)
    attention = Attention(c, name="MultiHeadDotProductAttention_0")
    x = attention(probe, tokens)
    y = nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32, name="LayerNorm_0")(x)
    return (x + Mlp(c, name="MlpBlock_0")(y))[:, 0]


class Encoder(nn.Module):
  """The blocks, scanned, and the final LayerNorm.

  `remat`: a gradient keeps the blocks' inputs and computes all else again.
  """

  config: ViTConfig
  collect: tuple[str, ...] = ()
  edit: Edit | None = None
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
    norm = nn.LayerNorm(EPSILON, dtype=jnp.float32, name="encoder_norm")
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

  config: ViTConfig

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    collect: tuple[str, ...] = (),
    embedding_mask: jax.Array | None = None,
    edit: Edit | None = None,
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


def init_params(config: ViTConfig, key: jax.Array) -> Any:
  """Fresh float32 parameters of a ViT, a nested dict of arrays."""
  images = jnp.zeros((1, *config.image_size, 3), jnp.float32)
  return ViT(config).init(key, images)["params"]


@functools.cache
def param_shapes(config: ViTConfig) -> Any:
  """Shapes and dtypes of the parameters, without computing any."""
  init = functools.partial(init_params, config)
  return jax.eval_shape(init, jax.random.key(0))
