"""Images of every kind become upright RGB of the wanted size, or a reason."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest

from vqt_jax import errors
from vqt_jax.data import decoding

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image, kind, **options) -> bytes:
  if isinstance(image, np.ndarray):
    image = PIL.Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def halves(left, right, mode="RGB", size=(8, 4)) -> PIL.Image.Image:
  """A picture with a left and a right half of one colour each."""
  image = PIL.Image.new(mode, size, left)
  image.paste(right, (size[0] // 2, 0, *size))
  return image


def colours(pixels) -> list[tuple[int, ...]]:
  """Colours of a picture's corners: top left and right, bottom left."""
  return [tuple(map(int, pixels[y, x])) for y, x in ((0, 0), (0, -1), (-1, 0))]


def close(found, expected, tolerance=12):
  return np.abs(np.array(found) - np.array(expected)).max() <= tolerance


@pytest.mark.parametrize(
  "kind, mode, left, right, expected",
  [
    ("JPEG", "RGB", RED, BLUE, (RED, BLUE)),
    ("JPEG", "L", 40, 200, ((40,) * 3, (200,) * 3)),
    ("JPEG", "CMYK", (0, 255, 255, 0), (255, 255, 0, 0), (RED, BLUE)),
    ("PNG", "RGBA", (*RED, 255), (*BLUE, 0), (RED, WHITE)),
    ("PNG", "LA", (40, 255), (40, 0), ((40,) * 3, WHITE)),
    ("PNG", "1", 0, 1, ((0,) * 3, WHITE)),
    ("PNG", "I;16", 0x28FF, 0xC800, ((40,) * 3, (200,) * 3)),
    ("WEBP", "RGBA", (*RED, 255), (*BLUE, 0), (RED, WHITE)),
    ("BMP", "RGB", RED, BLUE, (RED, BLUE)),
    ("AVIF", "RGB", RED, BLUE, (RED, BLUE)),
    ("TIFF", "CMYK", (0, 255, 255, 0), (255, 255, 0, 0), (RED, BLUE)),
    ("TIFF", "I;16", 0x28FF, 0xC800, ((40,) * 3, (200,) * 3)),
  ],
)
def test_every_kind_of_image_becomes_rgb(kind, mode, left, right, expected):
  image = halves(left, right, mode, (32, 16))
  if mode == "I;16":  # Pillow does not paint in it.
    image = np.repeat(np.uint16([[left] * 16 + [right] * 16]), 16, 0)
  pixels = decoding.decode(encode(image, kind))
  assert (pixels.shape, pixels.dtype) == ((16, 32, 3), np.uint8)
  assert close(colours(pixels)[:2], expected)


def test_transparent_colours_of_a_palette_are_white():
  image = halves(0, 1, "P")
  image.putpalette([*RED, *BLUE])
  pixels = decoding.decode(encode(image, "PNG", transparency=1))
  assert colours(pixels)[:2] == [RED, WHITE]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_the_first_frame_is_taken(kind):
  frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
  content = encode(
    frames[0], kind, save_all=True, append_images=frames[1:], duration=100
  )
  assert close(colours(decoding.decode(content)), [RED] * 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_sets_an_image_upright(orientation, kind):
  upright = np.zeros((4, 8, 3), np.uint8)
  upright[0, 0], upright[0, -1], upright[-1, 0] = RED, BLUE, WHITE
  # What a camera stores, so that the tag's instructions undo it.
  stored = [
    lambda x: x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1, ::-1],
    lambda x: x[::-1],
    lambda x: np.swapaxes(x, 0, 1),
    lambda x: np.rot90(x, 1),
    lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
    lambda x: np.rot90(x, -1),
  ][orientation - 1](upright)
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  content = encode(np.ascontiguousarray(stored), kind, exif=exif)
  np.testing.assert_array_equal(decoding.decode(content), upright)


def test_damaged_exif_data_are_left_alone():
  content = encode(halves(RED, BLUE), "JPEG", exif=b"Exif\0\0nonsense")
  assert decoding.decode(content).shape == (4, 8, 3)


def test_a_file_its_content_and_an_image_are_the_same(tmp_path):
  content = encode(halves(RED, BLUE), "PNG")
  (tmp_path / "grün 1.png").write_bytes(content)
  expected = np.asarray(halves(RED, BLUE))
  for source in (
    tmp_path / "grün 1.png",
    str(tmp_path / "grün 1.png"),
    content,
    halves(RED, BLUE),
  ):
    np.testing.assert_array_equal(decoding.decode(source), expected)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
  content = encode(halves(RED, BLUE, size=(800, 400)), "JPEG")
  assert decoding.decode(content).shape == (400, 800, 3)
  assert decoding.decode(content, enough=100).shape == (100, 200, 3)
  assert decoding.decode(content, enough=101).shape == (200, 400, 3)
  assert decoding.read(content, (20, 30), "squash").shape == (20, 30, 3)


@pytest.mark.parametrize(
  "how, expected",
  [
    ("squash", [RED] * 4 + [BLUE] * 4),
    ("crop", [RED] * 4 + [BLUE] * 4),
    ("pad", [RED] * 4 + [BLUE] * 4),
  ],
)
@pytest.mark.parametrize("scale", [1, 2, 5])
def test_fit_keeps_what_it_says(how, expected, scale):
  """Of a wide picture: all of it, its middle, or all of it between bands."""
  # A wide picture: green edges, of which a crop leaves nothing.
  wide = np.full((8 * scale, 16 * scale, 3), (0, 255, 0), np.uint8)
  wide[:, 4 * scale : 8 * scale] = RED
  wide[:, 8 * scale : 12 * scale] = BLUE
  found = decoding.fit(wide, (8, 8), how)
  assert found.shape == (8, 8, 3)
  green = (found == (0, 255, 0)).all(-1)
  grey = (found == decoding.PAD_COLOUR).all(-1)
  if how == "crop":
    assert not green[:, 1:-1].any() and close(found[4, 1], RED)
    assert close(found[4, -2], BLUE)
  elif how == "pad":
    assert grey[:2].all() and grey[-2:].all() and not grey[2:-2].any()
    assert green[2:-2, 0].all() and close(found[4, 3], RED, 70)
  else:
    assert green[:, 0].all() and not grey.any() and green[:, -1].all()
  tall = decoding.fit(np.swapaxes(wide, 0, 1), (8, 8), how)
  np.testing.assert_array_equal(np.swapaxes(tall, 0, 1), found)


def test_fit_is_antialiased():
  """A fine chessboard becomes grey, and keeps its mean."""
  fine = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
  small = decoding.fit(np.repeat(fine[..., None], 3, -1), (8, 8), "squash")
  assert np.abs(small.astype(int) - 127).max() <= 2


def test_an_image_that_fits_is_left_alone():
  image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  for how in decoding.FITS:
    np.testing.assert_array_equal(decoding.fit(image, (6, 4), how), image)
  with pytest.raises(errors.UserError, match="Unknown fit 'stretch'"):
    decoding.fit(image, (6, 4), "stretch")


def test_scale_is_that_of_the_backbone():
  pixels = np.array([[0, 127, 255]], np.uint8)
  np.testing.assert_allclose(
    decoding.scale(pixels, "-1..1"), [[-1, 127 / 127.5 - 1, 1]], atol=1e-6
  )
  assert decoding.scale(pixels, "imagenet").dtype == np.float32


def test_what_cannot_be_used_is_told_with_its_name(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
  good, png = encode(noise, "JPEG"), encode(noise, "PNG")
  deep = PIL.Image.fromarray(np.zeros((4, 4), np.float32))
  contents = {
    "empty.jpg": (b"", "it is empty"),
    "short.jpg": (good[: len(good) // 2], "truncated"),
    "end.jpg": (good[: -len(good) // 50], "truncated"),
    "short.png": (png[: len(png) // 2], "truncated"),
    "text.jpg": (b"no image\n", "not an image of a kind"),
    "deep.tif": (encode(deep, "TIFF"), "32 bits"),
  }
  for name, (content, reason) in contents.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=f"{name}: .*{reason}"):
      decoding.decode(tmp_path / name)
    assert reason in decoding.find_fault(tmp_path / name)
  os.mkfifo(tmp_path / "pipe.jpg")
  for name, reason in (
    ("pipe.jpg", "it is a pipe or device, not a file"),
    ("missing.jpg", "there is no such file"),
    (".", "it is a folder, not a file"),
  ):
    assert decoding.find_fault(tmp_path / name) == reason
  (tmp_path / "good.jpg").write_bytes(good)
  assert decoding.find_fault(tmp_path / "good.jpg") is None


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_bombs_are_refused_before_they_go_off(side, tmp_path):
  """Also those at which Pillow only warns."""
  bomb, content = tmp_path / "bomb.png", encode(halves(RED, BLUE), "PNG")
  header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
  check = struct.pack(">I", zlib.crc32(header))
  bomb.write_bytes(content[:12] + header + check + content[33:])
  with warnings.catch_warnings(record=True) as caught:
    warnings.resetwarnings()
    warnings.filterwarnings(
      "ignore", category=PIL.Image.DecompressionBombWarning
    )
    with pytest.raises(
      errors.UserError, match="bomb.png.*more than 89,478,485"
    ):
      decoding.decode(bomb)
  assert not caught
  assert "make it smaller" in decoding.find_fault(bomb)


def test_a_crop_whose_edge_is_rounded_below_zero():
  image = np.arange(55 * 56 * 3, dtype=np.uint8).reshape(55, 56, 3)
  found = decoding.fit(image, (28, 28), "crop")
  assert found.shape == (28, 28, 3)
