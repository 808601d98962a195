"""Models of the Hugging Face hub. The hub is a thread."""

import http.server
import json
import logging
import os
import threading
import time
import urllib.parse
import warnings

from huggingface_hub import HfApi
from huggingface_hub import constants
import numpy as np
import pytest
import safetensors.numpy

from vqt_jax import UserError
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import hub
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import read_config

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # Commits.
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


class Hub(http.server.ThreadingHTTPServer):
  """Serves `models`; how badly is up to the test."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.models = {"owner/name": {OLD: MODEL, NEW: MODEL}}
    self.branches = {"main": OLD, "v2": NEW}
    self.gated = False
    self.cut = []  # How many bytes to send of the next contents.
    self.statuses = []  # Answers to the next requests for content.
    self.fetched = []  # Contents that were sent.
    self.ranges = []  # That were asked for.
    self.tokens = set()
    self.sizes = True  # Are told in the listing.
    self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer(send=False)

  def do_GET(self):
    self._answer()

  def _answer(self, send=True):
    server = self.server
    server.tokens.add(self.headers.get("Authorization"))
    path = urllib.parse.urlsplit(self.path).path
    parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
    listing = parts[:2] == ["api", "models"]
    if listing:
      parts = parts[2:]
    name, rest = "/".join(parts[:2]), parts[2:]
    revision = rest[1] if len(rest) > 1 else "main"
    commits = server.models.get(name)
    if commits is None:
      return self._refuse(404, "RepoNotFound")
    commit = server.branches.get(revision, revision)
    if commit not in commits:
      return self._refuse(404, "RevisionNotFound")
    files = commits[commit]
    if listing:
      told = [
        {"rfilename": name} | ({"size": len(content)} if server.sizes else {})
        for name, content in files.items()
      ]
      return self._send(
        json.dumps({"id": name, "sha": commit, "siblings": told}).encode()
      )
    if server.gated:
      return self._refuse(401, "GatedRepo")
    if rest[2] not in files:
      return self._refuse(404, "EntryNotFound")
    if send and server.statuses:
      return self._refuse(server.statuses.pop(0), "")
    content = files[rest[2]]
    if send:
      server.fetched.append(rest[2])
    self._send(
      content if send else None,
      {
        "ETag": f'"{hash(content) % 2**64:064x}"',
        "X-Repo-Commit": commit,
        "Content-Length": str(len(content)),
      },
    )

  def _refuse(self, status, code):
    self.send_response(status)
    self.send_header("X-Error-Code", code)
    self.send_header("X-HF-Warning", "topic; a warning of the hub")
    self.send_header("Content-Length", "0")
    self.end_headers()

  def _send(self, content, headers=None):
    headers = headers or {"Content-Length": str(len(content))}
    status = 200
    if content is not None and (asked := self.headers.get("Range")):
      start = int(asked.removeprefix("bytes=").split("-")[0])
      total, content, status = len(content), content[start:], 206
      headers["Content-Length"] = str(len(content))
      headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
      self.server.ranges.append(asked)
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    if content is not None:
      whole = len(content)
      if "ETag" in headers and self.server.cut:
        whole = self.server.cut.pop(0)
        self.close_connection = True
      self.wfile.write(content[:whole])


@pytest.fixture
def server(monkeypatch, tmp_path):
  with Hub() as server:
    set_up(monkeypatch, server.address, tmp_path / "cache")
    threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    ).start()
    yield server
    server.shutdown()


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
  server.sizes, seen = False, []
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
  server.cut = []
  assert hub.fetch("hf://owner/name").read_bytes() == WEIGHTS
  assert server.fetched.count("config.json") == 1


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


@pytest.mark.parametrize("token", [TOKEN, f"{TOKEN}\x01"])
def test_the_token_is_sent_but_not_shown(server, monkeypatch, token):
  monkeypatch.setenv("HF_TOKEN", token)
  server.statuses = [403]
  text = bad("hf://owner/name", "refuses hf://owner/name|Illegal header")
  assert TOKEN not in text
  if token == TOKEN:
    assert server.tokens == {f"Bearer {TOKEN}"}


def test_nothing_is_printed(server, capfd, monkeypatch):
  levels = {n: logging.getLogger(n).level for n in ("huggingface_hub", "httpx")}
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    hub.fetch("hf://owner/name")
    server.cut = [10, 10]
    hub.fetch("hf://owner/name@v2")
    bad("hf://owner/gone", "no model")
  assert capfd.readouterr() == ("", "")
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
    "hf://../name",
    "hf://owner/..",
    "hf://owner/a--b",
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
  for load in (load_backbone, lambda s: read_config(s, image_size=224)):
    with pytest.raises(UserError, match="owner/name is not a ViT checkpoint"):
      load("owner/name")
  assert "model.safetensors" in server.fetched
