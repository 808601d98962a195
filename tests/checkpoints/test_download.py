"""Checkpoints from afar: cached, checked, resumed. The world is a thread."""

import base64
import hashlib
import http.server
import json
import logging
import os
import re
import threading
import urllib.parse

import numpy as np
import pytest

from tests import faults
from tests import helpers
from vqt_jax import UserError
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import download
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import public
from vqt_jax.models import vit_config
from vqt_jax.runtime import locks

GOLDENS = helpers.GOLDENS / "bigvision"
CONTENT = bytes(range(256)) * 200


class Server(http.server.ThreadingHTTPServer):
  """Serves `files`; how badly is up to the test."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.files = {"/ckpt.npz": CONTENT}
    self.headers = {}
    self.ranges = True
    self.length = True
    self.statuses = []  # Answers to the next requests for content.
    self.cut = []  # How many bytes to send of the next contents.
    self.log = []  # Ranges asked for.
    self.credentials = set()  # That were sent, or None.
    self.redirect = ""  # Where everything is.
    self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  """GET and HEAD with ranges, and what gcsfs asks of Google's JSON API."""

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer(self.server.files.get(self.path), send=False)

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    path = urllib.parse.unquote(url.path)
    if path.startswith("/download/storage/v1/b/bucket/o/"):
      key = path.removeprefix("/download/storage/v1/b/bucket/o")
      self._answer(self.server.files.get(key))
    elif path.startswith("/storage/v1/b/bucket/o/"):
      content = self.server.files.get(
        path.removeprefix("/storage/v1/b/bucket/o")
      )
      described = content and self._object(path.split("/o/")[1], content)
      self._answer(described, plain=True)
    elif path == "/storage/v1/b/bucket/o":
      prefix = urllib.parse.parse_qs(url.query).get("prefix", [""])[0]
      items = [
        json.loads(self._object(name[1:], content))
        for name, content in self.server.files.items()
        if name[1:].startswith(prefix)
      ]
      self._answer(json.dumps({"items": items}).encode(), plain=True)
    else:
      self._answer(self.server.files.get(path))

  def _object(self, name, content):
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    return json.dumps(
      {
        "name": name,
        "size": str(len(content)),
        "generation": "1",
        "md5Hash": self.server.headers.get("Content-MD5", md5),
      }
    ).encode()

  def _answer(self, content, send=True, plain=False):
    server, status = self.server, 200
    server.credentials.add(self.headers.get("Authorization"))
    if server.redirect:
      self.send_response(302)
      self.send_header("Location", server.redirect)
      self.send_header("Content-Length", "0")
      return self.end_headers()
    if send and not plain and server.statuses:
      status = server.statuses.pop(0)
    if content is None or status >= 400:
      return self.send_error(404 if content is None else status)
    asked = self.headers.get("Range")
    if send and not plain:
      server.log.append(asked)
    if asked and server.ranges and not plain:
      start, end = asked.removeprefix("bytes=").split("-")
      content, status = content[int(start) : int(end) + 1], 206
    self.send_response(status)
    if server.length or plain:
      self.send_header("Content-Length", str(len(content)))
    for name, value in server.headers.items():
      self.send_header(name, value)
    self.end_headers()
    if send:
      cut = server.cut.pop(0) if server.cut and not plain else len(content)
      self.wfile.write(content[:cut])
    self.close_connection = True


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(download, "_SECONDS", 0.001)
  monkeypatch.setattr(download, "_CHUNK", 20_000)
  with Server() as server:
    thread = threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    )
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    yield server
    server.shutdown()


def fetch(server, cache, path="/ckpt.npz", **kwargs):
  return download.fetch(server.address + path, cache, **kwargs)


def leftovers(cache):
  return [p.name for p in cache.rglob("*.part")]


def test_downloads_once_and_reports_progress(server, tmp_path):
  seen = []
  path = fetch(server, tmp_path, progress=lambda *args: seen.append(args))
  assert path.read_bytes() == CONTENT
  assert seen == [(n, 51_200) for n in (20_000, 40_000, 51_200)]
  assert not leftovers(tmp_path)
  server.files.clear()
  assert fetch(server, tmp_path) == path  # From the cache.


def test_cache_from_environment(server, tmp_path, monkeypatch):
  monkeypatch.setenv("VQT_JAX_CACHE", str(tmp_path / "cache"))
  path = download.fetch(f"{server.address}/ckpt.npz")
  assert path.is_relative_to(tmp_path / "cache")


def test_same_names_of_two_places_do_not_meet(server, tmp_path):
  server.files["/a/ckpt.npz"] = b"another"
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert fetch(server, tmp_path, "/a/ckpt.npz").read_bytes() == b"another"


def test_address_cannot_leave_the_cache(server, tmp_path):
  server.files["/../../evil.npz"] = server.files["/evil.npz"] = b"content"
  cache = tmp_path / "a" / "b"
  path = fetch(server, cache, "/../../evil.npz").resolve()
  assert path.is_relative_to(cache.resolve())


def test_resumes_a_later_call_where_it_stopped(server, tmp_path):
  server.statuses = [200] + [503] * download._ATTEMPTS
  with pytest.raises(
    UserError, match="failed: .*503.*what has come so far is kept"
  ):
    fetch(server, tmp_path)
  assert not list(tmp_path.rglob("ckpt.npz"))
  assert len(leftovers(tmp_path)) == 1
  server.log.clear()
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.log == ["bytes=20000-39999", "bytes=40000-51199"]


def test_connection_cut_in_the_middle_is_taken_up(server, tmp_path):
  server.cut = [20_000, 7]
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert server.log.count("bytes=20000-39999") == 2
  assert server.log.count("bytes=0-19999") == 1


def test_gives_up_only_without_progress(server, tmp_path):
  # More failures than attempts, but each time something came.
  server.statuses = [503, 200, 503, 503, 200, 503, 503, 503]
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_changed_file_is_not_glued_to_the_old_part(server, tmp_path):
  server.headers["ETag"] = '"old"'
  server.statuses = [200] + [503] * download._ATTEMPTS
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  server.headers["ETag"] = '"new"'
  server.files["/ckpt.npz"] = CONTENT[::-1]
  assert fetch(server, tmp_path).read_bytes() == CONTENT[::-1]
  assert not leftovers(tmp_path)


@pytest.mark.parametrize("length", [True, False])
def test_server_without_ranges(server, tmp_path, length):
  server.ranges, server.length = False, length
  done = [0]
  path = fetch(server, tmp_path, progress=lambda count, _: done.append(count))
  assert path.read_bytes() == CONTENT
  assert np.diff(done).max() <= download._CHUNK  # Never all in memory.


def test_a_server_that_never_ends(server, tmp_path, monkeypatch):
  server.length = False
  monkeypatch.setattr(download, "_MOST", 45_000)
  with pytest.raises(UserError, match="sends more than 45,000 bytes, and does"):
    fetch(server, tmp_path)
  server.ranges = False
  described = lambda *args: (30_000, "0123", {})
  monkeypatch.setattr(download, "_describe", described)
  assert fetch(server, tmp_path).read_bytes() == CONTENT[:30_000]


def test_server_without_ranges_resumes(server, tmp_path):
  server.statuses = [200] + [503] * download._ATTEMPTS
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  server.ranges = False
  server.log.clear()
  assert fetch(server, tmp_path).read_bytes() == CONTENT
  assert len(server.log) == 1


@pytest.mark.parametrize(
  "headers",
  [
    {"Content-MD5": base64.b64encode(hashlib.md5(b"x").digest()).decode()},
    {"Digest": "SHA-256=" + base64.b64encode(b"0" * 32).decode()},
  ],
)
def test_wrong_checksum_is_refused(server, tmp_path, headers):
  server.headers = headers
  with pytest.raises(UserError, match="checksum is not the server's"):
    fetch(server, tmp_path)
  assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_right_checksum_is_accepted(server, tmp_path):
  md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
  server.headers = {"Content-MD5": md5, "Digest": f"md5={md5},unixsum=30637"}
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_wrong_size_is_refused(server, tmp_path, monkeypatch):
  describe = download._describe
  longer = lambda *args: (len(CONTENT) + 1, *describe(*args)[1:])
  monkeypatch.setattr(download, "_describe", longer)
  with pytest.raises(UserError, match="51200 bytes came instead of 51201"):
    fetch(server, tmp_path)
  assert not list(tmp_path.rglob("ckpt.npz"))


def test_part_that_is_too_long_is_thrown_away(server, tmp_path):
  server.statuses = [200] + [503] * download._ATTEMPTS
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  (part,) = tmp_path.rglob("*.part")
  part.write_bytes(CONTENT + b"x")
  assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_missing_file(server, tmp_path):
  with pytest.raises(UserError, match="no file http://.*/none.npz"):
    fetch(server, tmp_path, "/none.npz")
  assert not list(tmp_path.iterdir())


def test_no_server(tmp_path, monkeypatch):
  monkeypatch.setattr(download, "_SECONDS", 0.001)
  with pytest.raises(UserError, match="failed: Cannot connect"):
    download.fetch("http://127.0.0.1:9/ckpt.npz", tmp_path)


def test_unknown_scheme(tmp_path):
  with pytest.raises(UserError, match="https:// or gs://"):
    download.fetch("ftp://host/ckpt.npz", tmp_path)


def test_unwritable_cache(server, tmp_path):
  (tmp_path / "cache").write_text("a file, not a folder")
  with pytest.raises(UserError, match="Cannot write .*VQT_JAX_CACHE"):
    fetch(server, tmp_path / "cache")


def test_full_disk(server, tmp_path, monkeypatch):
  full = lambda path, wait: open("/dev/full", "wb", buffering=0)
  monkeypatch.setattr(download.locks, "open_locked", full)
  with pytest.raises(
    UserError, match="No space left on device. Free some space.*cache_dir"
  ):
    fetch(server, tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_a_step_that_fails(server, tmp_path, old):
  """Also where the part of an older version of the file has to go."""
  number = 0
  while not number or number <= faults.FAULTS.count:
    number += 1
    cache = tmp_path / str(number)
    if old:
      (cache / "a").mkdir(parents=True)
      (fetch(server, cache).parent / "ckpt.npz.0123.part").write_bytes(b"x")
      fetch(server, cache).unlink()
    with faults.FAULTS.below(cache, fail=number):
      try:
        fetch(server, cache)
      except UserError as e:
        assert str(e).startswith(f"Cannot write {cache}")
        assert "VQT_JAX_CACHE" in str(e)
    assert fetch(server, cache).read_bytes() == CONTENT
  assert number > 3


def test_two_downloads_at_once(server, tmp_path):
  paths = []
  threads = [
    threading.Thread(target=lambda: paths.append(fetch(server, tmp_path)))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [p.read_bytes() for p in paths] == [CONTENT] * 4
  assert not leftovers(tmp_path)


def test_a_part_that_goes_while_one_waits_for_it(tmp_path, monkeypatch):
  """The other process has completed it, or has thrown it away."""
  part, asked = tmp_path / "x.part", []

  def wait(file, how):
    asked.append(how)
    if len(asked) == 1:
      part.unlink()

  monkeypatch.setattr(locks.fcntl, "flock", wait)
  with locks.open_locked(part, wait=True) as out:
    out.write(b"x")
  assert len(asked) == 2 and part.read_bytes() == b"x"


@pytest.mark.parametrize(
  "address",
  ["gs://bucket/d/x.npz", "https://storage.googleapis.com/bucket/d/x.npz"],
)
def test_bucket(server, tmp_path, address):
  server.files["/d/x.npz"] = CONTENT
  path = download.fetch(address, tmp_path)
  assert path == tmp_path / "storage.googleapis.com/bucket/d/x.npz"
  assert path.read_bytes() == CONTENT
  server.files.clear()
  assert download.fetch(address, tmp_path) == path  # From the cache.


def test_bucket_checksum(server, tmp_path):
  server.headers["Content-MD5"] = base64.b64encode(b"0" * 16).decode()
  with pytest.raises(UserError, match="md5 checksum is not the server's"):
    download.fetch("gs://bucket/ckpt.npz", tmp_path)


def test_crc32c(tmp_path):
  (tmp_path / "x").write_bytes(b"123456789")
  assert download._digest(tmp_path / "x", "crc32c").hex() == "e3069283"


def test_missing_in_bucket(server, tmp_path):
  with pytest.raises(UserError, match="no file gs://bucket/none.npz"):
    download.fetch("gs://bucket/none.npz", tmp_path)


def test_bucket_that_cannot_be_reached(tmp_path, monkeypatch, capsys, caplog):
  def down(*args, **kwargs):
    logging.getLogger("gcsfs").exception("noise")
    raise ConnectionError("no route to host")

  monkeypatch.setattr(download, "_request", down)
  with pytest.raises(UserError, match="cannot be reached: no route to host"):
    download.fetch("gs://bucket/x.npz", tmp_path)
  assert not caplog.records and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint.bv", "checkpoint.bv-000000005"])
def test_folder_in_bucket(server, tmp_path, name):
  folder = GOLDENS / "bv_ts"
  for file in folder.rglob("*"):
    if file.is_file():
      server.files[f"/run/{file.relative_to(folder)}"] = file.read_bytes()
  path = download.fetch(f"gs://bucket/run/{name}", tmp_path)
  assert path.name == "checkpoint.bv-000000005"
  names = containers.leaf_names(path)
  assert "params/embedding/kernel" in names
  assert not any(name.startswith(("opt/", "chrono/")) for name in names)
  local = containers.read_leaves(folder / "checkpoint.bv-000000005", names)
  for leaf, array in containers.read_leaves(path, names).items():
    np.testing.assert_array_equal(array, local[leaf])
  assert not leftovers(tmp_path)


def test_public_name_sets_everything(server, tmp_path, monkeypatch):
  content = (GOLDENS / "bv_map_scan.npz").read_bytes()
  server.files["/bv_map_scan.npz"] = content
  known = public.PublicViT(
    f"{server.address}/bv_map_scan.npz:img", "S/8", 37, "map", "exact", "0..1"
  )
  monkeypatch.setitem(public.PUBLIC, "Test S/8 37", known)
  monkeypatch.setitem(vit_config.VARIANTS, "S", (32, 3, 96, 4))
  backbone = load_backbone("test s/8 37", cache_dir=tmp_path)
  config = backbone.config
  assert not backbone.assumed
  assert (config.pool_type, config.gelu, config.variant) == (
    "map",
    "exact",
    "S/8",
  )
  assert config.image_size == (37, 37) and config.grid == (4, 4)
  assert backbone.value_range == "0..1"
  assert os.listdir(tmp_path)


@pytest.mark.parametrize(
  "source, place, subtree",
  [
    ("ckpt.npz", "ckpt.npz", ""),
    ("ckpt.npz:img", "ckpt.npz", "img"),
    ("a/ckpt.npz:a/b", "a/ckpt.npz", "a/b"),
    ("a:b/ckpt.npz:img", "a:b/ckpt.npz", "img"),
    ("gs://b/d/x.npz", "gs://b/d/x.npz", ""),
    ("gs://b/d/x.npz:img", "gs://b/d/x.npz", "img"),
    ("gs://b/run/checkpoint.bv:img", "gs://b/run/checkpoint.bv", "img"),
    ("https://host:80/x.npz", "https://host:80/x.npz", ""),
    ("https://host:80/x", "https://host:80/x", ""),
    ("https://host:80/x.npz:img", "https://host:80/x.npz", "img"),
  ],
)
def test_subtree_of_a_source(source, place, subtree):
  assert containers.split_subtree(source) == (place, subtree)


def test_colon_in_an_existing_name_is_no_subtree(tmp_path):
  path = tmp_path / "a:b"
  path.touch()
  assert containers.split_subtree(str(path)) == (str(path), "")


@pytest.mark.parametrize(
  "source, shown",
  [
    ("https://u:pw@h/x.npz?token=1", "https://h/x.npz"),
    ("https://u:pw@h/x.npz:img?a=b:c", "https://h/x.npz"),
    ("http://u@h:80/x", "http://h:80/x"),
    ("HTTPS://h/x?pw", "HTTPS://h/x"),
    ("ftp://u:pw@h/x", "ftp://h/x"),
    ("https://u:p@w@h/x/y@z", "https://h/x/y@z"),
    ("https://h?pw", "https://h"),
    ("https://u:pw@[::1/x", "https://[::1/x"),
  ],
)
def test_secrets_of_an_address_are_not_shown(source, shown):
  found = download.without_secrets(source)
  place, subtree = containers.split_subtree(found)
  assert place[:-8] == f"{shown}#" and ("pw" not in found)
  assert subtree == ("img" if ":img" in source else "")
  assert download.without_secrets(found) == found


@pytest.mark.parametrize(
  "source",
  [
    "a/b.npz",
    "gs://b/x?y@z",
    "https://h/x.npz:img",
    "https://h/x@y#z",
    "howto-i21k-B/16",
  ],
)
def test_other_sources_are_shown_as_they_are(source):
  assert download.without_secrets(source) == source


@pytest.mark.parametrize("password", ["a/b", "1/b", "a?b", "a#b:img", "/@b"])
def test_a_password_that_looks_like_a_path(tmp_path, password):
  source = f"https://me:x{password}@host/x.npz"
  shown = download.without_secrets(source)
  assert re.fullmatch(r"https://host/x\.npz#[0-9a-f]{8}", shown)
  with pytest.raises(UserError, match="Write %2F in place of /") as caught:
    download.fetch(source, tmp_path)
  assert password not in str(caught.value) and not [*tmp_path.iterdir()]


def test_a_hash_tells_addresses_apart():
  shown = [
    download.without_secrets(f"https://{user}h/x{query}")
    for user in ("", "a:pw@", "b:pw@")
    for query in ("", "?1", "?2")
  ]
  assert len(set(shown)) == 9
  assert download.without_secrets("https://a:other@h/x") == shown[3]


def test_secrets_are_neither_stored_nor_told(server, tmp_path):
  root = server.address.replace("//", "//user:pw@")
  told = []
  for name in ("ckpt.npz", "gone.npz"):
    with pytest.raises(UserError) as caught:
      load_backbone(f"{root}/{name}?token=t0k", cache_dir=tmp_path)
    told.append(str(caught.value))
  server.files["/503.npz"] = CONTENT
  server.statuses = [503] * 99
  with pytest.raises(UserError, match="503") as caught:
    load_backbone(f"{root}/503.npz?token=t0k", cache_dir=tmp_path)
  told += [str(caught.value), repr(caught.value.__cause__)]
  told += [path.name for path in tmp_path.rglob("*")]
  assert len(told) > 4
  assert not [text for text in told if "pw" in text or "t0k" in text]


def test_http_and_https_share_no_file(server, tmp_path):
  path = fetch(server, tmp_path)
  other = tmp_path / path.relative_to(tmp_path).as_posix().replace(
    "http%3A%2F%2F", ""
  )
  assert other != path
  other.parent.mkdir()
  other.write_bytes(b"from https")
  address = server.address.replace("http", "https") + "/ckpt.npz"
  assert download.fetch(address, tmp_path) == other


def test_netrc_is_for_https_and_one_host(server, tmp_path, monkeypatch):
  (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw")
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  fetch(server, tmp_path)
  assert server.credentials == {None}
  web = download._web("https://127.0.0.1:80/x?y")
  basic = "Basic " + base64.b64encode(b"me:pw").decode()
  assert web.kwargs["headers"]["Authorization"] == basic
  for other in ("http://127.0.0.1/", "https://h/127.0.0.1", "https://u@h/"):
    assert "Authorization" not in download._web(other).kwargs["headers"]


def test_credentials_stay_with_their_host(server, tmp_path):
  with Server() as other:
    threading.Thread(
      target=other.serve_forever, args=(0.01,), daemon=True
    ).start()
    server.redirect = f"{other.address}/ckpt.npz"
    address = server.address.replace("//", "//me:pw@") + "/moved.npz"
    assert download.fetch(address, tmp_path).read_bytes() == CONTENT
    assert None not in server.credentials
    assert other.credentials == {None}
    other.shutdown()


def test_proxies_are_heeded(server, tmp_path, monkeypatch):
  monkeypatch.setenv("http_proxy", server.address.replace("//", "//me:pw@"))
  for path in ("http://nowhere.test/x.npz", "/x.npz"):  # HEAD and GET.
    server.files[path] = CONTENT
  path = download.fetch("http://nowhere.test/x.npz", tmp_path)
  assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
  "name", ["../../../evil.pth", "..", "a\\b", "/evil", "a//b"]
)
def test_names_in_a_bucket_stay_in_the_cache(server, tmp_path, name):
  server.files[f"/ck.bv-1/params~x/{name}"] = b"evil"
  before = set(tmp_path.rglob("*"))
  cache = tmp_path / "a" / "b" / "c" / "d"
  with pytest.raises(UserError, match="stays in that folder"):
    download.fetch("gs://bucket/ck.bv-1", cache)
  new = set(tmp_path.rglob("*")) - before
  assert all(p.is_relative_to(cache) or cache.is_relative_to(p) for p in new)


@pytest.mark.parametrize("step", [b"../../1", b"1/..", b"\xff\n1", b"x" * 999])
def test_a_pointer_stays_in_the_cache(server, tmp_path, step):
  server.files["/ck.bv-LAST"] = step
  with pytest.raises(UserError):
    download.fetch("gs://bucket/ck.bv", tmp_path)


def test_a_planted_link_is_not_followed(server, tmp_path):
  server.statuses = [200] + [503] * download._ATTEMPTS
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  (part,) = tmp_path.rglob("*.part")
  part.unlink()
  part.symlink_to(tmp_path / "theirs")
  (tmp_path / "theirs").write_bytes(b"")
  with pytest.raises(UserError, match="is a link"):
    fetch(server, tmp_path)
  assert (tmp_path / "theirs").read_bytes() == b""


@pytest.mark.parametrize(
  "headers",
  [
    {"Digest": "shake_128=AAAA"},
    {"Digest": "=,=,md5"},
    {"Content-MD5": "?"},
    {"Content-Range": "x"},
    {"ETag": "\x1b[2J"},
  ],
)
def test_odd_headers(server, tmp_path, headers):
  server.headers, server.length = headers, "Content-Range" not in headers
  try:
    assert fetch(server, tmp_path).read_bytes() == CONTENT
  except UserError as e:
    assert str(e).isprintable()
