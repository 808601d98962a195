"""Models of the Hugging Face hub. The hub is a thread."""

import json
import logging
import os
import time
import warnings

from huggingface_hub import HfApi
from huggingface_hub import constants
import numpy as np
import pytest
import safetensors.numpy

from tests import helpers
from tests import hub_server
from tests.hub_server import NEW
from tests.hub_server import OLD
from vqt_jax import UserError
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import hub
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import read_config

WEIGHTS = safetensors.numpy.save({"a": np.arange(99_999, dtype=np.float32)})
OTHER = safetensors.numpy.save({"a": np.zeros(2, np.float32)})
MODEL = {
  "README.md": b"# A model",
  "config.json": b'{"model_type": "vit"}',
  "model.safetensors": WEIGHTS,
  "open_clip_model.safetensors": b"not fetched",
  "preprocessor_config.json": b"{}",
  "pytorch_model.bin": b"\x80\2 never fetched",
}
TOKEN = "hf_" + "Sekret" * 5


@pytest.fixture
def server(monkeypatch, tmp_path):
  with hub_server.serve() as server:
    server.models["owner/name"] = {OLD: MODEL, NEW: MODEL}
    set_up(monkeypatch, server.address, tmp_path / "cache")
    yield server


def set_up(monkeypatch, endpoint, cache):
  """Do what the environment does where the library is not imported yet."""
  template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
  monkeypatch.setattr(constants, "ENDPOINT", endpoint)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
  monkeypatch.delenv("HF_TOKEN", raising=False)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)


def offline(monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def bad(source, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    load_backbone(source, **options)
  text = str(caught.value)
  assert text.isprintable() and len(text) < 700
  return text


def test_only_what_is_needed_is_fetched_once(server):
  seen = []
  report = lambda *args: seen.append(args)
  path = hub.fetch("hf://owner/name", progress=report)
  assert path.name == "model.safetensors" and path.read_bytes() == WEIGHTS
  expected = ["config.json", "preprocessor_config.json", "model.safetensors"]
  assert sorted(server.fetched) == sorted(expected)
  total = sum(len(MODEL[name]) for name in expected)
  assert seen[-1] == (total, total)
  assert [done for done, _ in seen] == sorted(done for done, _ in seen)
  assert hub.fetch("hf://owner/name", progress=report) == path
  assert len(server.fetched) == 3 and seen[-1] == (total, total)
  assert sorted(p.name for p in path.parent.iterdir()) == sorted(expected)


def test_sizes_that_are_not_told(server):
  server.tells_sizes, seen = False, []
  hub.fetch("hf://owner/name", progress=lambda *args: seen.append(args))
  assert {total for _, total in seen} == {None}


def test_a_branch_that_moves(server):
  path = hub.fetch("hf://owner/name")
  assert path.parent.name == OLD
  server.models["owner/name"][NEW] = MODEL | {"model.safetensors": OTHER}
  assert hub.fetch("hf://owner/name@v2").read_bytes() == OTHER
  server.branches["main"] = NEW
  assert hub.fetch("hf://owner/name").parent.name == NEW
  assert hub.fetch(f"hf://owner/name@{OLD}") == path


def test_a_branch_that_moves_between_two_files(server):
  class Moving(list):
    def append(self, name):
      super().append(name)
      server.branches["main"] = NEW

  server.models["owner/name"][NEW] = dict.fromkeys(MODEL, b"of another commit")
  server.fetched = Moving()
  path = hub.fetch("hf://owner/name")
  assert path.parent.name == OLD and path.read_bytes() == WEIGHTS


def test_a_model_in_parts(server):
  parts = {
    f"model-0000{i}-of-00002.safetensors": safetensors.numpy.save(
      {name: np.full(3, i, np.float32)}
    )
    for i, name in ((1, "a"), (2, "b"))
  }
  told = {"a": min(parts), "b": max(parts)}
  files = parts | {
    "model.safetensors.index.json": json.dumps({"weight_map": told}).encode(),
    "open_clip_model.safetensors": OTHER,
    "model-of-something-else.safetensors": OTHER,
  }
  server.models["owner/parts"] = {OLD: files}
  path = hub.fetch("hf://owner/parts")
  assert sorted(server.fetched) == sorted([*parts, path.name])
  assert containers.read_leaves(path, "ab")["b"].tolist() == [2, 2, 2]
  del files[max(parts)]
  server.models["owner/lost"] = {OLD: files}
  bad("hf://owner/lost", "needs model-00002-of-00002.safetensors, which is not")


def test_interrupted_transfers_resume(server):
  server.cut = [10**9, 10**9, 100_000, 50_000]
  path = hub.fetch("hf://owner/name")
  assert path.read_bytes() == WEIGHTS
  assert server.ranges == ["bytes=100000-", "bytes=150000-"]


def test_a_server_that_dies(server):
  server.cut = [10**9, 10**9, 100_000] + [0] * 99
  bad(
    "hf://owner/name",
    "hf://owner/name cannot be fetched from http://127.* Try again",
  )
  server.cut, seen = [], []
  report = lambda *args: seen.append(args)
  path = hub.fetch("hf://owner/name", progress=report)
  assert path.read_bytes() == WEIGHTS
  assert server.fetched.count("config.json") == 1
  total = len(WEIGHTS) + sum(map(len, (b'{"model_type": "vit"}', b"{}")))
  assert seen[0][0] > total - len(WEIGHTS) and seen[-1] == (total, total)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble(server, status):
  server.statuses = [status] * 99
  bad("hf://owner/name", f"cannot be fetched from .*: .*{status}.* Try again")


def test_a_model_that_is_gated(server):
  server.gated = True
  text = bad("owner/name", "hf://owner/name is gated: accept its conditions at")
  assert f"{server.address}/owner/name, and set HF_TOKEN" in text


def test_a_model_that_is_not_there(server):
  bad("hf://owner/gone", "There is no model owner/gone at http.* HF_TOKEN")
  bad("hf://owner/name@v9", "owner/name has no revision 'v9' at http")
  text = bad("owner/gone", "owner/gone is neither a file or folder nor the")
  assert "There is no model owner/gone at" in text
  text = bad("howto-i21k-B/17", "Did you mean howto-i21k-B/16")
  assert "There is no model howto-i21k-B/17 at" in text


@pytest.mark.parametrize(
  "files, match",
  [
    (
      ["pytorch_model.bin"],
      "hf://owner/x has no safetensors: pytorch_model.bin"
      " is a PyTorch pickle, which is never loaded",
    ),
    (["tf_model.h5"], "tf_model.h5 is a Keras model; take the safetensors"),
    (
      ["adapter.safetensors"],
      "no model.safetensors; if adapter.safetensors is",
    ),
    ([], "holds no Big Vision arrays and no safetensors"),
  ],
)
def test_a_model_without_safetensors(server, files, match):
  server.models["owner/x"] = {OLD: dict.fromkeys(["README.md", *files], b"")}
  bad("owner/x", match)
  assert not server.fetched


def test_offline_and_unreachable(server, monkeypatch, tmp_path):
  path = hub.fetch("hf://owner/name")
  server.shutdown()
  server.server_close()
  assert hub.fetch("hf://owner/name") == path
  bad("hf://owner/name@v2", "cannot be fetched from http.*refused.* Try again")
  bad("owner/gone", "neither a file .*cannot be fetched from http.*refused")
  offline(monkeypatch)
  assert hub.fetch("hf://owner/name") == path
  assert hub.fetch(f"hf://owner/name@{OLD}") == path
  bad("hf://owner/gone", f"not in the cache {tmp_path}/cache, and HF_HUB_OFF")
  bad("owner/gone", "is neither a file or folder .* HF_HUB_OFFLINE forbids")


def test_a_part_of_a_model_in_the_cache(server, monkeypatch):
  server.cut = [10**9, 10**9] + [0] * 99
  bad("hf://owner/name", "Try again")
  offline(monkeypatch)
  bad("hf://owner/name", "is not in the cache")


def test_the_folder_of_downloads(server, tmp_path):
  path = hub.fetch("hf://owner/name", tmp_path / "mine")
  assert path.is_relative_to(tmp_path / "mine")
  assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(server, monkeypatch):
  def download(*args, **kwargs):
    with open("/dev/full", "wb", buffering=0) as file:
      file.write(b"x")

  monkeypatch.setattr(HfApi, "hf_hub_download", download)
  bad("hf://owner/name", "Cannot write .*cache: No space left .* set HF_HOME")


def test_a_cache_that_is_a_file(server, tmp_path):
  (tmp_path / "cache").write_text("")
  bad("hf://owner/name", "Cannot write .*cache: (Not a dir|File exists)")


def test_the_token_is_sent_but_not_shown(server, monkeypatch, tmp_path):
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  server.statuses = [403]
  text = bad(
    "hf://owner/name", r"refuses hf://owner/name \(403\): set HF_TOKEN"
  )
  assert TOKEN not in text and server.tokens == {f"Bearer {TOKEN}"}
  error = RuntimeError(f"Illegal header value 'Bearer {TOKEN}'")
  text = str(hub._explain(error, "owner/name", None, tmp_path))
  assert "Illegal header value 'Bearer ...'" in text


def test_the_password_of_a_mirror_is_not_shown(server, monkeypatch, tmp_path):
  with_password = server.address.replace("//", "//me:pw@")
  set_up(monkeypatch, with_password, tmp_path / "cache")
  server.statuses = [500] * 99
  assert "pw" not in bad("hf://owner/name", "cannot be fetched from .*500")
  assert "pw" not in bad("hf://owner/gone", "There is no model owner/gone at")


def test_nothing_is_printed(server, capfd, caplog, monkeypatch):
  def loud(*args, **kwargs):
    warnings.warn("A warning", stacklevel=1)
    print_all.warning("A line")
    return model_info(*args, **kwargs)

  model_info = HfApi.model_info
  monkeypatch.setattr(HfApi, "model_info", loud)
  print_all = logging.getLogger("huggingface_hub")
  print_all.addHandler(caplog.handler)
  levels = {n: logging.getLogger(n).level for n in ("huggingface_hub", "httpx")}
  hub.fetch("hf://owner/name")
  server.cut = [10, 10]
  hub.fetch("hf://owner/name@v2")
  bad("hf://owner/gone", "no model")
  print_all.removeHandler(caplog.handler)
  assert capfd.readouterr() == ("", "") and not caplog.records
  assert levels == {n: logging.getLogger(n).level for n in levels}


@pytest.mark.parametrize(
  "address",
  [
    "hf://",
    "hf://name",
    "hf://owner/name/model.safetensors",
    "hf://owner/name@",
    "hf://owner/name@../../x",
    "hf://owner/name@/etc",
    "hf://owner/name@a/../../x",
    "hf://owner/na..me",
    "hf://../name",
    "hf://owner/..",
    "hf://owner/a--b",
    "hf://owner/" + 97 * "a",
    "hf://owner/name.git",
    "hf://owner/n\x1bme",
    "hf://me:pw@owner/name",
  ],
)
def test_addresses_that_are_none(address):
  text = bad(address, "expected hf://OWNER/NAME, or")
  assert "pw" not in text


@pytest.mark.parametrize(
  "text, expected",
  [
    ("facebook/dinov2-small", True),
    ("timm/vit_small_patch14_reg4_dinov2.lvd142m", True),
    ("owner/name@refs/pr/1", True),
    ("dinov2-small", False),
    ("a/b/c", False),
    ("./b", False),
    ("../b", False),
    ("~/b", False),
    ("/a/b", False),
    ("photos/vit.npz", False),
    ("photos/model.safetensors", False),
    ("photos/pytorch_model.bin", False),
    ("a b/c", False),
    ("a/bé", False),
  ],
)
def test_names_that_may_be_of_the_hub(text, expected):
  assert hub.is_name(text) == expected


def test_paths_and_public_names_come_first(server, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "owner" / "name").mkdir(parents=True)
  bad("owner/name", "The folder owner/name holds no Big Vision arrays")
  bad("owner/name:img", "The folder owner/name holds no Big Vision arrays")
  bad("mixer-B/16", "is an MLP-Mixer, not a ViT")
  assert not server.fetched


def test_a_load_by_name(server):
  folder = helpers.GOLDENS / "foreign" / "hf_vit"
  server.models["owner/vit"] = {
    OLD: {
      name: (folder / name).read_bytes()
      for name in ("config.json", "model.safetensors")
    }
  }
  expected = load_backbone(folder)
  config = expected.config
  assert read_config("owner/vit", image_size=config.image_size) == config
  for source in ("owner/vit", "owner/vit@main", f"hf://owner/vit@{OLD}"):
    found = load_backbone(source)
    assert (found.digest, found.config) == (expected.digest, config)
    assert (found.source, found.revision) == (source, OLD)
  assert expected.revision == ""
