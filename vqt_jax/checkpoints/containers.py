"""Checkpoints on disk: npz files, and Big Vision's folders of zarr arrays.

Nothing is ever unpickled.
"""

from collections.abc import Iterable
import io
import math
import os
import pathlib
import re
from typing import Any
import zipfile

import numpy as np

from vqt_jax.checkpoints import names as names_lib
from vqt_jax.checkpoints import zarr_folders
from vqt_jax.errors import UserError
from vqt_jax.models.backbone import Backbone
from vqt_jax.runtime import files

_AGAIN = "Copy or download it again."
_MOST_HEADER = 10_100  # Bytes; NumPy reads no longer ones.
_MOST_EXPANSION = 1032  # Of zeros, compressed as in a zip file.


def split_subtree(source: str) -> tuple[str, str]:
  """Split `PLACE:img` into (PLACE, "img"); other colons are left alone.

  The query of a web address may hold any: there `:img` comes before it.
  """
  if "://" not in source and os.path.exists(os.path.expanduser(source)):
    return source, ""
  place, query, rest = source, "", ""
  if re.match("https?://", source):
    place, query, rest = source.partition("?")
  match = re.fullmatch(r"((?:\w+://[^/]+/|(?!\w+://)).+):(\w[\w/]*)", place)
  return (match[1] + query + rest, match[2]) if match else (source, "")


def local_path(source: str) -> str | None:
  """Return a source with its absolute path; None if it is not a local one."""
  place, subtree = split_subtree(source)
  path = pathlib.Path(os.path.expanduser(place))
  if "://" in place or not find(path):
    return None
  return os.path.abspath(path) + (f":{subtree}" if subtree else "")


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Return the file or folder that a path stands for, or None.

  Big Vision's `checkpoint.bv` stands for the step that the text file
  `checkpoint.bv-LAST` names.
  """
  pointer = path.with_name(f"{path.name}-LAST") if path.name else path
  if not os.path.exists(path) and os.path.isfile(pointer):
    with files.explain_damage(pointer), pointer.open() as file:
      step = file.read(100).strip()
    path = files.below(path.parent, f"{path.name}-{step}")
    if not os.path.exists(path):
      raise UserError(
        f"{pointer} points to {path}, which does not exist; name another step."
      )
  return path if os.path.exists(path) else None


def leaf_names(path: pathlib.Path) -> list[str]:
  """Names of all arrays in a checkpoint, without reading them.

  Raises:
    UserError: this is not a checkpoint, or a damaged one.
  """
  if path.is_dir():
    if names := zarr_folders.leaf_names(path):
      return names
    raise UserError(
      f"The folder {path} holds no Big Vision arrays; name an npz file or a"
      " checkpoint.bv-STEP folder."
    )
  with _open_npz(path) as archive:
    names = archive.namelist()
  others = [name for name in names if not name.endswith(".npy")]
  if others or not names:
    raise UserError(
      f"{path} is an archive of {others[0] if others else 'nothing'}, not of"
      " NumPy arrays; name a Big Vision npz file."
    )
  return [name.removesuffix(".npy") for name in names]


def leaf_shapes(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
  """Read the shapes of some arrays of a checkpoint from their headers.

  Args:
    path: npz file or folder.
    names: as `leaf_names` returns them.

  Raises:
    UserError: an array is damaged, claims more than the file can hold, or holds
      Python objects.
  """
  if path.is_dir():
    return zarr_folders.leaf_shapes(path, names)
  shapes = {}
  with _open_npz(path) as archive:
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
  """Read some arrays of a checkpoint, after `leaf_shapes` of them.

  Args:
    path: npz file or folder.
    names: as `leaf_names` returns them.

  Returns:
    Name -> array, as stored.

  Raises:
    UserError: an array is damaged.
  """
  if path.is_dir():
    return zarr_folders.read_leaves(path, names)
  arrays = {}
  with _open_npz(path) as archive:
    for name in names:
      with (
        files.explain_damage(f"{name} in {path}", _AGAIN),
        archive.open(f"{name}.npy") as file,
      ):
        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # At its end zipfile checks its CRC.
  return arrays


def save_npz(path: str | os.PathLike[str], backbone: Backbone | Any) -> None:
  """Write a backbone's parameters as Big Vision writes them.

  One sub-tree per block, no prefix: the layout that Big Vision,
  vision_transformer and third-party converters all read. Leaves keep their
  dtype (bfloat16 becomes two-byte void, as in Big Vision); `load_backbone`
  returns the same bits. Settings that the format lacks (gelu, value range, a
  non-square grid, "mae" and "0" as pooling) must be given again when loading.

  Args:
    path: of the file, which appears at once, when it is complete.
    backbone: a `Backbone`, or its `params`.

  Raises:
    UserError: the file cannot be written.
  """
  params = backbone.params if isinstance(backbone, Backbone) else backbone
  leaves = {n: np.asarray(a) for n, a in names_lib.flatten(params).items()}
  arrays = dict(sorted(names_lib.unstack_blocks(leaves).items()))
  with files.replacing(files.path(path)) as file:
    np.savez(file, **arrays)


def _open_npz(path: pathlib.Path) -> zipfile.ZipFile:
  with files.explain_damage(path, _AGAIN):
    files.check_regular(path)
    try:
      return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
      raise UserError(f"{path} {_describe_other_file(path)}") from error


def _describe_other_file(path: pathlib.Path) -> str:
  """Describe a file that should have been an npz, as the end of a sentence."""
  with path.open("rb") as file:
    start = file.read(8)
  if not start:
    return f"is empty. {_AGAIN}"
  if start.startswith(b"PK"):
    return f"is truncated: its end is missing. {_AGAIN}"
  if start.startswith(b"\x80"):
    return "is a Python pickle, which is never loaded; save it as an npz."
  if start.startswith(b"\x93NUMPY"):
    return (
      "is a single NumPy array; expected an npz with one array a parameter."
    )
  return (
    "is not an npz file; expected a Big Vision checkpoint (weights of timm or"
    " Hugging Face are not read)."
  )
