"""Parts of pictures: backgrounds, colours, outlines, text, and how all end.

Pictures are drawn at `SCALE` times their size, without anti-aliasing, and
reduced. All randomness is that of the NumPy generator that is passed; lengths
are in pixels of the final picture.
"""

from collections.abc import Sequence
import colorsys
import functools
import pathlib

import matplotlib
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont

SIZE = 112
SCALE = 3
Colour = tuple[int, int, int]

# Families of the fonts that matplotlib ships, with letters A to Z and a to z.
FONTS = (
  "DejaVuSans",
  "DejaVuSans-Bold",
  "DejaVuSans-Oblique",
  "DejaVuSansMono",
  "DejaVuSansMono-Bold",
  "DejaVuSerif",
  "DejaVuSerif-Bold",
  "DejaVuSerif-Italic",
  "STIXGeneral",
  "STIXGeneralBol",
  "STIXGeneralItalic",
  "STIXGeneralBolIta",
  "cmb10",
  "cmr10",
  "cmss10",
  "cmtt10",
)


def random_colour(rng: np.random.Generator) -> Colour:
  """Draw a colour of any hue, from pale to saturated and dark to bright."""
  rgb = colorsys.hsv_to_rgb(
    rng.uniform(), rng.uniform(0.1, 1), rng.uniform(0.15, 1)
  )
  return tuple(round(255 * x) for x in rgb)


def contrasting(
  rng: np.random.Generator, *others: Sequence[float], least: float = 110
) -> Colour:
  """Draw a colour that is `least` apart from others (Euclidean, 0..255)."""
  while True:
    colour = random_colour(rng)
    apart = [np.linalg.norm(np.subtract(colour, other)) for other in others]
    if min(apart, default=least) >= least:
      return colour
    least -= 1  # Several others may leave no room.


def smooth_noise(
  rng: np.random.Generator, cells: int, channels: int = 1
) -> np.ndarray:
  """Noise with about `cells` bumps a side, float32 (SIZE, SIZE, channels)."""
  grid = rng.standard_normal((channels, cells + 3, cells + 3))
  planes = [
    Image.fromarray(plane.astype(np.float32)).resize(
      (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    for plane in grid
  ]
  return np.stack(planes, -1)


def background(rng: np.random.Generator) -> Image.Image:
  """Draw a plain colour with stains and shades, at SCALE times SIZE."""
  base = np.array(random_colour(rng), np.float32)
  pixels = base + rng.uniform(4, 22) * smooth_noise(rng, rng.integers(1, 5), 3)
  pixels += rng.uniform(0, 14) * smooth_noise(rng, rng.integers(6, 20))
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  return image.resize((SIZE * SCALE,) * 2, Image.Resampling.BICUBIC)


def mean_colour(image: Image.Image) -> np.ndarray:
  return np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]


def finish(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
  """Reduce, perhaps blur, relight and add noise; uint8 (SIZE, SIZE, 3)."""
  image = image.reduce(SCALE)
  if rng.uniform() < 0.3:
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
  pixels = np.asarray(image, np.float32)
  pixels = (pixels - 128) * rng.uniform(0.6, 1.1) + 128 + rng.uniform(-20, 20)
  pixels += rng.uniform(0, 9) * rng.standard_normal(pixels.shape)
  return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def place(
  outline: np.ndarray, centre: Sequence[float], radius: float, angle: float
) -> np.ndarray:
  """Rotate, scale and move an outline (n, 2); angle in radians."""
  c, s = np.cos(angle), np.sin(angle)
  return outline @ np.array([[c, s], [-s, c]]) * radius + np.asarray(centre)


def fill(
  image: Image.Image,
  points: np.ndarray,
  colour: Colour | None,
  edge: Colour | None = None,
  width: float = 1.5,
) -> None:
  """Draw a polygon (n, 2) onto a picture, filled, outlined, or both."""
  draw = ImageDraw.Draw(image)
  corners = [tuple(point) for point in points * SCALE]
  if colour is not None:
    draw.polygon(corners, fill=colour)
  if edge is not None:
    closed = [*corners, corners[0], corners[1]]
    draw.line(closed, fill=edge, width=round(width * SCALE), joint="curve")


def spokes(radii: Sequence[float]) -> np.ndarray:
  """Outline with corners at these radii, evenly around, the first upwards."""
  turn = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
  return np.stack([np.cos(turn), np.sin(turn)], -1) * np.array(radii)[:, None]


DISC = spokes([1] * 40)
STAR = spokes([1, 0.42] * 5)
SQUARE = spokes([1] * 4)
TRIANGLE = spokes([1] * 3)
HEXAGON = spokes([1] * 6)
CROSS = np.array(
  [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
  + [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
) / np.sqrt(10)
OUTLINES = (DISC, SQUARE, TRIANGLE, HEXAGON, STAR, CROSS)


def scatter(
  rng: np.random.Generator,
  radii: Sequence[float],
  taken: Sequence[tuple[float, float, float]] = (),
  gap: float = 2,
) -> list[tuple[float, float, float]]:
  """Place discs where they do not touch each other, nor those of `taken`.

  Args:
    rng: of the places.
    radii: of the discs.
    taken: (x, y, radius) of others.
    gap: between any two.

  Returns:
    (x, y, radius) of each; a disc for which there is no room is made smaller.
  """
  placed = []
  for radius in radii:
    while True:
      x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
      others = [*taken, *placed]
      if all(np.hypot(x - u, y - v) >= radius + r + gap for u, v, r in others):
        placed.append((x, y, radius))
        break
      radius *= 0.99
  return placed


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  # The other layout engine is not on every machine.
  basic = ImageFont.Layout.BASIC
  return ImageFont.truetype(folder / f"{name}.ttf", size, layout_engine=basic)


def write(
  image: Image.Image,
  text: str,
  font: str,
  height: float,
  centre: Sequence[float],
  angle: float,
  colour: Colour,
) -> None:
  """Write text onto a picture; its capitals are about `height` high.

  Args:
    image: is drawn onto.
    text: one line.
    font: of `FONTS`.
    height: of capitals.
    centre: of the text's bounding box.
    angle: in degrees, against the clock.
    colour: of the text.
  """
  size = 100
  _, top, _, bottom = _font(font, size).getbbox("H")
  size = round(size * height * SCALE / (bottom - top))
  box = _font(font, size).getbbox(text)
  mask = Image.new("L", (box[2] - box[0] + 4, box[3] - box[1] + 4))
  ImageDraw.Draw(mask).text(
    (2 - box[0], 2 - box[1]), text, 255, _font(font, size)
  )
  mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
  x, y = (round(c * SCALE - s / 2) for c, s in zip(centre, mask.size))
  image.paste(colour, (x, y), mask)
