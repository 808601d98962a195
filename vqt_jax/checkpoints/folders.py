"""Folders of known files at web addresses and on the hub."""

from collections.abc import Sequence
import pathlib
import re

from vqt_jax.checkpoints import download
from vqt_jax.checkpoints import hub
from vqt_jax.errors import UserError


def is_address(place: str) -> bool:
  """Return whether `fetch_folder` fetches what is there."""
  return hub.is_address(place) or re.match("https?://", place) is not None


def fetch_folder(address: str, names: Sequence[str]) -> pathlib.Path:
  """Return the local copy of a folder; download what is not in the cache.

  Args:
    address: `https://` address of a folder, or `hf://OWNER/NAME[@REVISION]`.
    names: of the files to fetch, weights last.

  Raises:
    UserError: a file is not there, or cannot be fetched.
  """
  if hub.is_address(address):
    return hub.fetch(address, names=names).parent
  shown = download.without_secrets(address)
  if shown != address or re.search("[?#]", address):
    raise UserError(
      f"Cannot read {shown!a}: expected the address of a folder, without"
      " password, ? and #. Name its user in ~/.netrc, or download it."
    )
  place = address.rstrip("/")
  return [download.fetch(f"{place}/{name}") for name in names][-1].parent
