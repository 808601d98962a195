"""A frozen ViT with its weights."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax import errors
from vqt_jax.models import scaling
from vqt_jax.models import vit
from vqt_jax.models import vit_config

# Scaling of pixels 0..255 to some ranges, for error messages.
_FROM_PIXELS = {"-1..1": "images / 127.5 - 1", "0..1": "images / 255"}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(config, params, images, collect):
  return vit.ViT(config).apply({"params": params}, images, collect=collect)


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
  """A ViT and its parameters; call it with images to get the stream.

  Attributes:
    config: architecture.
    params: nested dict with Big Vision's names, blocks stacked over depth.
    value_range: of its inputs, see `scaling.find_scaling`.
    source: file, address or public name that it was loaded from, for display.
    trained_size: (height, width) of the images that its positions were learnt
      on, pixels; None if unknown, or if positions are computed.
    assumed: those of "value_range" and "gelu" that were neither given nor read
      from the checkpoint.
    revision: commit of the model on the hub; "" if it is not from there.
    layout: of the file that it was loaded from: "big_vision", or library and
      kind of model, such as "hf-dinov2"; see `save_backbone`.
  """

  config: vit_config.ViTConfig
  params: Any
  value_range: str = "-1..1"
  source: str = ""
  trained_size: tuple[int, int] | None = None
  assumed: tuple[str, ...] = ()
  revision: str = ""
  layout: str = "big_vision"

  def __repr__(self) -> str:
    c = self.config
    return (
      f"Backbone(ViT-{c.variant}, {c.depth} blocks of width {c.width},"
      f" {c.image_size[0]}x{c.image_size[1]} px, inputs {self.value_range},"
      f" from {self.source!r})"
    )

  def __call__(self, images: jax.Array) -> vit.Stream:
    """Run the ViT on images (B, height, width, 3), scaled to `value_range`.

    Raises:
      UserError: the images do not fit, see `checked`.
    """
    images = self.checked(images)
    return _apply(self.config, self.params, images, ("tokens", "blocks"))

  def checked(self, images: Any) -> jax.Array | np.ndarray:
    """Return images as an array, after checking that they fit this backbone.

    Of traced arrays, and of arrays shared with other processes, only shape and
    dtype are checked: their values are unknown.

    Raises:
      UserError: they are not (B, height, width, 3), not floats, not finite, or
        not scaled to `value_range`.
    """
    if not isinstance(images, jax.Array):
      try:
        images = np.asarray(images)
      except ValueError as e:
        raise errors.UserError(f"images: expected one array: {e}.") from e
    wanted = f"(B, {', '.join(map(str, self.config.image_size))}, 3)"
    right_shape = images.shape[1:] == (*self.config.image_size, 3)
    right_dtype = jnp.issubdtype(images.dtype, jnp.floating)
    if not (right_shape and right_dtype):
      shape = f"({', '.join(map(str, images.shape))})"
      raise errors.UserError(
        f"images: expected floats {wanted} scaled to {self.value_range},"
        f" found {images.dtype} {shape}."
        + ("" if right_shape else self._shape_advice(images.shape))
        + ("" if right_dtype else self._scale_advice)
      )
    if isinstance(images, jax.core.Tracer) or not images.size:
      return images
    if isinstance(images, jax.Array) and not images.is_fully_addressable:
      return images
    self._check_values(np.asarray(images))
    return images

  def _check_values(self, images: np.ndarray) -> None:
    mean, std = map(np.array, scaling.find_scaling(self.value_range))
    low, high = float(min((0 - mean) / std)), float(max((1 - mean) / std))
    found = float(images.min()), float(images.max())
    # Resizing may overshoot; images of another range exceed it by more.
    margin = (high - low) / 4
    if low - margin <= found[0] and found[1] <= high + margin:
      return
    if np.isnan(found).any():
      raise errors.UserError(
        f"images: {np.isnan(images).sum():,} of {images.size:,} numbers are"
        " NaN; leave out the images that hold them."
      )
    raise errors.UserError(
      f"images: expected values of {self.value_range} ({low:.3g} to"
      f" {high:.3g}), found {found[0]:.3g} to {found[1]:.3g}."
      f"{self._scale_advice}"
    )

  @property
  def _scale_advice(self) -> str:
    formula = _FROM_PIXELS.get(
      self.value_range,
      "(images / 255 - mean) / std, with mean, std ="
      f" vqt_jax.models.scaling.find_scaling({self.value_range!r})",
    )
    return f" Scale pixels of 0..255: {formula}."

  def _shape_advice(self, shape: tuple[int, ...]) -> str:
    if len(shape) not in (3, 4) or shape[-1] != 3:
      return " Three channels come last."
    if len(shape) == 3:
      return " Add an axis for the batch: images[None]."
    return (
      " Resize them, or load the backbone for them: load_backbone(...,"
      f" image_size=({shape[1]}, {shape[2]}))."
    )

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all weights and their names, in hexadecimal."""
    return _digest(self.params)

  @functools.cached_property
  def identity(self) -> str:
    """SHA-256 without positions: SciPy versions resize these differently."""
    params = dict(self.params)
    params.pop("pos_embedding", None)
    return _digest(params)


def _digest(params: Any) -> str:
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
