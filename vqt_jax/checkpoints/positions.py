"""Learned position embeddings: their grid, and its resizing."""

from collections.abc import Sequence
import math
import numbers

import numpy as np

from vqt_jax.errors import UserError

Pair = tuple[int, int]

# Attention between so many takes hundreds of gigabytes.
_MOST_PATCHES = 2**17

# The same as `trained_size` on the command line.
_FLAGS = "--config.trained_size=HEIGHT --config.trained_width=WIDTH"


def check_image_size(
  patch_size: int | Sequence[int], image_size: int | Sequence[int]
) -> None:
  """Raise a `UserError` if the image size is not a multiple of the patch.

  Big Vision's models and `load_backbone` accept such sizes (they ignore pixels
  right of and below the last whole patch); in training it is a mistake.

  Args:
    patch_size: side, or (height, width), of a patch, pixels.
    image_size: side, or (height, width), of the images, pixels.

  Raises:
    UserError: with the nearest sizes that fit.
  """
  patch, image = as_pair(patch_size, "patch_size"), as_pair(image_size)
  if all(size % p == 0 for size, p in zip(image, patch)):
    return
  below = [max(size // p, 1) * p for size, p in zip(image, patch)]
  above = [-(-size // p) * p for size, p in zip(image, patch)]
  sizes = " or ".join(dict.fromkeys(_as_text(s) for s in (below, above)))
  raise UserError(
    f"image_size {_as_text(image)} is not a multiple of the backbone's"
    f" {_as_text(patch)} patch; the nearest sizes that fit are {sizes} pixels."
  )


def as_pair(size: int | Sequence[int], name: str = "image_size") -> Pair:
  """Convert a side, or (height, width), to (height, width).

  Raises:
    UserError: it is neither, or not positive.
  """
  try:
    pair = (size, size) if isinstance(size, numbers.Integral) else tuple(size)
    whole = all(int(s) == s and s is not True for s in pair)
    if len(pair) == 2 and whole and min(pair) > 0:
      return int(pair[0]), int(pair[1])
  except (TypeError, ValueError):
    pass
  raise UserError(
    f"{name} must be a positive number of pixels or a pair"
    f" (height, width), not {size!r}."
  )


def size_from_fields(height: int, width: int) -> Pair | None:
  """Combine two fields of a config, which are 0 if not given.

  Returns:
    (height, width), the latter by default the height; None without a height.
  """
  return (height, width or height) if height else None


def to_grid(image_size: Pair, patch_size: Pair) -> Pair:
  """Patches per column and per row; leftover pixels are ignored."""
  grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
  if not all(grid):
    raise UserError(
      f"image_size {_as_text(image_size)} is smaller than one"
      f" {_as_text(patch_size)} patch of this backbone; ask for larger images."
    )
  if math.prod(grid) > _MOST_PATCHES:
    raise UserError(
      f"image_size {_as_text(image_size)} has more than {_MOST_PATCHES:,}"
      f" {_as_text(patch_size)} patches; ask for smaller images."
    )
  return grid


def has_class_row(
  rows: int, stored_name: str, has_cls: bool, told: Pair | None
) -> bool:
  """Return whether the first position is that of the class token.

  Big Vision tests only whether `rows` is a square plus one, and so takes the
  first patch of a 2x5 grid for a class token. Here the table's place and the
  user come first: a table at the top never has such a row, vision_transformer's
  always has one if there is a class token.

  Args:
    rows: number of positions in the file.
    stored_name: the table's name in the file.
    has_cls: whether there is a class token.
    told: grid of the image size that was given, or None.
  """
  if rows == 1 or "Transformer/" not in stored_name:
    return False
  if "posembed_input/" in stored_name and has_cls:
    return True
  if told and math.prod(told) in (rows, rows - 1):
    return math.prod(told) == rows - 1
  return math.isqrt(rows - 1) ** 2 == rows - 1


def find_grid(
  rows: int, patch_size: Pair, wanted: Pair | None, trained: Pair | None
) -> Pair:
  """Find the grid on which positions lie.

  If `rows` is a square, so is the grid, as in Big Vision; otherwise images are
  taken to be square, whatever their patches are.

  Args:
    rows: number of positions, without that of the class token.
    patch_size: pixels.
    wanted: grid of the images that the backbone is to run on, or None.
    trained: grid of the images that it was trained on, or None if not known.

  Returns:
    Patches per column and per row.

  Raises:
    UserError: the numbers contradict each other, or do not suffice.
  """
  side = math.isqrt(rows)
  if trained:
    if math.prod(trained) == rows:
      return trained
    raise UserError(
      f"The checkpoint has {rows} positions, but images of the given"
      f" trained_size have {_as_text(trained)} patches."
      f"{_list_possible_sizes(rows, patch_size)}"
    )
  if side**2 == rows:
    if wanted and wanted != (side, side) and math.prod(wanted) == rows:
      raise UserError(
        f"The checkpoint's {rows} positions fit a {side}x{side} and a"
        f" {_as_text(wanted)} grid of patches; say which one it was trained on:"
        f" trained_size={_pixels_as_text((side, side), patch_size)} or"
        f" trained_size={_pixels_as_text(wanted, patch_size)} (height, width),"
        f" or {_FLAGS}."
      )
    return side, side
  if wanted and math.prod(wanted) == rows:
    return wanted
  pixels = math.isqrt(rows * math.prod(patch_size))
  grid = pixels // patch_size[0], pixels // patch_size[1]
  if math.prod(grid) == rows and not any(pixels % p for p in patch_size):
    return grid
  raise UserError(
    f"The checkpoint's {rows} positions do not form a square; give the image"
    f" size it was trained on: trained_size=(height, width), or {_FLAGS}."
    f"{_list_possible_sizes(rows, patch_size)}"
  )


def _list_possible_sizes(rows: int, patch_size: Pair) -> str:
  """List the image sizes with so many patches in a sentence, squarest first."""
  most = min(math.isqrt(rows), 10**5)
  grids = [(n, rows // n) for n in range(1, most + 1) if rows % n == 0]
  grids = [each for n, m in grids for each in dict.fromkeys([(n, m), (m, n)])]
  grids.sort()
  stretch = lambda grid: abs(
    math.log(grid[0] * patch_size[0]) - math.log(grid[1] * patch_size[1])
  )
  sizes = [
    _pixels_as_text(grid, patch_size) for grid in sorted(grids, key=stretch)
  ]
  more = ", ..." if len(sizes) > 6 else ""
  return (
    f" With {_as_text(patch_size)} pixels a patch it is one of"
    f" {', '.join(sizes[:6])}{more} (height, width)."
  )


def resize_positions(table: np.ndarray, old: Pair, new: Pair) -> np.ndarray:
  """Resize a position embedding as both original programs do.

  Linear, corners aligned, no anti-aliasing. For a few sizes (32 -> 16 among
  them) SciPy's boundary rule zeroes the last row and column, there as here.

  Args:
    table: (1, old[0] * old[1], D) float32, row-major, no class row.
    old: patches per column and per row.
    new: the same, of the result.

  Returns:
    (1, new[0] * new[1], D) float32.
  """
  if old == new:
    return table
  import scipy.ndimage  # Here, as it takes a while.

  grid = table.reshape(*old, -1)
  zoom = (new[0] / old[0], new[1] / old[1], 1)
  return scipy.ndimage.zoom(grid, zoom, order=1).reshape(1, -1, grid.shape[-1])


def resize_bicubic(
  table: np.ndarray, old: Pair, new: Pair, *, antialias: bool
) -> np.ndarray:
  """Resize a position embedding as PyTorch's bicubic `interpolate` does.

  Edges are repeated, corners not aligned. With antialiasing, as timm and
  OpenCLIP have it, the kernel is Keys's with -0.5 in place of -0.75, and
  stretched if the grid gets smaller.

  Args:
    table: (1, old[0] * old[1], D) float32, row-major, patches only.
    old: patches per column and per row.
    new: the same, of the result.
    antialias: whether to.

  Returns:
    (1, new[0] * new[1], D) float32.
  """
  if old == new:
    return table
  rows, columns = (_cubic_weights(*n, antialias) for n in zip(old, new))
  grid = table[0].reshape(*old, -1).astype(np.float64)
  grid = np.einsum("hy,wx,yxd->hwd", rows, columns, grid, optimize=True)
  return grid.reshape(1, -1, grid.shape[-1]).astype(np.float32)


def _cubic_weights(old: int, new: int, antialias: bool) -> np.ndarray:
  """Weights (new, old) of `resize_bicubic` along one axis."""
  a = -0.5 if antialias else -0.75
  stretch = max(old / new, 1.0) if antialias else 1.0
  centres = (np.arange(new) + 0.5) * old / new - 0.5
  margin = math.ceil(2 * stretch) + 1
  places = np.arange(-margin, old + margin)
  x = np.abs(places - centres[:, None]) / stretch
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
  if antialias:  # What lies outside does not count.
    weights *= (0 <= places) & (places < old)
    weights /= weights.sum(axis=1, keepdims=True)
  folded = np.zeros((new, old))
  np.add.at(folded.T, np.clip(places, 0, old - 1), weights.T)
  return folded


def _as_text(pair: Sequence[int]) -> str:
  return "x".join(map(str, pair))


def _pixels_as_text(grid: Pair, patch_size: Pair) -> str:
  return f"({grid[0] * patch_size[0]}, {grid[1] * patch_size[1]})"
