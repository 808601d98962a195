"""Makes up photographs to try things with: five shapes before noisy skies.

  python scripts/make_photos.py photos
  python scripts/make_photos.py holdout 1

writes 300 JPEGs, photos/CLASS/NUMBER.jpg, of sizes such as cameras and crops
have; others with another seed. Four files are such as real folders hold: one is
grey, one a PNG with alpha, one turned by its EXIF data, and one is broken.
"""

import pathlib
import sys

import numpy as np
import PIL.Image
import PIL.ImageDraw

CLASSES = ("circle", "cross", "square", "stripes", "triangle")


def draw(shape: str, rng: np.random.Generator) -> PIL.Image.Image:
  """Draw a shape somewhere on a background of noise, in any two colours."""
  width, height = (int(side) for side in rng.integers(80, 240, 2))
  noise = rng.integers(0, 60, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
  noise += rng.integers(0, 120, 3, np.uint8)
  image = PIL.Image.fromarray(noise).resize((width, height))
  colour = tuple(int(x) for x in rng.integers(150, 256, 3))
  r = int(min(width, height) * rng.uniform(0.2, 0.4))
  x = int(rng.integers(r, width - r + 1))
  y = int(rng.integers(r, height - r + 1))
  pen, third = PIL.ImageDraw.Draw(image), r // 3
  match shape:
    case "circle":
      pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    case "cross":
      pen.rectangle((x - r, y - third, x + r, y + third), fill=colour)
      pen.rectangle((x - third, y - r, x + third, y + r), fill=colour)
    case "square":
      pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    case "stripes":
      for top in range(y - r, y + r, 2 * third):
        pen.rectangle((x - r, top, x + r, top + third), fill=colour)
    case "triangle":
      corners = [(x, y - r), (x - r, y + r), (x + r, y + r)]
      pen.polygon(corners, fill=colour)
  return image


def make(folder: pathlib.Path, per_class: int = 60, seed: int = 0) -> None:
  """Write the folder."""
  rng = np.random.default_rng(seed)
  for shape in CLASSES:
    (folder / shape).mkdir(parents=True)
    for number in range(per_class):
      draw(shape, rng).save(folder / shape / f"{number:03d}.jpg", quality=90)
  circle, cross, square, stripes, _ = (folder / shape for shape in CLASSES)
  grey = PIL.Image.open(circle / "000.jpg").convert("L")
  grey.save(circle / "000.jpg")
  (cross / "000.jpg").unlink()
  clear = draw("cross", rng).convert("RGBA")
  clear.putalpha(200)
  clear.save(cross / "000.png")
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be turned by 90 degrees.
  turned = draw("square", rng).transpose(PIL.Image.Transpose.ROTATE_90)
  turned.save(square / "000.jpg", exif=exif)
  content = (stripes / "000.jpg").read_bytes()
  (stripes / "000.jpg").write_bytes(content[: len(content) // 2])


if __name__ == "__main__":
  make(pathlib.Path(sys.argv[1]), seed=int((*sys.argv, 0)[2]))
