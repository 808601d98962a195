"""Resizing of images inside a compiled program, for images of any size.

It computes what prediction computes with Pillow and TensorFlow, whose functions
no program of XLA can call. Sizes of images may be unknown when it is traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import PIL

from vqt_jax.data import decoding

_BITS = 22  # Of Pillow's weights: 8 of a pixel and a sign make 32.
# Since version 13, where the height shrinks much more than the width.
_SOMETIMES_ROWS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def fit(images: jax.Array, size: tuple[int, int], how: str) -> jax.Array:
  """Make images fit as `decoding.fit` does, all with the same size.

  Where it squashes or pads, all bits are Pillow's. Where it crops, Pillow
  rounds edges to float32, and a few pixels differ by 1.

  Args:
    images: uint8 (B, h, w, 3).
    size: (height, width), pixels.
    how: one of `decoding.FITS`.

  Returns:
    uint8 (B, height, width, 3).
  """
  sides = [jnp.asarray(side, jnp.int32) for side in images.shape[1:3]]
  # Ratio of old to new, as a fraction, by axis.
  ratios = list(zip(sides, size))
  targets = list(map(jnp.int32, size))
  if how != "squash":
    (h, height), (w, width) = ratios
    by_height = h * width < w * height  # The height is scaled up by more.
    if how == "pad":
      by_height = ~by_height
    pick = lambda x, y: jnp.where(by_height, x, y)
    one = pick(h, w), pick(height, width)
    if how == "crop":
      ratios = [one, one]
    else:
      targets = [_round_ratio(side * one[1], one[0]) for side in sides]
      targets = [
        jnp.where(taken, whole, jnp.maximum(target, 1))
        for taken, whole, target in zip((by_height, ~by_height), size, targets)
      ]
      ratios = list(zip(sides, targets))
  rows = lambda x: _resize_axis(x, 1, size[0], targets[0], *ratios[0])
  columns = lambda x: _resize_axis(x, 2, size[1], targets[1], *ratios[1])
  if _SOMETIMES_ROWS_FIRST:
    fewer = [side - target for side, target in zip(sides, targets)]
    images = jax.lax.cond(
      (fewer[0] > 0) & (fewer[0] > 2 * fewer[1]),
      lambda x: columns(rows(x)),
      lambda x: rows(columns(x)),
      images,
    )
  else:
    images = rows(columns(images))
  if how != "pad":
    return images
  inside = [
    (at >= 0) & (at < target)
    for at, target in zip(map(_positions, size, targets), targets)
  ]
  inside = inside[0][:, None, None] & inside[1][:, None]
  return jnp.where(inside, images, jnp.uint8(decoding.PAD_COLOUR))


def _round_ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """Round a / b as Python does: halves to even."""
  quotient, rest = a // b, a % b
  up = (2 * rest > b) | ((2 * rest == b) & (quotient % 2 == 1))
  return quotient + up


def _positions(count: int, target: jax.Array) -> jax.Array:
  """Return the numbers of pixels in the middle `target` of `count`."""
  return jnp.arange(count, dtype=jnp.int32) - (count - target) // 2


def _resize_axis(
  images: jax.Array,
  axis: int,
  count: int,
  target: jax.Array,
  old: Any,
  new: Any,
) -> jax.Array:
  """Resize an axis with Pillow's antialiased bilinear filter.

  All in integers: pixel x of the image weighs, in pixel o of the result,
  max(0, 2 max(old, new) - |(2 x + 1) new - 2 new c|), where c is the centre of
  o in the image.

  Args:
    images: uint8 (B, h, w, 3).
    axis: 1 or 2.
    count: length of the axis in the result.
    target: of how many of them, in the middle, pixels of the image are made;
      what is in the others does not matter.
    old, new: ratio of the lengths.
  """
  length = jnp.asarray(images.shape[axis], jnp.int32)
  old, new = jnp.int32(old), jnp.int32(new)
  at = _positions(count, target)
  # Twice the centre, times `new`. What is cut away is so at both ends.
  centre = (2 * at + 1) * old + (length * new - target * old)
  reach = 2 * jnp.maximum(old, new)
  first = (centre - reach) // (2 * new)
  taps = reach // new + 2

  def weight(tap):
    pixel = first + tap
    found = jnp.maximum(0, reach - jnp.abs((2 * pixel + 1) * new - centre))
    there = (pixel >= 0) & (pixel < length)
    return jnp.clip(pixel, 0, length - 1), jnp.where(there, found, 0)

  total = jax.lax.fori_loop(
    0, taps, lambda tap, sum_: sum_ + weight(tap)[1], jnp.zeros_like(centre)
  )
  total = jnp.maximum(total, 1)
  shape = list(images.shape)
  shape[axis] = count
  broadcast = [1, 1, 1, 1]
  broadcast[axis] = count

  def add(tap, sums):
    pixel, weights = weight(tap)
    weights = _fixed_point(weights, total).reshape(broadcast)
    values = jnp.take(images, pixel, axis=axis, mode="clip")
    return sums + values.astype(jnp.int32) * weights

  half = jnp.full(shape, 1 << (_BITS - 1), jnp.int32)
  sums = jax.lax.fori_loop(0, taps, add, half)
  return jnp.clip(sums >> _BITS, 0, 255).astype(jnp.uint8)


def _fixed_point(part: jax.Array, total: jax.Array) -> jax.Array:
  """Round part / total to `_BITS` bits behind the point: a long division."""

  def digit(_, state):
    quotient, rest = state
    rest = 2 * rest
    more = rest >= total
    return 2 * quotient + more, rest - jnp.where(more, total, 0)

  start = (part // total, part % total)
  quotient, rest = jax.lax.fori_loop(0, _BITS, digit, start)
  return quotient + (2 * rest >= total)


def resize_bilinear(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resize as TensorFlow 2 does, (B, h, w, 3) to float32: not antialiased."""
  return _interpolate(images, size, lambda i, scale: (i + 0.5) * scale - 0.5)


def resize_legacy(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resize as TensorFlow 1 does, (B, h, w, 3) to float32."""
  return _interpolate(images, size, lambda i, scale: i * scale)


# As `preprocess.RESIZES`.
RESIZES: dict[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
  "bilinear": resize_bilinear,
  "legacy": resize_legacy,
}


def _interpolate(
  images: jax.Array, size: tuple[int, int], position: Any
) -> jax.Array:
  images = images.astype(jnp.float32)
  for axis, new in ((2, size[1]), (1, size[0])):
    length = jnp.asarray(images.shape[axis], jnp.int32)
    scale = length.astype(jnp.float32) / new
    at = position(jnp.arange(new, dtype=jnp.float32), scale)
    floor = jnp.floor(at)
    low = floor.astype(jnp.int32)
    ends = [
      jnp.take(images, jnp.clip(i, 0, length - 1), axis=axis, mode="clip")
      for i in (low, low + 1)
    ]
    shape = [1, 1, 1, 1]
    shape[axis] = new
    images = ends[0] + (ends[1] - ends[0]) * (at - floor).reshape(shape)
  return images
