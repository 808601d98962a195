"""From a stored image to what a backbone takes: resize, then scale."""

from collections.abc import Callable
from typing import Any

from vqt_jax import backbone
from vqt_jax import errors
from vqt_jax.data.tensorflow_lazy import tf

# "bilinear": TensorFlow 2, as in Big Vision: half-pixel centres, which keep the
# image in place. "legacy": TensorFlow 1, as in VTAB and the authors' program:
# source position = target index * (in / out). Neither has antialiasing.
RESIZES: dict[str, Callable[[Any, tuple[int, int]], Any]] = {
    "bilinear": lambda image, size: tf.image.resize(image, size),
    "legacy": lambda image, size: tf.compat.v1.image.resize(image, size),
}

ImageSize = int | tuple[int, int]


def make_preprocess(
    image_size: ImageSize,
    value_range: str,
    resize: str = "bilinear",
    pixel_scale: int = 1,
) -> Callable[[Any], Any]:
  """The function from stored images to the backbone's inputs.

  Images go straight to the target size, whatever their aspect ratio: no crop
  and no augmentation (the VTAB protocol).

  Args:
    image_size: side, or (height, width), pixels.
    value_range: key of `backbone.VALUE_RANGES`.
    resize: key of `RESIZES`.
    pixel_scale: stored pixels times this are 0..255.

  Returns:
    uint8 (h, w, c), c = 1, 3 or 4 -> float32 (height, width, 3), usable in
    `tf.data.Dataset.map`. One channel is repeated; a fourth (alpha) dropped.

  Raises:
    UserError: a name that is not in the tables, or an impossible size.
  """
  size = _size(image_size)
  resize_fn = _lookup("resize", resize, RESIZES)
  mean, std = _lookup("value_range", value_range, backbone.VALUE_RANGES)

  def preprocess(image: Any) -> Any:
    image = tf.cast(image, tf.float32) * float(pixel_scale)
    image = resize_fn(image[..., :3], size) / 255.0
    if image.shape[-1] == 1:
      image = tf.repeat(image, 3, axis=-1)
    return tf.ensure_shape((image - mean) / std, (*size, 3))

  return preprocess


def _size(image_size: ImageSize) -> tuple[int, int]:
  sides = (image_size,) * 2 if isinstance(image_size, int) else image_size
  if len(sides) != 2 or min(sides) < 1:
    raise errors.UserError(
        f"image_size {image_size!r}: expected a positive number of pixels, or"
        " (height, width)."
    )
  return tuple(int(side) for side in sides)


def _lookup(field: str, name: str, table: dict[str, Any]) -> Any:
  if name not in table:
    raise errors.UserError(
        f"Unknown {field} {name!r}; expected one of: {', '.join(table)}."
    )
  return table[name]
