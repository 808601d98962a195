"""Checkpoints on disk: npz files, and Big Vision's folders of zarr arrays.

Nothing is ever unpickled.
"""

from collections.abc import Iterable, Iterator
import contextlib
import io
import json
import os
import pathlib
import re
from typing import Any
import zipfile

import numpy as np

from vqt_jax.checkpoints import names as names_lib
from vqt_jax.errors import UserError
from vqt_jax.models.backbone import Backbone
from vqt_jax.runtime import files

_AGAIN = "Copy or download it again."


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
  path = pathlib.Path(place).expanduser()
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
    path = path.with_name(f"{path.name}-{pointer.read_text().strip()}")
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
    names = [array.parent.name for array in path.glob("*/.zarray")]
    if not names:
      raise UserError(
        f"The folder {path} holds no Big Vision arrays; name an npz file or a"
        " checkpoint.bv-STEP folder."
      )
    return [name.replace("~", "/") for name in names]
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
    UserError: an array is damaged or holds Python objects.
  """
  shapes, names = {}, list(names)
  if path.is_dir():
    for name in names:
      header = path / name.replace("/", "~") / ".zarray"
      with _explain_damage(path, name):
        shapes[name] = tuple(json.loads(header.read_text())["shape"])
    return shapes
  with _open_npz(path) as archive:
    for name in names:
      with _explain_damage(path, name), archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = getattr(
          np.lib.format, f"read_array_header_{version[0]}_{version[1]}"
        )
        shapes[name], _, dtype = read(member)
      if dtype.hasobject:
        raise UserError(
          f"{path} holds pickled Python objects ({name}), which could run"
          " any program and are never loaded; save it as plain arrays."
        )
  return shapes


def read_leaves(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Read some arrays of a checkpoint.

  Args:
    path: npz file or folder.
    names: as `leaf_names` returns them.

  Returns:
    Name -> array, as stored.

  Raises:
    UserError: an array is damaged.
  """
  if path.is_dir():
    return _read_zarr(path.resolve(), list(names))  # TensorStore takes no `..`.
  arrays = {}
  with _open_npz(path) as archive:
    for name in names:
      with _explain_damage(path, name):
        # Reading a member to its end makes zipfile check its CRC.
        data = io.BytesIO(archive.read(f"{name}.npy"))
        arrays[name] = np.lib.format.read_array(data, allow_pickle=False)
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


@contextlib.contextmanager
def _explain_damage(path: pathlib.Path, name: str) -> Iterator[None]:
  """Turn errors of zipfile and NumPy for damaged members into `UserError`."""
  try:
    yield
  except Exception as error:  # They have a dozen kinds.
    raise UserError(
      f"{path} is damaged at {name}: {error}. {_AGAIN}"
    ) from error


def _open_npz(path: pathlib.Path) -> zipfile.ZipFile:
  try:
    return zipfile.ZipFile(path)
  except zipfile.BadZipFile as error:
    raise UserError(f"{path} {_describe_other_file(path)}") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error


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


def _read_zarr(folder: pathlib.Path, names: list[str]) -> dict[str, np.ndarray]:
  import tensorstore  # Only needed here, and slow to import.

  def spec(name):
    path = str(folder / name.replace("/", "~"))
    return {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": path},
      # Otherwise lost chunks would read as zeros.
      "fill_missing_data_reads": False,
    }

  opened = {n: tensorstore.open(spec(n), open=True, read=True) for n in names}
  try:
    reads = {n: array.result().read() for n, array in opened.items()}
    return {name: np.asarray(read.result()) for name, read in reads.items()}
  except (ValueError, OSError) as error:
    reason = str(error).split(" [")[0]
    raise UserError(f"{folder} is damaged: {reason}. {_AGAIN}") from error
