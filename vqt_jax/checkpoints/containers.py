"""The two kinds of Big Vision checkpoints on disk: npz files, zarr folders."""

from collections.abc import Iterable
import io
import json
import os
import pathlib
import zipfile
import zlib

import numpy as np

from vqt_jax.errors import UserError

_AGAIN = "Copy or download it again."
# What zipfile and NumPy raise on damaged members.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  OSError,
  EOFError,
  ValueError,
  RuntimeError,
  MemoryError,
)


def resolve(path: pathlib.Path) -> pathlib.Path | None:
  """The file or folder that a path means, or None if there is none.

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
    UserError: this is no checkpoint, or a damaged one.
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


def leaf_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Shapes of all arrays in a checkpoint, without reading them.

  Raises:
    UserError: as `leaf_names`, or an array is damaged.
  """
  names, shapes = leaf_names(path), {}
  try:
    if path.is_dir():
      for name in names:
        header = path / name.replace("/", "~") / ".zarray"
        shapes[name] = tuple(json.loads(header.read_text())["shape"])
      return shapes
    with _open_npz(path) as archive:
      for name in names:
        with archive.open(f"{name}.npy") as member:
          version = np.lib.format.read_magic(member)
          read = getattr(
            np.lib.format, f"read_array_header_{version[0]}_{version[1]}"
          )
          shapes[name] = read(member)[0]
  except (*_DAMAGE, KeyError, AttributeError) as error:
    reason = f"{path} is damaged at {name}: {error}."
    raise UserError(f"{reason} {_AGAIN}") from error
  return shapes


def read_leaves(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Reads some arrays of a checkpoint; nothing is ever unpickled.

  Args:
    path: npz file or folder.
    names: which, as `leaf_names` has them.

  Returns:
    Name -> array, as stored.

  Raises:
    UserError: an array is damaged or holds Python objects.
  """
  if path.is_dir():
    return _read_zarr(path.resolve(), list(names))  # TensorStore takes no `..`.
  arrays = {}
  with _open_npz(path) as archive:
    for name in names:
      try:
        # Reads to the end of the member, which makes zipfile check its CRC.
        data = io.BytesIO(archive.read(f"{name}.npy"))
        arrays[name] = np.lib.format.read_array(data, allow_pickle=False)
      except _DAMAGE as error:
        if "allow_pickle" in str(error):
          raise UserError(
            f"{path} holds pickled Python objects ({name}), which could run"
            " any program and are never loaded; save it as plain arrays."
          ) from error
        raise UserError(
          f"{path} is damaged at {name}: {error}. {_AGAIN}"
        ) from error
  return arrays


def _open_npz(path: pathlib.Path) -> zipfile.ZipFile:
  try:
    return zipfile.ZipFile(path)
  except zipfile.BadZipFile as error:
    raise UserError(f"{path} {_not_a_zip(path)}") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _not_a_zip(path: pathlib.Path) -> str:
  """Says what a file is that should have been an npz."""
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
  import tensorstore  # Only needed here, and not quick to import.

  def spec(name):
    path = str(folder / name.replace("/", "~"))
    store = {"driver": "file", "path": path}
    # Without this, lost chunks would read as zeros.
    return {
      "driver": "zarr",
      "kvstore": store,
      "fill_missing_data_reads": False,
    }

  arrays = {}
  opened = {n: tensorstore.open(spec(n), open=True, read=True) for n in names}
  try:
    reads = {n: array.result().read() for n, array in opened.items()}
    for name, read in reads.items():
      arrays[name] = np.asarray(read.result())
  except (ValueError, OSError) as error:
    reason = str(error).split(" [")[0]
    raise UserError(f"{folder} is damaged: {reason}. {_AGAIN}") from error
  return arrays
