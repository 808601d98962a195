"""Images as people have them, prepared in batches for a backbone."""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import itertools
import os
from typing import Any

import numpy as np
import PIL.Image

from vqt_jax import errors
from vqt_jax.data import decoding
from vqt_jax.data import preprocess as preprocess_lib
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import scaling

# From one image to the backbone's input, (height, width, 3) float32.
Prepare = Callable[[Any], np.ndarray]

BATCH = 32  # Images in a pass, at most.
THREADS = min(8, os.cpu_count() or 1)
_FILES = str | bytes | os.PathLike | PIL.Image.Image
_EXPECTED = (
  "images: expected paths, PIL images, or uint8 arrays (height, width) or"
  " (height, width, 3 or 4)"
)


def make_prepare(
  image_size: Any, value_range: str, resize: str = "", fit: str = ""
) -> Prepare:
  """Make the function that prepares one image as training did.

  Args:
    image_size: (height, width), pixels.
    value_range: as `scaling.find_scaling` takes it.
    resize: of a TFDS dataset, see `preprocess_lib.make_preprocess`.
    fit: of image files, see `decoding.fit`; else "".

  Raises:
    UserError: a name is unknown, or the size is impossible.
  """
  if fit and fit not in decoding.FITS:
    raise errors.unknown_name("fit", fit, decoding.FITS)
  scaling.find_scaling(value_range)
  image_size = preprocess_lib.checked_size(tuple(image_size))
  if not fit:
    preprocess = preprocess_lib.make_preprocess(image_size, value_range, resize)
    return lambda image: np.asarray(preprocess(decoding.decode(_file(image))))
  return lambda image: decoding.scale(
    decoding.read(_file(image), image_size, fit), value_range
  )


def _file(image: Any) -> Any:
  """Return an image as `decoding` takes it: an array as an image of Pillow."""
  if isinstance(image, _FILES) or not hasattr(image, "__array__"):
    return image
  return to_pillow(image)


def to_pillow(image: Any) -> PIL.Image.Image:
  """Return an array as an image of Pillow.

  Raises:
    UserError: it is not uint8 (height, width), or (height, width, 1, 3 or 4).
  """
  image = np.asarray(image)
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  if (
    not image.size
    or image.dtype != np.uint8
    or not (image.ndim == 2 or image.ndim == 3 and image.shape[-1] in (3, 4))
  ):
    raise errors.UserError(f"{_EXPECTED}, found {image.dtype} {image.shape}.")
  return PIL.Image.fromarray(image)


def batches(
  x: Any, prepare: Prepare, backbone: backbone_lib.Backbone
) -> Iterator[tuple[np.ndarray, int]]:
  """Prepare images in threads, ahead of what the backbone does.

  Args:
    x: one image or many, see `Model`.
    prepare: of one image; floats are prepared already.
    backbone: what they are for.

  Yields:
    (B, height, width, 3) float32, and how many of them are images; the rest are
    0. B is as in `prepared`.

  Raises:
    UserError: an image cannot be read, or does not fit.
  """
  if hasattr(x, "__array__") and np.asarray(x).dtype.kind == "f":
    images = np.asarray(backbone.checked(x), np.float32)
    size = batch_size(len(images))
    for start in range(0, len(images), size):
      some = images[start : start + size]
      yield pad(list(some), size), len(some)
    return
  for results, size in prepared(x, prepare):
    for result in results:
      if isinstance(result, errors.UserError):
        raise result
    yield pad(results, size), len(results)


def prepared(
  x: Any, prepare: Prepare
) -> Iterator[tuple[list[np.ndarray | errors.UserError], int]]:
  """Yield images, prepared, or why one cannot be, batch by batch.

  With each batch comes the size to which it is to be filled up: that of all of
  them, or if the number of images is unknown, for the last one its own.
  """

  def attempt(image):
    try:
      return prepare(image)
    except errors.UserError as e:
      return e

  x = split(x)
  size = batch_size(len(x)) if hasattr(x, "__len__") else None
  images = iter(x)
  with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
    start = lambda: [
      threads.submit(attempt, image)
      for image in itertools.islice(images, size or BATCH)
    ]
    now, ahead = start(), start()
    while now:
      results = [future.result() for future in now]
      yield results, size or batch_size(len(results))
      now, ahead = ahead, start()


def batch_size(count: int) -> int:
  """Size of the batches for some images, so that one program is compiled.

  Up to `BATCH` it is the next power of two, so that calls with other numbers
  of images often find a compiled program. More images are divided into batches
  of nearly the same size.
  """
  if count <= BATCH:
    return 1 << max(count - 1, 0).bit_length()
  batches = -(-count // BATCH)
  return 2 * -(-count // (2 * batches))


def pad(images: list[np.ndarray], size: int) -> np.ndarray:
  """Stack images, and fill up to a number of them with zeros."""
  fill = np.zeros((size - len(images), *images[0].shape), np.float32)
  return np.concatenate([np.stack(images), fill])


def split(x: Any) -> Iterable[Any]:
  """Split what was given into single images."""
  if isinstance(x, _FILES):
    return [x]
  if hasattr(x, "__array__"):
    x = np.asarray(x)
    return x if x.ndim == 4 or x.ndim and x.dtype.kind in "OU" else [x]
  if isinstance(x, Iterable):
    return x
  raise errors.UserError(f"{_EXPECTED}, found {type(x).__name__}.")
