"""Files that somebody made to do harm: a sentence, soon, and little memory."""

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest

from tests import helpers
from vqt_jax import UserError
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import positions
from vqt_jax.checkpoints import read_config
from vqt_jax.runtime import memory

GOLDENS = helpers.GOLDENS / "bigvision"


@pytest.fixture(autouse=True)
def fixture_little_memory():
  """Peak memory of each of these tests is less than 200 MB above the start."""
  before = memory.PeakMemory()
  yield
  if os.path.exists("/proc/self/clear_refs"):
    assert before.bytes() - before.start < 2e8


def npz(path, leaves):
  np.savez(path, **leaves)
  return path


def leaves():
  with np.load(GOLDENS / "bv_tok_params.npz") as file:
    return {name: file[name] for name in file.files}


def raw_npz(path, members, compression=zipfile.ZIP_DEFLATED):
  """A zip file of (name, content)."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in members:
      archive.writestr(f"{name}.npy", content)
  return path


def npy(shape, content=b"", descr="<f4"):
  out = io.BytesIO()
  np.lib.format.write_array_header_2_0(
    out, {"descr": descr, "fortran_order": False, "shape": shape}
  )
  return out.getvalue() + content


def bad(path, match="Cannot read|is not a ViT|does not fit"):
  with pytest.raises(UserError, match=match) as caught:
    load_backbone(path)
  assert len(str(caught.value)) < 10_000
  with contextlib.suppress(UserError):  # It looks at fewer things.
    read_config(path, image_size=48)


def test_numbers_of_blocks_that_are_not_there(tmp_path):
  block = "Transformer/encoderblock_{}/MlpBlock_0/Dense_0/bias"
  for number in (2_000_000, "9" * 4000, "9" * 5000):
    some = leaves() | {block.format(number): np.zeros(96, np.float32)}
    bad(npz(tmp_path / "x.npz", some))


def test_zip_bombs(tmp_path):
  for name in ("Transformer/encoderblock_0/bomb", "head/kernel"):
    path = npz(
      tmp_path / "x.npz", {n: x for n, x in leaves().items() if n != name}
    )
    with (
      zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
      archive.open(f"{name}.npy", "w") as file,
    ):
      file.write(npy((2**26,)))
      for _ in range(2**8):
        file.write(bytes(2**20))
    bad(path)


def test_overlapping_parts(tmp_path):
  """Many entries of the directory that all name the same bytes."""
  path = raw_npz(tmp_path / "x.npz", [("a", npy((2**20,), bytes(2**22)))])
  content = path.read_bytes()
  start = content.index(b"PK\1\2")
  end = content.index(b"PK\5\6")
  entry = content[start:end]
  many = b"".join(
    entry.replace(b"a.npy", b"%c.npy" % c) for c in range(97, 120)
  )
  tail = bytearray(content[end:])
  struct.pack_into("<HHII", tail, 8, 23, 23, len(many), start)
  path.write_bytes(content[:start] + many + tail)
  with zipfile.ZipFile(path) as archive:
    assert len(archive.namelist()) == 23
  bad(path, "its parts overlap")


@pytest.mark.parametrize(
  "content",
  [
    npy((2**60,)),
    npy((2**20, 2**20)),
    npy((-2, -8), bytes(64)),
    npy((0, 2**62)),
    npy((16,), bytes(64), descr="|O"),
    npy((1,), bytes(4), descr="V99999999999"),
    npy((16,), bytes(60)),
    npy((16,), bytes(68)),
    b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(2**26),
    b"\x93NUMPY\2\0\x10\x27\0\0" + b"(" * 10_000,
    b"\x93NUMPY\1\0\x20\0{'descr': '<f4', 'shape': (2L,)  ",
    b"\x93NUMPY\3\0\0\0\0\0",
    b"\x93NUMPY\7\7",
    b"\x93NUM",
    b"",
  ],
  ids=lambda content: str(content[:40]),
)
def test_headers_of_arrays_that_lie(tmp_path, content):
  some = [(n, npy(x.shape, x.tobytes())) for n, x in leaves().items()]
  bad(
    raw_npz(tmp_path / "x.npz", [*some[:-1], (some[-1][0], content)]),
    "Cannot read|never loaded|does not fit",
  )


def test_a_part_whose_size_lies(tmp_path):
  """The directory claims 2^40 bytes of a part that is short."""
  path = raw_npz(tmp_path / "x.npz", [("cls", npy((2**30,), b"1234"))])
  content = bytearray(path.read_bytes())
  start = content.index(b"PK\1\2")
  size = 4 * 2**30 + len(npy((2**30,)))
  struct.pack_into("<I", content, start + 24, size % 2**32)
  path.write_bytes(content)
  bad(path)


def test_pipes_are_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "x.npz")
  bad(tmp_path / "x.npz", "not a regular file")


HEADER = {
  "zarr_format": 2,
  "shape": [32],
  "chunks": [32],
  "dtype": "<f4",
  "compressor": {"id": "zstd", "level": 1},
  "fill_value": None,
  "filters": None,
  "order": "C",
}


@pytest.mark.parametrize(
  "changes",
  [
    {"shape": [2**60]},
    {"shape": [2**60], "chunks": [2**60]},
    {"shape": [2**40], "chunks": [2**40], "compressor": None},
    {"shape": [2**70], "chunks": [1]},
    {"shape": [-1]},
    {"chunks": [0]},
    {"chunks": [2**62]},
    {"chunks": [32, 1]},
    {"shape": [True]},
    {"shape": 32},
    {"dtype": [["a", "<f4"]]},
    {"dtype": "V999999999"},
    {"dtype": "?what"},
    {"fill_value": [[[1]]]},
    {"filters": [{"id": "x"}]},
    {"compressor": {"id": "what"}},
    {"compressor": {}},
    {"order": "X"},
    {"dimension_separator": "/"},
    {"zarr_format": 3},
    {"more": 1},
    None,
    [],
    b"[" * 10_000_000,
    b'{"shape": ' + b"[" * 5000 + b"]" * 5000 + b', "shape": [32]}',
    b"\xff",
    b"",
  ],
  ids=lambda changes: str(changes)[:40],
)
def test_headers_of_zarr_that_lie(tmp_path, changes):
  folder = tmp_path / "checkpoint.bv-1"
  shutil.copytree(GOLDENS / "bv_ts" / "checkpoint.bv-000000005", folder)
  header = folder / "params~embedding~bias" / ".zarray"
  match changes:
    case bytes():
      header.write_bytes(changes)
    case dict():
      header.write_text(json.dumps(HEADER | changes))
    case _:
      header.write_text(json.dumps(changes))
  bad(folder, "Cannot read .*params~embedding~bias: ")


@pytest.mark.parametrize("step", [b"1/../../x", b"\xff", b"/etc", b"", b"a\0b"])
def test_pointers_that_leave_the_folder(tmp_path, step):
  (tmp_path / "run").mkdir()
  (tmp_path / "x").mkdir()
  (tmp_path / "run" / "checkpoint.bv-").mkdir()
  (tmp_path / "run" / "checkpoint.bv-LAST").write_bytes(step)
  bad(
    tmp_path / "run" / "checkpoint.bv",
    "that folder|Cannot read|points to|no Big Vis",
  )


def test_positions_without_a_grid_are_told_soon():
  for rows in (2**61 - 1, 2**40 + 2):
    with pytest.raises(UserError, match="do not form a square"):
      positions.find_grid(rows, (4, 4), None, None)


def test_more_weights_than_memory(monkeypatch):
  monkeypatch.setattr(memory, "host_memory", lambda: 100_000)
  with pytest.raises(UserError, match="more than this machine has memory"):
    load_backbone(GOLDENS / "bv_tok_params.npz")


def test_leaves_are_not_read_before_they_fit(tmp_path, monkeypatch):
  read = []
  monkeypatch.setattr(containers, "read_leaves", lambda *a: read.append(a))
  bad(npz(tmp_path / "x.npz", leaves() | {"more": np.zeros(3)}), "unused: more")
  assert not read


def test_a_leaf_without_its_header_is_not_left_out(tmp_path):
  folder = tmp_path / "checkpoint.bv-1"
  shutil.copytree(GOLDENS / "bv_ts" / "checkpoint.bv-000000005", folder)
  (folder / "params~head~bias" / ".zarray").unlink()
  bad(folder, "There is no .*params~head~bias/.zarray")
