"""Images of a request, received within limits."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
import dataclasses
import io

from etils import epy
import numpy as np
import PIL.Image

from vqt_jax import errors
from vqt_jax.data import decoding
from vqt_jax.runtime import files
from vqt_jax.serving import limits as limits_lib
from vqt_jax.tuned import inputs

with epy.lazy_imports():
  from starlette import exceptions
  from starlette import formparsers
  from starlette import requests

# Of those that Pillow reads, one starts a program (EPS), and many are rare.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_MEGA = 10**6


@dataclasses.dataclass(frozen=True)
class Upload:
  """An encoded image, and its name for messages and answers."""

  name: str
  content: bytes


def refusal(status: int, message: str) -> exceptions.HTTPException:
  """Make the exception that is answered with a status and a sentence."""
  return exceptions.HTTPException(status, message)


async def receive(
  request: requests.Request,
  limits: limits_lib.Limits,
  take: Callable[[int], None],
) -> list[Upload]:
  """Read the images of a request.

  They are files of a form (multipart), {"images": [base64, ...]} in JSON, or
  else the body is one.

  Args:
    request: none of its body has been read.
    limits: of the server.
    take: is called with the bytes of the body as they come.

  Raises:
    HTTPException: it is none of these, or exceeds a limit.
  """
  body = _chunks(request, limits.request_megabytes * _MEGA, take)
  kind = request.headers.get("content-type", "").partition(";")[0].strip()
  if kind.lower() == "multipart/form-data":
    uploads = await _parse_form(request, body, limits)
  else:
    content = b"".join([chunk async for chunk in body])
    uploads = [Upload("image", content)]
    if kind.lower() == "application/json":
      uploads = _parse_json(content)
  if not uploads:
    raise refusal(400, "Expected an image, found none.")
  if len(uploads) > limits.images:
    raise refusal(
      413,
      f"Expected at most {limits.images} images in a request, found"
      f" {len(uploads)}: send several requests.",
    )
  for upload in uploads:
    if len(upload.content) > limits.image_megabytes * _MEGA:
      raise refusal(
        413,
        f"Image {upload.name} has {len(upload.content):,} bytes; up to"
        f" {limits.image_megabytes} MB are taken.",
      )
  return uploads


async def _chunks(
  request: requests.Request, most: int, take: Callable[[int], None]
) -> AsyncIterator[bytes]:
  """Yield the body of a request as it comes, up to a number of bytes."""
  too_large = refusal(413, f"A request may have up to {most // _MEGA} MB.")
  told = request.headers.get("content-length", "")
  if told.isdecimal() and int(told) > most:
    raise too_large
  received = 0
  async for chunk in request.stream():
    received += len(chunk)
    if received > most:
      raise too_large
    take(len(chunk))
    yield chunk


async def _parse_form(
  request: requests.Request,
  body: AsyncIterator[bytes],
  limits: limits_lib.Limits,
) -> list[Upload]:
  """Return the files of a form; its other fields are passed over."""
  # One more than may be there, so that the sentence about it is the same.
  parser = formparsers.MultiPartParser(
    request.headers, _whole(body), max_files=limits.images + 1, max_fields=16
  )
  parser.spool_max_size = limits.request_megabytes * _MEGA  # Never on disk.
  try:
    form = await parser.parse()
  except formparsers.MultiPartException as e:
    raise refusal(400, f"The form is damaged: {e.message}") from e
  try:
    return [
      Upload(errors.printable(value.filename or key), await value.read())
      for key, value in form.multi_items()
      if not isinstance(value, str)
    ]
  finally:
    await form.close()


async def _whole(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
  """Yield a form; raise if its end is missing, with which an image would be."""
  end = b""
  async for chunk in body:
    end = (end + chunk)[-99:]
    yield chunk
  if not end.rstrip().endswith(b"--"):
    raise formparsers.MultiPartException("It has no end.")


def _parse_json(content: bytes) -> list[Upload]:
  expected = 'Expected JSON {"images": [...]} of images in base64'
  try:
    images = files.parse_json(content, dict).get("images")
  except (ValueError, RecursionError) as e:
    raise refusal(400, f"{expected}: {files.first_line(e)}") from e
  if not files.is_of(images, list[str]):
    raise refusal(400, f"{expected}, found something else.")
  uploads = []
  for number, text in enumerate(images, 1):
    try:
      content = base64.b64decode(text, validate=True)
    except ValueError as e:
      raise refusal(400, f"Image {number} is not in base64.") from e
    uploads.append(Upload(f"image {number}", content))
  return uploads


def prepare(
  upload: Upload, prepare_image: inputs.Prepare, megapixels: int
) -> np.ndarray:
  """Decode an image, after a look at the size that it says it has.

  Args:
    upload: an encoded image.
    prepare_image: of the models.
    megapixels: that it may have.

  Returns:
    (height, width, 3) float32.

  Raises:
    HTTPException: it is damaged, too large, or of another kind.
  """
  name = upload.name
  too_large = f"Image {name} has more than {megapixels} million pixels."
  if not upload.content:
    raise refusal(400, f"Image {name} is empty, 0 bytes.")
  try:
    with PIL.Image.open(io.BytesIO(upload.content), formats=FORMATS) as image:
      pixels = image.width * image.height
  except PIL.Image.DecompressionBombError as e:
    raise refusal(413, too_large) from e
  except Exception as e:  # Each of Pillow's decoders has its own.
    raise refusal(
      400,
      f"{name} is not an image of a kind that is read here: JPEG, PNG, WebP,"
      " GIF, TIFF, BMP or AVIF.",
    ) from e
  if pixels > megapixels * _MEGA:
    raise refusal(413, too_large)
  try:
    return prepare_image(upload.content)
  except decoding.BadImage as e:
    raise refusal(400, f"Cannot use image {name}: {e.reason}.") from e
