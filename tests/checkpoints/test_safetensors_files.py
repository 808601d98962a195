"""Safetensors as other libraries leave them; damaged ones in a sentence."""

import json
import os
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vqt_jax import UserError
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.runtime import memory

TENSORS = {
  "vit.cls": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
  "vit.b": np.arange(4).astype(ml_dtypes.bfloat16),
  "vit.h": np.float16([[0.5], [1e-7]]),
  "vit.scale": np.array(3, np.float32),
  "position_ids": np.arange(5)[None],
}


def save(path, tensors):
  path.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
  return path


def save_parts(folder):
  """Two files and their index, as `save_pretrained` leaves them."""
  names = list(TENSORS)
  parts = {
    f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)
  }
  for part, held in parts.items():
    save(folder / part, {name: TENSORS[name] for name in held})
  weight_map = {n: part for part, held in parts.items() for n in held}
  write_index(folder, {"metadata": {"total_size": 1}, "weight_map": weight_map})
  return weight_map


def write_index(folder, content):
  path = folder / "model.safetensors.index.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def check_all(place):
  path = containers.find(place)
  assert sorted(containers.leaf_names(path)) == sorted(TENSORS)
  assert containers.leaf_shapes(path, TENSORS) == {
    name: x.shape for name, x in TENSORS.items()
  }
  for name, array in containers.read_leaves(path, TENSORS).items():
    assert array.dtype == TENSORS[name].dtype
    np.testing.assert_array_equal(array, TENSORS[name])


def bad(path, match):
  before = memory.PeakMemory()
  with pytest.raises(UserError, match=match) as caught:
    load_backbone(path)
  text = str(caught.value)
  assert text.isprintable() and len(text) < 1000
  if os.path.exists("/proc/self/clear_refs"):
    assert before.bytes() - before.start < 2e8


@pytest.mark.parametrize("name", ["x.safetensors", "0123abcd"])
def test_a_file_by_its_name_or_its_first_bytes(tmp_path, name):
  check_all(save(tmp_path / name, TENSORS))


def test_a_folder_of_parts_also_by_links_out_of_it(tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshot").mkdir()
  save_parts(tmp_path / "blobs")
  for i, blob in enumerate(sorted((tmp_path / "blobs").iterdir())):
    moved = blob.rename(blob.with_name(str(i)))
    (tmp_path / "snapshot" / blob.name).symlink_to(moved)
  check_all(tmp_path / "snapshot")


def test_the_weights_of_a_folder(tmp_path):
  others = {"other": np.zeros(1, np.float32)}
  save(tmp_path / "open_clip_model.safetensors", TENSORS)
  save(tmp_path / "adapter_model.safetensors", others)
  check_all(tmp_path)
  save(tmp_path / "open_clip_model.safetensors", others)
  save_parts(tmp_path)
  check_all(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("{")
  save(tmp_path / "model.safetensors", TENSORS)
  check_all(tmp_path)


def test_configs_beside_the_weights(tmp_path):
  file = save(tmp_path / "model.safetensors", TENSORS)
  assert safetensors_files.configs(file) == {}
  for name in ("config.json", "open_clip_config.json", "tokenizer.json"):
    (tmp_path / name).write_text(json.dumps({"name": name}))
  expected = {
    name: {"name": name} for name in ("config.json", "open_clip_config.json")
  }
  assert safetensors_files.configs(file) == expected
  assert safetensors_files.configs(tmp_path) == expected


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"{", b"\xff", b'{"a":' + b"[" * 10**6]
)
def test_damaged_configs(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match="Cannot read .*config.json: "):
    safetensors_files.configs(tmp_path)


def test_a_config_of_a_terabyte(tmp_path):
  (tmp_path / "config.json").touch()
  os.truncate(tmp_path / "config.json", 2**40)
  with pytest.raises(UserError, match="expected at most 10,000,000 bytes"):
    safetensors_files.configs(tmp_path)


def raw(header, content=bytes(8), length=None):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return struct.pack("<Q", length or len(header)) + header + content


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8)):
  return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


WHOLE = safetensors.numpy.save(TENSORS)


@pytest.mark.parametrize(
  "content, match",
  [
    (b"", "is empty"),
    (WHOLE[:5], "is neither an npz"),
    (WHOLE[:40], "Cannot read"),
    (WHOLE[:-1], "does not fit its content"),
    (WHOLE + b"more", "does not fit its content"),
    (raw({"a": entry()}, length=2**60), "header claims to have 1,152,9"),
    (raw({"a": entry()}, length=50_000_000), "header claims to have 50,000,"),
    (raw({"a": entry()}, length=5_000_000), "does not fit its content"),
    (raw({"a": entry(), "b": entry(data_offsets=(4, 12))}), "offset"),
    (raw({"a": entry(data_offsets=(4, 12))}, bytes(12)), "offset"),
    (raw({"a": entry(data_offsets=(8, 0))}), "offset"),
    (raw({"a": entry(shape=(2**40,), data_offsets=(0, 2**42))}), "not fit"),
    (raw({"a": entry(shape=(2**40, 2**40))}), "overflow"),
    (raw({"a": entry(shape=(-2,))}), "does not fit its content"),
    (raw({"a": entry(shape=(3,))}), "does not fit its content"),
    (raw({"a": entry(dtype="X9")}), "does not fit its content"),
    (
      raw({"a": entry(shape=(0, 2**62), data_offsets=(0, 0))}, b""),
      "holds none of a ViT of transformers",
    ),
    (raw({}, b""), "found tensors such as none"),
    (raw(b'{"a":' + b"[" * 10_000), "does not fit its content"),
    (raw(b'{"\xff'), "does not fit its content"),
    (raw(b'{"\x1b[2J\n": 1}'), "does not fit its content"),
    (b"PK\3\4" + bytes(100), "is a zip file"),
    (b"\x80\2\x8a\x0al\xfc\x9cF", "is a Python pickle, which is never loaded"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"<!doctype html><html>", "is a web page"),
    (b'{"error": "Repository not found"}', "is neither an npz"),
  ],
  ids=lambda x: str(x)[:40],
)
def test_files_that_are_not_what_they_claim(tmp_path, content, match):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  bad(tmp_path, match)
  bad(path, match)


def test_a_link_of_which_the_file_is_gone(tmp_path):
  (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
  bad(tmp_path, "There is no .*model.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "model.safetensors")
  bad(tmp_path, "not a regular file")


@pytest.mark.parametrize(
  "tensors",
  [
    {"a.weight": np.zeros(8, np.int8)},
    {"a.weight": np.zeros(8, np.uint8)},
    {"a.weight": np.zeros(8, ml_dtypes.float8_e4m3fn)},
    {"a.weight": np.zeros(8, np.uint32), "a.scales": np.zeros(8, np.float16)},
    {"a.qweight": np.zeros(8, np.int32), "a.weight": np.zeros(8, np.float16)},
    {"a.weight_scale": np.zeros(8, np.float32)},
    {"a.weight.absmax": np.zeros(8, np.float32)},
    {"a.weight.quant_state.bitsandbytes__nf4": np.zeros(8, np.float32)},
  ],
  ids=lambda x: str(list(x)),
)
def test_quantised_files(tmp_path, tensors):
  path = save(tmp_path / "x.safetensors", tensors)
  bad(path, r"is quantised \(\w+ in a\..*expected weights in F32, F16 or BF16")


def test_buffers_are_not_quantised_weights(tmp_path):
  names = ["scale", "absmax_pool.weight", "unweight_scale", "x.SCBN"]
  tensors = {name: np.zeros(2, np.float32) for name in names}
  tensors |= {f"i{x}": np.zeros(2, x) for x in (bool, "i2", "i4", "i8", "f8")}
  path = save(tmp_path / "x.safetensors", tensors)
  assert sorted(containers.leaf_names(path)) == sorted(tensors)


def test_a_part_is_missing(tmp_path):
  save_parts(tmp_path)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  bad(tmp_path, "needs model-00002-of-00002.safetensors, which is not beside")
  (tmp_path / "model.safetensors.index.json").unlink()
  bad(tmp_path, "has parts of a model, but no model.safetensors.index.json")
  bad(
    tmp_path / "model-00001-of-00002.safetensors",
    "is part 1 of 2 of a model; name the folder",
  )


def test_a_part_is_damaged(tmp_path):
  save_parts(tmp_path)
  part = tmp_path / "model-00002-of-00002.safetensors"
  part.write_bytes(part.read_bytes()[:-1])
  bad(tmp_path, "Cannot read .*model-00002-of-00002.safetensors: its header")


@pytest.mark.parametrize("change", ["less", "more", "elsewhere"])
def test_index_and_parts_that_disagree(tmp_path, change):
  told = save_parts(tmp_path)
  parts = sorted(set(told.values()))
  match change:
    case "less":
      del told["vit.b"]
    case "more":
      told["vit.c"] = parts[0]
    case "elsewhere":
      told["vit.b"] = parts[parts[0] == told["vit.b"]]
  write_index(tmp_path, {"weight_map": told})
  bad(tmp_path, r"index.json does not match .*: only \S+ has vit\.[bc]")


@pytest.mark.parametrize(
  "name",
  ["../x.safetensors", "/x.safetensors", "", "..", "x.bin", "a/x.safetensors"],
)
def test_names_in_an_index_that_leave_the_folder(tmp_path, name):
  folder = tmp_path / "model"
  folder.mkdir()
  save(tmp_path / "x.safetensors", TENSORS)
  write_index(folder, {"weight_map": dict.fromkeys(TENSORS, name)})
  bad(folder, "is not the name of a file of safetensors")


@pytest.mark.parametrize(
  "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_damaged_indices(tmp_path, content):
  write_index(tmp_path, content)
  bad(tmp_path, "Cannot read .*index.json: ")


@pytest.mark.parametrize(
  "name, match",
  [
    ("pytorch_model.bin", "is a PyTorch pickle, which is never loaded"),
    ("a.pt", "take the safetensors of the same model, or convert it with"),
    ("a.pth", "is a PyTorch pickle"),
    ("a.ckpt", "is a PyTorch pickle"),
    ("flax_model.msgpack", "is a Flax checkpoint in msgpack"),
    ("tf_model.h5", "is a Keras model"),
    ("model.onnx", "is an ONNX graph"),
    ("saved_model.pb", "is a TensorFlow graph"),
    ("model.gguf", "is a quantised GGUF model"),
  ],
)
def test_weights_of_other_kinds(tmp_path, name, match):
  (tmp_path / "README.md").touch()
  (tmp_path / name).write_bytes(b"\x08\x01 whatever")
  bad(tmp_path / name, match)
  bad(tmp_path, f"has no safetensors: {name} {match}".replace("take", ".*take"))


def test_a_pickle_as_pytorch_saves_it(tmp_path):
  with zipfile.ZipFile(tmp_path / "weights", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\2}")
    archive.writestr("archive/data/0", bytes(8))
  bad(tmp_path / "weights", "is a PyTorch pickle, which is never loaded")


def test_a_folder_with_a_file_of_another_name(tmp_path):
  save(tmp_path / "adapter.safetensors", TENSORS)
  bad(tmp_path, "no model.safetensors; if adapter.safetensors is")
