"""Decoding, resizing and scaling of stored images for a backbone."""

from collections.abc import Callable
import functools
import io
from typing import Any

import numpy as np
import PIL.Image

from vqt_jax import errors
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.models import scaling

# "bilinear": TensorFlow 2, as in Big Vision: half-pixel centres, which keep the
# image in place. "legacy": TensorFlow 1, as in VTAB and the authors' program:
# source position = target index * (in / out). Neither is antialiased.
RESIZES: dict[str, Callable[[Any, tuple[int, int]], Any]] = {
  "bilinear": lambda image, size: tf.image.resize(image, size),
  "legacy": lambda image, size: tf.compat.v1.image.resize(image, size),
}

ImageSize = int | tuple[int, int]

# First bytes of a file.
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PN"


def decode(content: Any, channels: int) -> Any:
  """Decode an image file, eagerly or in `tf.data.Dataset.map`.

  TensorFlow decodes JPEG and PNG, as for VTAB's published numbers; Pillow all
  other kinds. Of an animation the first frame is taken, of 16-bit pixels the
  upper 8 bits; alpha is dropped, and EXIF's orientation is not applied.

  Args:
    content: string scalar, the file.
    channels: 1 (grey) or 3 (RGB).

  Returns:
    uint8 (h, w, channels).

  Raises:
    tf.errors.OpError: the file cannot be decoded; in eager mode also any other
      exception of Pillow.
  """
  start = tf.strings.substr(content, 0, 3)
  with_pillow = functools.partial(_decode_with_pillow, channels=channels)
  image = tf.cond(
    (start == _JPEG) | (start == _PNG),
    lambda: tf.io.decode_image(content, channels, expand_animations=False),
    lambda: tf.numpy_function(with_pillow, [content], tf.uint8, stateful=False),
  )
  image.set_shape((None, None, channels))
  return image


def _decode_with_pillow(content: bytes, channels: int) -> np.ndarray:
  try:
    image = PIL.Image.open(io.BytesIO(content))
  except PIL.UnidentifiedImageError:
    raise ValueError("not a kind of image that is known here") from None
  with image:
    if image.mode.startswith("I;16"):
      upper = np.asarray(image) >> 8
      image = PIL.Image.fromarray(upper.astype(np.uint8))
    elif image.mode in ("I", "F"):
      raise ValueError(f"{image.format} with 32 bits per pixel, not 8 or 16")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
  return pixels.reshape(*pixels.shape[:2], channels)


def make_preprocess(
  image_size: ImageSize,
  value_range: str,
  resize: str = "bilinear",
  pixel_scale: int = 1,
) -> Callable[[Any], Any]:
  """Make the function from stored images to the backbone's inputs.

  Images go straight to the target size, whatever their aspect ratio: no crop
  and no augmentation (the VTAB protocol).

  Args:
    image_size: side, or (height, width), pixels.
    value_range: as `scaling.find_scaling` takes it.
    resize: key of `RESIZES`.
    pixel_scale: stored pixels times this are 0..255.

  Returns:
    uint8 (h, w, c), c = 1, 3 or 4 -> float32 (height, width, 3), eagerly or in
    `tf.data.Dataset.map`. One channel is repeated; a fourth (alpha) dropped.

  Raises:
    UserError: a name is not in the tables, or the size is impossible.
  """
  size = checked_size(image_size)
  if resize not in RESIZES:
    raise errors.unknown_name("resize", resize, RESIZES)
  mean, std = scaling.find_scaling(value_range)

  def preprocess(image: Any) -> Any:
    image = tf.cast(image, tf.float32) * float(pixel_scale)
    image = RESIZES[resize](image[..., :3], size) / 255.0
    if image.shape[-1] == 1:
      image = tf.repeat(image, 3, axis=-1)
    return tf.ensure_shape((image - mean) / std, (*size, 3))

  return preprocess


def checked_size(image_size: ImageSize) -> tuple[int, int]:
  """Return (height, width); an impossible one is a `UserError`."""
  sides = (image_size,) * 2 if isinstance(image_size, int) else image_size
  if len(sides) != 2 or min(sides) < 1:
    raise errors.UserError(
      f"image_size {image_size!r}: expected a positive number of pixels, or"
      " (height, width)."
    )
  return tuple(int(side) for side in sides)
