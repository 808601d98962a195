"""A frozen ViT with its weights: what readers read from."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from vqt_jax import vit

# Name -> (mean, std) per RGB channel, for images in 0..1.
VALUE_RANGES = {
    "-1..1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0..1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(config, params, images, collect):
  return vit.ViT(config).apply({"params": params}, images, collect=collect)


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A ViT and its parameters; call it with images to get the stream.

  Attributes:
    config: architecture.
    params: nested dict with Big Vision's names, blocks stacked over depth.
    value_range: key of `VALUE_RANGES`: how its inputs are scaled.
    source: where it came from, for people to read.
  """

  config: vit.ViTConfig
  params: Any
  value_range: str = "-1..1"
  source: str = ""

  def __call__(self, images: jax.Array) -> vit.Stream:
    """Images (B, height, width, 3), scaled to `value_range` -> the stream."""
    return _apply(self.config, self.params, images, ("tokens", "blocks"))

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all weights and their names, in hexadecimal."""
    return _digest(self.params)

  @functools.cached_property
  def identity(self) -> str:
    """The same without positions: another SciPy may resize these otherwise."""
    params = dict(self.params)
    params.pop("pos_embedding", None)
    return _digest(params)


def _digest(params: Any) -> str:
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
