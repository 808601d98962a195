"""Big Vision's checkpoint folders: a zarr array for every leaf.

TensorStore ends the process over some headers, so that it is only given those
that were checked here.
"""

from collections.abc import Iterable, Mapping
import itertools
import math
import pathlib
import re
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.runtime import files

_AGAIN = "Copy or download it again."
# What JAX and Big Vision write: fields of a header, and their types.
_FIELDS = {
  "zarr_format": int,
  "shape": list[int],
  "chunks": list[int],
  "dtype": str,
  "compressor": dict[str, str | int] | None,
  "fill_value": str | int | float | bool | None,
  "filters": None,
  "order": str,
  "dimension_separator": str,
}
_COMPRESSORS = ("zstd", "gzip", "zlib", "blosc")
_MOST_BYTES = 10_000  # Of a header.
_MOST_BRACKETS = 10  # Deep ones make the parser of TensorStore overflow.
_MOST_EXPANSION = 2**16  # Zeros become this much shorter, and no more.


def leaf_names(folder: pathlib.Path) -> list[str]:
  """Names of all arrays in a folder.

  Raises:
    UserError: one has lost its header. Without it the others may still be a
      ViT, but another one.
  """
  places = [p for p in folder.glob("[!.]*") if p.is_dir()]
  lost = [p for p in places if not files.exists(p / ".zarray")]
  if lost and len(lost) < len(places):
    raise errors.UserError(f"There is no {lost[0] / '.zarray'}. {_AGAIN}")
  return [p.name.replace("~", "/") for p in places if p not in lost]


def leaf_shapes(
  folder: pathlib.Path, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
  """Read the shapes of some arrays, and check that their chunks are there.

  Raises:
    UserError: an array is damaged, or claims more than its chunks can hold.
  """
  shapes = {}
  for name in names:
    place = _place(folder, name)
    with files.explain_damage(place, _AGAIN):
      header = _header(place / ".zarray")
      _check_chunks(place, header)
      shapes[name] = tuple(header["shape"])
  return shapes


def read_leaves(
  folder: pathlib.Path, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Read some arrays, of which `leaf_shapes` was asked before.

  Raises:
    UserError: an array is damaged.
  """
  import tensorstore  # Only needed here, and slow to import.

  folder = folder.resolve()  # TensorStore takes no `..`.

  def spec(name):
    return {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": str(_place(folder, name))},
      # Otherwise lost chunks would read as zeros.
      "fill_missing_data_reads": False,
    }

  opened = {n: tensorstore.open(spec(n), open=True, read=True) for n in names}
  arrays = {}
  with files.explain_damage(folder, _AGAIN):
    reads = {n: array.result().read() for n, array in opened.items()}
    for name, read in reads.items():
      arrays[name] = np.asarray(read.result())
  return arrays


def _place(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / name.replace("/", "~")


def _header(path: pathlib.Path) -> dict[str, Any]:
  """Parse a header; raise a `ValueError` if it is not as JAX writes them."""
  content = files.read(path)
  if (
    len(content) > _MOST_BYTES
    or content.count(b"[") + content.count(b"{") > _MOST_BRACKETS
  ):
    raise ValueError("its header .zarray is too long or too deep")
  header = {"dimension_separator": "."} | files.parse_json(content, dict)
  for field, kind in _FIELDS.items():
    if field not in header or not files.is_of(header[field], kind):
      raise ValueError(f"its header .zarray has no right {field}")
  compressor = header["compressor"]
  known = (
    header.keys() == _FIELDS.keys()
    and header["zarr_format"] == 2
    and header["order"] in ("C", "F")
    and header["dimension_separator"] == "."
    and re.fullmatch(r"[<>|]?\w+", header["dtype"])
    and (compressor is None or compressor.get("id") in _COMPRESSORS)
    and len(header["shape"]) == len(header["chunks"])
    and all(size >= 0 for size in header["shape"])
    and all(size > 0 for size in header["chunks"])
  )
  if not known:
    raise ValueError("its header .zarray is not one that Big Vision writes")
  return header


def _check_chunks(place: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Raise if chunks are missing, or too short for what the header claims."""
  shape, chunks = header["shape"], header["chunks"]
  grid = [-(-size // chunk) for size, chunk in zip(shape, chunks)]
  count = math.prod(grid)
  if count >= len(files.list_names(place)):  # The header is there as well.
    raise ValueError(f"expected {count:,} chunks, some are missing")
  is_bfloat16 = header["dtype"] == "bfloat16"
  itemsize = 2 if is_bfloat16 else np.dtype(header["dtype"]).itemsize
  claimed = math.prod(chunks) * itemsize
  for index in itertools.product(*map(range, grid)):
    chunk = place / (".".join(map(str, index)) or "0")
    files.check_regular(chunk)
    if chunk.stat().st_size * _MOST_EXPANSION < claimed:
      raise ValueError(f"chunk {chunk.name} is truncated")
