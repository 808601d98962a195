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
