"""Image files to arrays with Pillow, for images that are not in TFDS.

Whatever an image is (format, mode, orientation, size), it comes out as RGB with
8 bits, upright, and of the size that is asked for.
"""

from collections.abc import Sequence
import io
import os
import stat
import warnings

import numpy as np
import PIL.Image

from vqt_jax import errors
from vqt_jax.models import scaling

# Ways to make an image of any shape fit: stretch it; scale its short side and
# cut out the middle; scale its long side and fill up with grey.
FITS = ("squash", "crop", "pad")

# Files that decode to more are refused: a small one can fill the memory. It is
# Pillow's own limit, at which Pillow only warns.
MOST_PIXELS = 89_478_485

PAD_COLOUR = (128, 128, 128)

Source = str | os.PathLike | bytes | PIL.Image.Image

_ORIENTATION = 0x0112  # Tag of EXIF -> what sets an image upright.
_UPRIGHT = {
  2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
  3: PIL.Image.Transpose.ROTATE_180,
  4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
  5: PIL.Image.Transpose.TRANSPOSE,
  6: PIL.Image.Transpose.ROTATE_270,
  7: PIL.Image.Transpose.TRANSVERSE,
  8: PIL.Image.Transpose.ROTATE_90,
}

# `decode` refuses such images itself, with the name of the file.
warnings.filterwarnings(
  "ignore", category=PIL.Image.DecompressionBombWarning, module="PIL.Image"
)


class BadImage(errors.UserError):
  """An image that cannot be used; `reason` is the message without its name."""

  def __init__(self, name: str, reason: str):
    super().__init__(f"Cannot use image {name}: {reason}.")
    self.reason = reason


def decode(source: Source, enough: int | None = None) -> np.ndarray:
  """Decode an image: upright, RGB, 8 bits, its first frame.

  Alpha is laid over white, grey repeated; of 16 bits the upper 8 are taken.

  Args:
    source: a file, the contents of one, or an image of Pillow.
    enough: a JPEG whose sides stay at least this long may be decoded at 1/2,
      1/4 or 1/8 of its size, which is quicker; None: at its full size.

  Returns:
    uint8 (h, w, 3).

  Raises:
    BadImage: it is missing, no file (a folder, a pipe), empty, truncated, of an
      unknown kind, or of more than `MOST_PIXELS` pixels.
  """
  return np.asarray(_open(source, enough))


def fit(image: np.ndarray, size: Sequence[int], how: str) -> np.ndarray:
  """Make an image fit, with antialiasing where it gets smaller.

  Args:
    image: uint8 (h, w, 3).
    size: (height, width), pixels.
    how: one of `FITS`.

  Returns:
    uint8 (height, width, 3).
  """
  return np.asarray(_fit(PIL.Image.fromarray(image), size, how))


def read(source: Source, size: Sequence[int], how: str) -> np.ndarray:
  """Decode an image and make it fit, as training and prediction do.

  A JPEG of more than twice the size is decoded at a fraction of its own.

  Args:
    source: as of `decode`.
    size: (height, width), pixels.
    how: one of `FITS`.

  Returns:
    uint8 (height, width, 3).

  Raises:
    BadImage: see `decode`.
  """
  return np.asarray(_fit(_open(source, 2 * max(size)), size, how))


def scale(images: np.ndarray, value_range: str) -> np.ndarray:
  """Scale pixels to a backbone's range.

  Args:
    images: uint8 (..., w, 3).
    value_range: as `scaling.find_scaling` takes it.

  Returns:
    float32 (..., w, 3).
  """
  channels = scaling.find_scaling(value_range)
  # As rows of pixels: NumPy is slow at repeating as few as three numbers.
  width = images.shape[-2]
  mean, std = (np.tile(np.float32(x), width) for x in channels)
  rows = images.reshape(*images.shape[:-2], 3 * width).astype(np.float32)
  rows /= np.float32(255)
  rows -= mean
  rows /= std
  return rows.reshape(images.shape)


def find_fault(file: str | os.PathLike) -> str | None:
  """Return why an image file cannot be used, or None: all of it is decoded."""
  try:
    decode(file, enough=1)
  except BadImage as e:
    return e.reason
  return None


def _open(source: Source, enough: int | None) -> PIL.Image.Image:
  """Decode as `decode` does."""
  name = f"of {type(source).__name__}"
  try:
    if isinstance(source, PIL.Image.Image):
      return _to_rgb(source)
    if isinstance(source, (str, os.PathLike)):
      name = os.fspath(source)
      source = _read(source)
    if not source:
      raise ValueError("it is empty, 0 bytes")
    with PIL.Image.open(io.BytesIO(source)) as image:
      width, height = image.size
      if width * height > MOST_PIXELS:
        raise PIL.Image.DecompressionBombError
      if enough:
        image.draft(None, (enough, enough))
      return _to_rgb(image)
  except Exception as e:  # Each of Pillow's decoders has its own.
    raise BadImage(name, _reason(e)) from e


def _read(file: str | os.PathLike) -> bytes:
  """Read a file; a pipe would wait for ever, a device never end."""
  mode = os.stat(file).st_mode
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
    raise ValueError(f"it is {kind}, not a file")
  with open(file, "rb") as opened:
    return opened.read()


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """Convert an image to RGB, upright."""
  image.load()
  orientation = _orientation(image)
  if image.mode.startswith("I;16"):
    image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  elif image.mode in ("I", "F"):
    raise ValueError("its pixels have 32 bits; 8 and 16 are read")
  elif image.has_transparency_data:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    image = PIL.Image.alpha_composite(white, image)
  if image.mode != "RGB":
    image = image.convert("RGB")
  if orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
  return image


def _fit(
  image: PIL.Image.Image, size: Sequence[int], how: str
) -> PIL.Image.Image:
  """Make an RGB image fit as `fit` does."""
  if how not in FITS:
    raise errors.unknown_name("fit", how, FITS)
  height, width = size
  target, box = (width, height), (0, 0, *image.size)
  x_scale, y_scale = width / image.width, height / image.height
  if how == "crop":
    scale = max(x_scale, y_scale)
    # Rounded it may be below 0, which Pillow refuses.
    left = max(0.0, (image.width - width / scale) / 2)
    top = max(0.0, (image.height - height / scale) / 2)
    box = (left, top, image.width - left, image.height - top)
  elif how == "pad":
    scale = min(x_scale, y_scale)
    target = tuple(max(1, round(scale * side)) for side in image.size)
  # Copies where nothing changes.
  image = image.resize(target, PIL.Image.Resampling.BILINEAR, box)
  if target == (width, height):
    return image
  padded = PIL.Image.new("RGB", (width, height), PAD_COLOUR)
  padded.paste(image, ((width - target[0]) // 2, (height - target[1]) // 2))
  return padded


def _orientation(image: PIL.Image.Image) -> int | None:
  """Orientation in an image's EXIF data; None if these are damaged."""
  try:
    return image.getexif().get(_ORIENTATION)
  except Exception:  # They are free text, which anything may have written.
    return None


def _reason(error: Exception) -> str:
  """Say in a few words what is wrong with an image."""
  match error:
    case FileNotFoundError():
      return "there is no such file"
    case PIL.UnidentifiedImageError():
      return "it is not an image of a kind that Pillow reads"
    case (
      PIL.Image.DecompressionBombError() | PIL.Image.DecompressionBombWarning()
    ):
      return (
        f"it has more than {MOST_PIXELS:,} pixels, which is taken for a"
        " decompression bomb; make it smaller"
      )
    case OSError() if error.strerror:
      return error.strerror
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0].rstrip(".")
