"""Weights in safetensors, as Hugging Face, timm and OpenCLIP leave them.

A file, or parts of one with an index that tells which tensor is in which part.
Small JSON files beside them describe the model.
"""

from collections.abc import Iterable, Iterator
import contextlib
import pathlib
import re
from typing import Any

import numpy as np
import safetensors

from vqt_jax import errors
from vqt_jax.checkpoints import file_kinds
from vqt_jax.runtime import files

# Files of weights in a folder, the first one there is taken. OpenCLIP's are
# last: beside them, `model.safetensors` is the same model for another library.
WEIGHTS = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "open_clip_model.safetensors.index.json",
)
CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")

_AGAIN = "Copy or download it again."
_INDEX = ".safetensors.index.json"
_PART = r".*-(\d{5})-of-(\d{5})\.safetensors"
_MOST_HEADER = 10_000_000  # Bytes; models of 10,000 tensors take 1,000,000.
# Types of weights, and those of buffers, such as indices of positions.
_DTYPES = ("F32", "F16", "BF16", "F64", "BOOL", "I64", "I32", "I16")
# What stands beside weights that are packed into wider integers.
_PACKED = (
  r".*\b(absmax|quant_map|quant_state\b.*|SCB|weight_scale(_inv)?"
  r"|weight_packed|qweight|qzeros|W_q)"
)


def find_in(folder: pathlib.Path) -> pathlib.Path | None:
  """Return the file of weights, or the index of its parts, in a folder.

  Args:
    folder: as `save_pretrained` or a snapshot of the hub leaves it.
  """
  there = (folder / name for name in WEIGHTS)
  # Also a link of which the file is gone, so that this is told.
  return next((x for x in there if x.exists() or x.is_symlink()), None)


def is_one(file: pathlib.Path) -> bool:
  """Return whether a file should be one of safetensors, or an index of some."""
  if file.name.endswith((".safetensors", _INDEX)):
    return True
  # In the hub's cache the files behind the links have no such names.
  with files.explain_damage(file):
    return _begins_well(file)


def _begins_well(file: pathlib.Path) -> bool:
  """Return whether a file begins with 8 bytes, a length, and an open brace."""
  files.check_regular(file)
  with file.open("rb") as content:
    return content.read(9)[8:] == b"{"


def leaf_names(path: pathlib.Path) -> list[str]:
  """Names of all tensors.

  Args:
    path: as `is_one` accepts it.

  Raises:
    UserError: a file is missing, damaged or quantised, or not what the index
      tells.
  """
  return list(_places(path))


def leaf_shapes(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
  """Read the shapes of some tensors; raise a `UserError` as `leaf_names`.

  The shapes fit the sizes of the files, which the library checks.
  """
  return {
    name: tuple(file.get_slice(name).get_shape())
    for name, file in _opened(path, names)
  }


def read_leaves(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Read some tensors as stored; raise a `UserError` as `leaf_names`."""
  return {name: file.get_tensor(name) for name, file in _opened(path, names)}


def configs(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Read the JSON files that describe a model.

  Args:
    path: folder, or file in it.

  Returns:
    Those of `CONFIGS` that are there: name of the file -> its content.

  Raises:
    UserError: one is damaged.
  """
  folder = path if path.is_dir() else path.parent
  there = (folder / name for name in CONFIGS)
  return {file.name: _read_json(file) for file in there if file.exists()}


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  with files.explain_damage(file, _AGAIN):
    if file.stat().st_size > _MOST_HEADER:
      raise ValueError(f"expected at most {_MOST_HEADER:,} bytes")
    return files.parse_json(files.read(file), dict)


def _places(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Name of each tensor -> file that holds it."""
  if not path.name.endswith(_INDEX):
    part = re.fullmatch(_PART, path.name)
    if part and int(part[2]) > 1:
      raise errors.UserError(
        f"{path} is part {int(part[1])} of {int(part[2])} of a model; name the"
        " folder, which has the index of the parts too."
      )
    return dict.fromkeys(_names_in(path), path)
  index = _read_json(path)
  with files.explain_damage(path, _AGAIN):
    if not files.is_of(index, {"weight_map": dict[str, str]}):
      raise ValueError("expected a weight_map from tensors to files")
    told = index["weight_map"]
    for name in told.values():
      # Not `files.below`: in the hub's cache these are links out of the folder.
      if not re.fullmatch(r"[\w.-]+\.safetensors", name):
        raise ValueError(f"{name!a} is not the name of a file of safetensors")
  found = {}
  for name in sorted(set(told.values())):
    part = path.with_name(name)
    if not part.exists():
      raise errors.UserError(
        f"{path} needs {name}, which is not beside it: a part of the model is"
        " missing. Copy or download all of it."
      )
    found[name] = _names_in(part)
  pairs = {(tensor, part) for part in found for tensor in found[part]}
  if odd := sorted(pairs.symmetric_difference(told.items())):
    tensor, part = odd[0]
    raise errors.UserError(
      f"{path} does not match {part}: only {part if odd[0] in pairs else 'it'}"
      f" has {tensor}. Copy or download all of the model again."
    )
  return {tensor: path.with_name(part) for tensor, part in told.items()}


def _names_in(file: pathlib.Path) -> list[str]:
  """Names of the tensors in a file, none of which is quantised."""
  with _open(file) as opened:
    names = list(opened.keys())
    dtypes = {name: opened.get_slice(name).get_dtype() for name in names}
  for name, dtype in sorted(dtypes.items()):
    if dtype not in _DTYPES or re.fullmatch(_PACKED, name):
      raise errors.UserError(
        f"{file} is quantised ({dtype} in {name}): expected weights in F32, F16"
        " or BF16. Take the model that it was made from."
      )
  return names


def _opened(
  path: pathlib.Path, names: Iterable[str]
) -> Iterator[tuple[str, Any]]:
  """Yield names, and with each the file that holds it, opened."""
  places, names = _places(path), list(names)
  for file in dict.fromkeys(places[name] for name in names):
    with _open(file) as opened:
      for name in names:
        if places[name] == file:
          yield name, opened


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Any]:
  """Open a file, of which no memory is taken for what its header claims."""
  with files.explain_damage(file, _AGAIN):
    if not _begins_well(file):
      raise errors.UserError(f"{file} {file_kinds.describe(file)}")
    with file.open("rb") as content:
      length = int.from_bytes(content.read(8), "little")
    if length > _MOST_HEADER:
      raise ValueError(f"its header claims to have {length:,} bytes")
    try:
      opened = safetensors.safe_open(file, "numpy")
    except safetensors.SafetensorError as error:
      raise ValueError(
        "its header does not fit its content"
        f" ({str(error).removeprefix('Error while deserializing header: ')})"
      ) from error
    with opened:
      yield opened
