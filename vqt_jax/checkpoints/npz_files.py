"""Checkpoints in npz files: a NumPy array for every leaf."""

from collections.abc import Iterable
import io
import math
import pathlib
import zipfile

import numpy as np

from vqt_jax.checkpoints import file_kinds
from vqt_jax.errors import UserError
from vqt_jax.runtime import files

_AGAIN = "Copy or download it again."
_MOST_HEADER = 10_100  # Bytes; NumPy reads no longer ones.
_MOST_EXPANSION = 1032  # Of zeros, compressed as in a zip file.


def leaf_names(path: pathlib.Path) -> list[str]:
  """Names of all arrays; raise a `UserError` if this is no npz of arrays."""
  with _open(path) as archive:
    names = archive.namelist()
  others = [name for name in names if not name.endswith(".npy")]
  if any(name.endswith("data.pkl") for name in others):
    raise UserError(f"{path} {file_kinds.PICKLE}")
  if others or not names:
    raise UserError(
      f"{path} is an archive of {others[0] if others else 'nothing'}, not of"
      " NumPy arrays; name a Big Vision npz file."
    )
  return [name.removesuffix(".npy") for name in names]


def leaf_shapes(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
  """Read the shapes of some arrays from their headers.

  Raises:
    UserError: an array is damaged, claims more than the file can hold, or holds
      Python objects.
  """
  shapes = {}
  with _open(path) as archive:
    members = archive.infolist()
    with files.explain_damage(path, _AGAIN):
      if sum(m.compress_size for m in members) > path.stat().st_size:
        raise ValueError("its parts overlap")
    for name in names:
      with files.explain_damage(f"{name} in {path}", _AGAIN):
        shapes[name] = _npy_shape(archive, f"{name}.npy", path)
  return shapes


def _npy_shape(
  archive: zipfile.ZipFile, member: str, path: pathlib.Path
) -> tuple[int, ...]:
  """Read the shape of an array, and compare its size with the member's."""
  info = archive.getinfo(member)
  with archive.open(info) as file:
    start = io.BytesIO(file.read(_MOST_HEADER))
  version = np.lib.format.read_magic(start)
  name = f"read_array_header_{version[0]}_{version[1]}"
  shape, _, dtype = getattr(np.lib.format, name)(start)
  if dtype.hasobject:
    raise UserError(
      f"{path} holds pickled Python objects ({member.removesuffix('.npy')}),"
      " which could run any program and are never loaded; save it as plain"
      " arrays."
    )
  claimed = start.tell() + math.prod(shape) * dtype.itemsize
  if min(shape, default=0) < 0 or claimed != info.file_size:
    raise ValueError(
      f"its header claims {claimed:,} bytes, there are {info.file_size:,}"
    )
  if info.file_size > _MOST_EXPANSION * (info.compress_size + 1):
    raise ValueError("it is shorter than any array of its size")
  return shape


def read_leaves(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Read some arrays, of which `leaf_shapes` was asked before.

  Raises:
    UserError: an array is damaged.
  """
  arrays = {}
  with _open(path) as archive:
    for name in names:
      with (
        files.explain_damage(f"{name} in {path}", _AGAIN),
        archive.open(f"{name}.npy") as file,
      ):
        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # At its end zipfile checks its CRC.
  return arrays


def _open(path: pathlib.Path) -> zipfile.ZipFile:
  with files.explain_damage(path, _AGAIN):
    files.check_regular(path)
    try:
      return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
      raise UserError(f"{path} {file_kinds.describe(path)}") from error
