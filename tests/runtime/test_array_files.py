"""Safetensors: any flipped bit is told, claims are judged before memory."""

import json

import numpy as np
import pytest
import safetensors.numpy

from vqt_jax import errors
from vqt_jax.runtime import array_files
from vqt_jax.runtime import files

ARRAYS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(2)}
INFO = {"history": [{"loss": [0.1, float("nan")]}], "seed": (1, 2)}


def accept(shapes, info):
  pass


def read(path, check=accept):
  with files.explain_damage(path):
    return array_files.read_safetensors(path, check)


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "a.safetensors"
  path.write_bytes(array_files.to_safetensors(ARRAYS, INFO))
  seen = []
  arrays, info = read(path, lambda *headers: seen.append(headers))
  assert json.dumps(info) == json.dumps(INFO)
  assert seen[0][0] == {"a/b": (2, 3), "c": (2,)} and seen[0][1] is info
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(arrays[name], array)
    assert arrays[name].dtype == array.dtype
  assert array_files.to_safetensors(ARRAYS, INFO) == path.read_bytes()


@pytest.mark.parametrize("metadata", [None, {"outcome": "x"}])
def test_files_without_a_checksum_are_refused(tmp_path, metadata):
  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file(ARRAYS, path, metadata)
  with pytest.raises(errors.UserError, match="it has no checksum"):
    read(path)


def test_flipped_bits_are_told(tmp_path):
  path = tmp_path / "a.safetensors"
  content = array_files.to_safetensors(ARRAYS, {"seed": 1})
  path.write_bytes(content)
  for place in range(len(content)):
    flipped = bytearray(content)
    flipped[place] ^= 1 << place % 8
    path.write_bytes(flipped)
    with pytest.raises(errors.UserError, match="Cannot read"):
      read(path)


def test_shapes_are_judged_before_memory_is_taken(tmp_path):
  path = tmp_path / "a.safetensors"
  header = json.dumps(
    {
      "__metadata__": {"vqt_jax": '{"sha256": ""}'},
      "a": {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]},
    }
  ).encode()
  with path.open("wb") as out:  # Sparse: it takes no room.
    out.write(len(header).to_bytes(8, "little") + header)
    out.truncate(8 + len(header) + 2**42)

  def refuse(shapes, info):
    raise ValueError(f"found {shapes}")

  with pytest.raises(errors.UserError, match="found .*4398046511104"):
    read(path, refuse)
  path.write_bytes(len(header).to_bytes(8, "little") + header)
  with pytest.raises(errors.UserError, match="Cannot read"):
    read(path)
