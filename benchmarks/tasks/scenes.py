"""A function per task: (generator, label) -> picture, uint8 (112, 112, 3).

What the label does not determine is drawn at random: colours, sizes, places,
other objects, light, noise.
"""

import numpy as np
from PIL import Image
from PIL import ImageDraw

from benchmarks.tasks import drawing
from benchmarks.tasks.drawing import SCALE
from benchmarks.tasks.drawing import SIZE

Generator = np.random.Generator


def _turn(rng: Generator) -> float:
  return rng.uniform(0, 2 * np.pi)


def _pick(rng: Generator, choices):
  return choices[rng.integers(len(choices))]


def _scribble(rng: Generator, image: Image.Image, count: int) -> None:
  """Draw thin lines and arcs across a picture."""
  draw = ImageDraw.Draw(image)
  for _ in range(count):
    colour = drawing.random_colour(rng)
    width = round(rng.uniform(0.7, 2) * SCALE)
    x, y, u, v = rng.uniform(-0.1, 1.1, 4) * SIZE * SCALE
    if rng.uniform() < 0.5:
      draw.line((x, y, u, v), colour, width)
    else:
      box = (min(x, u), min(y, v), max(x, u) + 1, max(y, v) + 1)
      draw.arc(box, rng.uniform(0, 360), rng.uniform(360, 720), colour, width)


def _object(rng, image, outline, place, paper) -> None:
  """Draw an outline at (x, y, radius), turned at random."""
  *centre, radius = place
  points = drawing.place(outline, centre, radius, _turn(rng))
  colour = drawing.contrasting(rng, paper)
  hollow = rng.uniform() < 0.25
  edge = colour if hollow else None
  drawing.fill(image, points, None if hollow else colour, edge, radius / 4)


def count(rng: Generator, label: int) -> np.ndarray:
  """Draw label + 1 objects of any form."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  radii = rng.uniform(5, 12, label + 1) * rng.uniform(0.8, 1.1)
  for place in drawing.scatter(rng, radii):
    _object(rng, image, _pick(rng, drawing.OUTLINES), place, paper)
  return drawing.finish(rng, image)


def place(rng: Generator, label: int) -> np.ndarray:
  """Draw a star in one of 16 columns, among objects of other forms."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  radius, margin = rng.uniform(12, 17), 16
  x = margin + (label + rng.uniform()) * (SIZE - 2 * margin) / 16
  star = (x, rng.uniform(margin, SIZE - margin), radius)
  radii = rng.uniform(4, 7, rng.integers(0, 4))
  others = (drawing.DISC, drawing.SQUARE, drawing.TRIANGLE, drawing.HEXAGON)
  for other in drawing.scatter(rng, radii, [star]):
    _object(rng, image, _pick(rng, others), other, paper)
  _object(rng, image, drawing.STAR, star, paper)
  return drawing.finish(rng, image)


def letters(rng: Generator, label: int) -> np.ndarray:
  """Draw a capital letter, in any font, among scribbles and small signs."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  _scribble(rng, image, rng.integers(1, 5))
  height = rng.uniform(36, 66)
  centre = rng.uniform(0.33, 0.67, 2) * SIZE
  for _ in range(rng.integers(1, 4)):
    drawing.write(
      image,
      _pick(rng, "0123456789+=%&?!"),
      _pick(rng, drawing.FONTS),
      rng.uniform(8, 15),
      rng.uniform(5, SIZE - 5, 2),
      rng.uniform(-60, 60),
      drawing.random_colour(rng),
    )
  drawing.write(
    image,
    chr(ord("A") + label),
    _pick(rng, drawing.FONTS),
    height,
    centre,
    rng.uniform(-20, 20),
    drawing.contrasting(rng, paper),
  )
  _scribble(rng, image, rng.integers(0, 2))
  return drawing.finish(rng, image)


_FACES = (
  "DejaVuSans",
  "DejaVuSans-Bold",
  "DejaVuSansMono",
  "DejaVuSerif-Bold",
  "DejaVuSerif-Italic",
  "STIXGeneral",
  "STIXGeneralBolIta",
  "cmtt10",
)


def fonts(rng: Generator, label: int) -> np.ndarray:
  """Write random lines of letters in one of 8 fonts."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  colour = drawing.contrasting(rng, paper)
  height, angle = rng.uniform(15, 25), rng.uniform(-15, 15)
  pitch = height * rng.uniform(1.7, 2.3)
  alphabet = "abcdefghijklmnopqrstuvwxyz" * 2 + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
  first = rng.uniform(0, pitch)
  for line in range(int(SIZE / pitch) + 2):
    text = "".join(_pick(rng, alphabet) for _ in range(rng.integers(4, 10)))
    y = first + (line - 0.5) * pitch
    x = rng.uniform(0.3, 0.7) * SIZE
    drawing.write(image, text, _FACES[label], height, (x, y), angle, colour)
  _scribble(rng, image, rng.integers(0, 3))
  return drawing.finish(rng, image)


_HEADED = (  # Outlines that point to the right.
  np.array(
    [(1, 0), (0, 0.8), (0, 0.3), (-1, 0.3), (-1, -0.3), (0, -0.3)] + [(0, -0.8)]
  ),
  np.array([(1, 0), (-0.8, 0.6), (-0.4, 0), (-0.8, -0.6)]),
  np.array([(1, 0), (-0.8, 0.5), (-0.8, -0.5)]),
  np.array(
    [(1, 0), (0.3, 0.75), (-0.5, 0.75), (0.2, 0), (-0.5, -0.75)]
    + [(0.3, -0.75)]
  ),
)


def angle(rng: Generator, label: int) -> np.ndarray:
  """Draw an arrow that points in one of 16 directions, among others."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  radius = rng.uniform(14, 24)
  centre = rng.uniform(radius + 2, SIZE - radius - 2, 2)
  others = (drawing.DISC, drawing.SQUARE, drawing.CROSS)
  radii = rng.uniform(4, 9, rng.integers(2, 7))
  for other in drawing.scatter(rng, radii, [(*centre, radius)]):
    _object(rng, image, _pick(rng, others), other, paper)
  outline = _pick(rng, _HEADED) * (1, rng.uniform(0.7, 1.2))
  heading = (label + rng.uniform(-0.4, 0.4)) * 2 * np.pi / 16
  points = drawing.place(outline, centre, radius, heading)
  drawing.fill(image, points, drawing.contrasting(rng, paper))
  return drawing.finish(rng, image)


def distance(rng: Generator, label: int) -> np.ndarray:
  """Draw two crosses in one of 5 distances, on scribbles."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  radius = rng.uniform(8, 12)
  apart = 26 + (label + rng.uniform(0.1, 0.9)) * 12
  while True:
    one = rng.uniform(radius + 1, SIZE - radius - 1, 2)
    turn = _turn(rng)
    two = one + apart * np.array([np.cos(turn), np.sin(turn)])
    if radius < two.min() and two.max() < SIZE - radius:
      break
  _scribble(rng, image, rng.integers(0, 4))
  crosses = [(*one, radius), (*two, radius * rng.uniform(0.8, 1.2))]
  colour = drawing.contrasting(rng, paper)
  for cross in crosses:
    points = drawing.place(drawing.CROSS, cross[:2], cross[2], _turn(rng))
    drawing.fill(image, points, colour)
  return drawing.finish(rng, image)


def _curves(number: int) -> np.ndarray:
  """Closed curves that differ a little, (number, 120, 2), always the same."""
  rng = np.random.default_rng(20)
  turn = np.arange(120) * 2 * np.pi / 120
  found = []
  shared = rng.standard_normal((4, 2))
  for _ in range(number):
    waves = 0.6 * shared + rng.standard_normal((4, 2))
    waves = waves / np.linalg.norm(waves) * 0.42
    radius = 1 + sum(
      a * np.cos(k * turn) + b * np.sin(k * turn)
      for k, (a, b) in enumerate(waves, start=2)
    )
    found.append(np.stack([np.cos(turn), np.sin(turn)], -1) * radius[:, None])
  return np.array(found) / 1.3


_CURVES = _curves(16)


def shapes(rng: Generator, label: int) -> np.ndarray:
  """Draw one of 16 rounded forms, turned, stretched, filled or outlined."""
  image = drawing.background(rng)
  paper = drawing.mean_colour(image)
  _scribble(rng, image, rng.integers(1, 6))
  stretch = np.array([1, rng.uniform(0.75, 1)])
  turn = _turn(rng)
  outline = drawing.place(_CURVES[label], (0, 0), 1, -turn)
  radius = rng.uniform(20, 40)
  centre = rng.uniform(radius * 0.9, SIZE - radius * 0.9, 2)
  turn += rng.uniform(-0.5, 0.5)
  points = drawing.place(outline * stretch, centre, radius, turn)
  colour = drawing.contrasting(rng, paper)
  kind = rng.uniform()
  edge = drawing.contrasting(rng, paper) if kind > 0.5 else None
  drawing.fill(image, points, colour if kind < 0.75 else None, edge, 2.5)
  _scribble(rng, image, rng.integers(0, 4))
  return drawing.finish(rng, image)


def _blobs(rng: Generator) -> np.ndarray:
  """Values of overlapping bumps, float (SIZE, SIZE)."""
  return drawing.smooth_noise(rng, rng.integers(5, 10))[..., 0]


def mirror(rng: Generator, label: int) -> np.ndarray:
  """Draw patches that mirror left-right, top-bottom, by half a turn, or not."""
  field, coarse = _blobs(rng), _blobs(rng)
  flips = (None, np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1])

  def symmetric(values: np.ndarray) -> np.ndarray:
    if label == 0:
      return values
    return (values + values[flips[label]]) / np.sqrt(2)

  field, coarse = symmetric(field), symmetric(coarse)
  inks = [np.array(drawing.random_colour(rng), np.float32)]
  for _ in range(2):
    inks.append(np.array(drawing.contrasting(rng, *inks), np.float32))
  pixels = np.where((field > 0.3)[..., None], inks[1], inks[0])
  pixels = np.where((coarse > 0.7)[..., None], inks[2], pixels)
  pixels += rng.uniform(4, 20) * drawing.smooth_noise(rng, 3, 3)
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  return drawing.finish(rng, image.resize((SIZE * SCALE,) * 2))


def depth(rng: Generator, label: int) -> np.ndarray:
  """Draw balls on a plane in perspective; the nearest is in one of 8 depths.

  A ball of radius r at depth z, on a plane h below the eye, appears with radius
  f r / z and touches the plane f h / z below the horizon.
  """
  horizon = rng.uniform(0.2, 0.4) * SIZE
  f, h = rng.uniform(90, 110), rng.uniform(0.9, 1.1)
  edges = 1.25 * 1.22 ** np.arange(9)
  nearest = rng.uniform(edges[label], edges[label + 1])
  image = _plane(rng, horizon, f * h)
  z = [nearest, *nearest * rng.uniform(1.1, 3.5, rng.integers(1, 5))]
  light = rng.uniform(-0.6, 0.6)
  for depth_of_ball in sorted(z, reverse=True):
    radius = f * rng.uniform(0.1, 0.28) / depth_of_ball
    x = rng.uniform(0.1, 0.9) * SIZE
    y = horizon + f * h / depth_of_ball - radius
    _ball(rng, image, (x, y), radius, light)
  return drawing.finish(rng, image)


def _plane(rng: Generator, horizon: float, fh: float) -> Image.Image:
  """Draw a sky, and a plane with tiles that shrink towards the horizon."""
  sky = np.array(drawing.random_colour(rng), np.float32)
  tiles = [np.array(drawing.random_colour(rng), np.float32) for _ in range(2)]
  tiles[1] = tiles[0] + (tiles[1] - tiles[0]) * rng.uniform(0.1, 0.4)
  y, x = np.mgrid[: SIZE * SCALE, : SIZE * SCALE] / SCALE
  z = fh / np.maximum(y - horizon, 0.3)
  turn = _turn(rng)
  side = (x - SIZE / 2) * z / 100
  u, v = (
    side * np.cos(turn) + z * np.sin(turn),
    z * np.cos(turn) - side * np.sin(turn),
  )
  width = rng.uniform(0.3, 0.7)
  odd = (np.floor(u / width) + np.floor(v / width)) % 2
  haze = np.clip(z / 12, 0, 1)[..., None]
  ground = np.where(odd[..., None] > 0, tiles[1], tiles[0])
  ground = ground * (1 - haze) + tiles[0] * haze
  pixels = np.where((y > horizon)[..., None], ground, sky)
  noise = drawing.smooth_noise(rng, 4, 3)
  noise = np.repeat(np.repeat(noise, SCALE, 0), SCALE, 1)
  pixels = pixels + rng.uniform(3, 12) * noise
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _ball(rng, image, centre, radius, light) -> None:
  """Draw a shaded ball and its shadow onto a picture."""
  colour = np.array(drawing.random_colour(rng), np.float32)
  shadow = drawing.place(
    drawing.DISC * (1.1, 0.3),
    (centre[0] - light * radius, centre[1] + radius * 0.9),
    radius,
    0,
  )
  mask = Image.new("L", image.size)
  drawing.fill(mask, shadow, 110)
  image.paste((0, 0, 0), (0, 0), mask)
  drawing.fill(
    image,
    drawing.place(drawing.DISC, centre, radius, 0),
    tuple(int(c) for c in colour * 0.55),
  )
  for step in range(1, 6):
    inner = radius * (1 - step / 6)
    middle = np.add(centre, (light * (radius - inner), inner - radius))
    middle = np.add(centre, 0.6 * (middle - np.array(centre)))
    shade = np.clip(colour * (0.55 + 0.1 * step), 0, 255)
    drawing.fill(
      image,
      drawing.place(drawing.DISC, middle, inner, 0),
      tuple(int(c) for c in shade),
    )


def _coordinates(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
  """Coordinates of pixels, turned and moved at random and bent a little."""
  y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64) + rng.uniform(0, 99)
  turn, bend = _turn(rng), rng.uniform(0, 2.5)
  x = x + bend * drawing.smooth_noise(rng, 4)[..., 0]
  y = y + bend * drawing.smooth_noise(rng, 4)[..., 0]
  return (
    x * np.cos(turn) + y * np.sin(turn),
    y * np.cos(turn) - x * np.sin(turn),
  )


def _wave(x: np.ndarray, period: float) -> np.ndarray:
  return np.sin(2 * np.pi * x / period)


def _nearest(rng: Generator, cell: float) -> np.ndarray:
  """Distances of pixels to the nearest two of random points, (2, ...)."""
  points = rng.uniform(-cell, SIZE + cell, (int((SIZE / cell + 2) ** 2), 2))
  y, x = np.mgrid[:SIZE, :SIZE]
  apart = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
  return np.moveaxis(np.partition(apart, 1, axis=-1)[..., :2], -1, 0)


def _texture(rng: Generator, label: int) -> np.ndarray:
  """Values of one of 16 textures, of any offset and range, (SIZE, SIZE)."""
  period = rng.uniform(8, 18)
  x, y = _coordinates(rng)
  noise = lambda cells: drawing.smooth_noise(rng, cells)[..., 0]
  bumps = int(SIZE / period * 1.5)
  near = lambda: _nearest(rng, period)
  shift = period / 2 * (np.floor(y / (period / 2)) % 2)
  return (
    lambda: _wave(x, period),
    lambda: np.sign(_wave(x, period)),
    lambda: _wave(x, period) + _wave(y, period),
    lambda: np.sign(_wave(x, period) * _wave(y, period)),
    lambda: np.maximum(_wave(x, period), _wave(y, period)),
    lambda: 1.0 * ((_wave(x, period) + _wave(y, period)) > 0.8),
    lambda: noise(bumps),
    lambda: np.sign(noise(bumps)),
    lambda: np.abs(noise(bumps)),
    lambda: sum(noise(3 * 2**k) / 2**k for k in range(5)),
    lambda: -near()[0],
    lambda: np.subtract(*near()),
    lambda: np.sign(period / 9 + np.subtract(*near())),
    lambda: np.sign(period / 3 - near()[0]),
    lambda: _wave(x + 4 * noise(5), period),
    lambda: np.minimum(
      np.abs((y / (period / 2)) % 1 - 0.5) < 0.36,
      np.abs(((x + shift) / period) % 1 - 0.5) < 0.43,
    ).astype(float),
  )[label]()


def textures(rng: Generator, label: int) -> np.ndarray:
  """Draw a texture in two colours, under stains and noise."""
  values = _texture(rng, label)
  values = (values - values.min()) / np.ptp(values)
  if rng.uniform() < 0.5:
    values = 1 - values
  inks = [np.array(drawing.random_colour(rng), np.float32)]
  inks.append(np.array(drawing.contrasting(rng, inks[0]), np.float32))
  strength = rng.uniform(0.35, 0.9)
  pixels = inks[0] + strength * values[..., None] * (inks[1] - inks[0])
  pixels += rng.uniform(4, 22) * drawing.smooth_noise(rng, 3, 3)
  pixels += rng.uniform(0, 14) * drawing.smooth_noise(rng, 25)
  image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
  return drawing.finish(rng, image.resize((SIZE * SCALE,) * 2))
