"""Sizes and variants of Vision Transformers."""

import dataclasses
import math
import re
from typing import Any, Literal

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
# Fields that only ViTs of other libraries set.
_OF_FAMILIES = (
  "class_token",
  "registers",
  "rope_theta",
  "pre_norm",
  "layer_norm_epsilon",
  "gated_mlp",
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Architecture of a ViT: all that decides its shapes and arithmetic.

  Attributes:
    width: token size D.
    depth: number of blocks L.
    mlp_dim: hidden size of the blocks' MLPs.
    num_heads: attention heads H; divides `width`.
    patch_size: (height, width) of a patch, pixels.
    image_size: (height, width) of the images, pixels. As in Big Vision, pixels
      right of and below the last whole patch are ignored.
    pool_type: "tok" (class token), "gap" (mean over patches), "map" (attention
      pooling), "0" (the first patch, of a stream without a class token), or
      "mae" (mean over patches *before* the final LayerNorm, as fine-tuned MAE
      models and timm's `fc_norm`).
    class_token: whether the stream begins with one; None: if `pool_type` is
      "tok" or "mae".
    registers: number of register tokens behind the class token, without
      positions (https://arxiv.org/abs/2309.16588).
    posemb: "learn", "sincos2d" (fixed, MoCo v3), or "rope" (queries and keys of
      patches are rotated by their place in every block, as in DINOv3).
    rope_theta: base of the periods of "rope".
    pre_norm: the embedded tokens are normalised before the blocks (CLIP).
    layer_norm_epsilon: added to the variance in every LayerNorm.
    rep_size: size of the tanh representation layer before the head, or None.
    num_classes: size of the pre-trained head, or None.
    gelu: "tanh" (Flax, Big Vision), "exact" (erf; most PyTorch-born models) or
      "quick" (x * sigmoid(1.702 x); CLIP).
    gated_mlp: the blocks' MLPs are SwiGLU (https://arxiv.org/abs/2002.05202),
      whose activation is SiLU.
    dtype: dtype of the matrix products and of the stream.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: tuple[int, int]
  image_size: tuple[int, int]
  pool_type: Literal["tok", "gap", "map", "0", "mae"] = "tok"
  class_token: bool | None = None
  registers: int = 0
  posemb: Literal["learn", "sincos2d", "rope"] = "learn"
  rope_theta: float = 100.0
  pre_norm: bool = False
  layer_norm_epsilon: float = 1e-6
  rep_size: int | None = None
  num_classes: int | None = None
  gelu: Literal["tanh", "exact", "quick"] = "tanh"
  gated_mlp: bool = False
  dtype: str = "float32"

  def as_dict(self) -> dict[str, Any]:
    """Return the fields, without those that Big Vision's ViTs leave alone."""
    fields = dataclasses.asdict(self)
    for field in dataclasses.fields(self):
      if field.name in _OF_FAMILIES and fields[field.name] == field.default:
        del fields[field.name]
    return fields

  @property
  def grid(self) -> tuple[int, int]:
    """Patches per column and per row."""
    return (
      self.image_size[0] // self.patch_size[0],
      self.image_size[1] // self.patch_size[1],
    )

  @property
  def has_class_token(self) -> bool:
    if self.class_token is None:
      return self.pool_type in ("tok", "mae")
    return self.class_token

  @property
  def num_prefix_tokens(self) -> int:
    """Number of tokens before the patches: class token and registers."""
    return self.has_class_token + self.registers

  @property
  def num_tokens(self) -> int:
    """Length N of the stream."""
    return self.num_prefix_tokens + math.prod(self.grid)

  @property
  def absorbs_keys(self) -> bool:
    """True if queries can read tokens without projecting them to keys.

    They cannot if keys are rotated: then the key projection differs by place.
    """
    return self.posemb != "rope"

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
  """Return the sizes of a Big Vision variant, e.g. "B/16" or "S/16x8".

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
