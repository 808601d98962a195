"""Checkpoints on disk: npz files, safetensors, Big Vision's folders of zarr.

Nothing is ever unpickled.
"""

from collections.abc import Iterable
import os
import pathlib
import re
import types

import numpy as np

from vqt_jax.checkpoints import file_kinds
from vqt_jax.checkpoints import npz_files
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.checkpoints import zarr_folders
from vqt_jax.errors import UserError
from vqt_jax.runtime import files


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
  `checkpoint.bv-LAST` names, and a folder for its file of safetensors.
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
  if path.is_dir():
    return safetensors_files.find_in(path) or path
  return path if os.path.exists(path) else None


def leaf_names(path: pathlib.Path) -> list[str]:
  """Names of all arrays in a checkpoint, without reading them.

  Args:
    path: as `find` returns it.

  Raises:
    UserError: this is not a checkpoint, or a damaged one.
  """
  names = _library(path).leaf_names(path)
  if path.is_dir() and not names:
    text = file_kinds.describe_names(files.list_names(path))
    raise UserError(f"The folder {path} {text}")
  return names


def leaf_shapes(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
  """Read the shapes of some arrays of a checkpoint from their headers.

  Args:
    path: as `find` returns it.
    names: as `leaf_names` returns them.

  Raises:
    UserError: an array is damaged, claims more than the file can hold, or holds
      Python objects.
  """
  return _library(path).leaf_shapes(path, names)


def read_leaves(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Read some arrays of a checkpoint, after `leaf_shapes` of them.

  Args:
    path: as `find` returns it.
    names: as `leaf_names` returns them.

  Returns:
    Name -> array, as stored.

  Raises:
    UserError: an array is damaged.
  """
  return _library(path).read_leaves(path, names)


def _library(path: pathlib.Path) -> types.ModuleType:
  """Module that reads this kind of checkpoint."""
  if path.is_dir():
    return zarr_folders
  return safetensors_files if safetensors_files.is_one(path) else npz_files
