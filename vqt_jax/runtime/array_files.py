"""Named arrays in safetensors files, with a checksum of all that they hold."""

from collections.abc import Callable, Mapping
import hashlib
import json
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vqt_jax.runtime import files

Shapes = Mapping[str, tuple[int, ...]]

# The one entry of the metadata: several would be written in a random order.
_ABOUT = "vqt_jax"


def to_safetensors(
  arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None
) -> bytes:
  """Return the content of a file that `read_safetensors` reads.

  Args:
    arrays: name -> numbers.
    info: JSON-able, stored with them.
  """
  arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
  info = json.loads(json.dumps(info or {}))  # As it will be read.
  about = json.dumps({**info, "sha256": _digest(arrays, info)})
  return safetensors.numpy.save(arrays, {_ABOUT: about})


def read_safetensors(
  file: files.Path, check: Callable[[Shapes, dict[str, Any]], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Read a file that `to_safetensors` made.

  Call it in `files.explain_damage`, and parse there what it returns.

  Args:
    file: local, or in a bucket.
    check: called with the shapes that the file's header claims and with its
      `info`, before memory is taken for any array; raises a `ValueError` if
      they are not what is expected.

  Returns:
    The arrays, and the `info`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it has no checksum, or its content does not match it.
    Exception: of any kind, if it is damaged.
  """
  with files.local_copy(file) as local:
    with safetensors.safe_open(local, "numpy") as opened:
      if _ABOUT not in (metadata := opened.metadata() or {}):
        raise ValueError("it has no checksum")
      info = files.parse_json(metadata[_ABOUT], dict)
      expected = info.pop("sha256")
      names = opened.keys()
      check({n: tuple(opened.get_slice(n).get_shape()) for n in names}, info)
      arrays = {name: opened.get_tensor(name) for name in names}
  if _digest(arrays, info) != expected:
    raise ValueError("its content does not match its checksum")
  return arrays, info


def _digest(arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> str:
  """SHA-256 of names, dtypes, shapes and bits, and of `info`."""
  digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
  for name, array in sorted(arrays.items()):
    digest.update(repr((name, str(array.dtype), array.shape)).encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()
