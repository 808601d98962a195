"""A bucket in memory, and a server of it that speaks Google's JSON API.

As much of it as gcsfs, TensorStore, google-cloud-storage and TensorFlow ask for
here.
"""

import base64
from collections.abc import Iterator
import contextlib
import hashlib
import http.server
import io
import itertools
import json
import pathlib
import re
import socketserver
import ssl
import sys
import threading
import urllib.parse

import trustme


class Refused(Exception):
  """Has a write answered with this status."""


class Server(http.server.ThreadingHTTPServer):
  """Serves the objects of one bucket; no other exists.

  Attributes:
    objects: by name.
    before_change: called with the name of each object before it is written; may
      raise `Refused`.
    written: names of the objects written, in order.
    refused: how the paths begin that nobody may ask for; "": none.
    disturb: called for each request with its method and path; returns "", a
      status to answer with, "cut": the connection ends instead, or "lost": it
      ends after all is done, but before the answer.
  """

  daemon_threads = True

  def __init__(self, bucket: str = "bucket"):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.bucket = bucket
    self.objects: dict[str, bytes] = {}
    self.generations: dict[str, int] = {}
    self.before_change = lambda name: None
    self.written: list[str] = []
    self.refused = ""
    self.disturb = lambda method, path: ""
    self.uploads: dict[str, tuple[str, bytearray]] = {}
    self.lock = threading.RLock()
    self.counter = itertools.count(1)
    self.address = f"http://127.0.0.1:{self.server_port}"
    # What leads the libraries here, and keeps them from asking for credentials.
    self.environment = {
      "STORAGE_EMULATOR_HOST": self.address,
      "TENSORSTORE_GCS_HTTP_URL": self.address,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "NO_GCE_CHECK": "true",
    }

  def handle_error(self, request, client_address):
    """Clients may leave before they have heard all."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  def copy_to(self, folder: pathlib.Path) -> pathlib.Path:
    """Writes all objects as files."""
    for name, content in self.objects.items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def serve() -> Iterator[Server]:
  with Server() as server:
    thread = threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    )
    thread.start()
    yield server
    server.shutdown()


@contextlib.contextmanager
def serve_tensorflow(
  server: Server, folder: pathlib.Path
) -> Iterator[dict[str, str]]:
  """Leads TensorFlow to a server as well; yields the environment for that.

  It asks Google's addresses and no others, through a proxy if there is one.

  Args:
    server: of the bucket.
    folder: gets the certificate of who signs for these addresses here.
  """
  authority = trustme.CA()
  authority.cert_pem.write_to_path(folder / "authority.pem")
  context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
  authority.issue_cert("*.googleapis.com").configure_cert(context)

  class Tunnel(socketserver.StreamRequestHandler):
    def handle(self):
      while self.rfile.readline().strip():
        pass
      self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
      with contextlib.suppress(ConnectionError, ssl.SSLError):
        with context.wrap_socket(self.connection, server_side=True) as secure:
          _Handler(secure, self.client_address, server)

  with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
    proxy.daemon_threads = True
    threading.Thread(
      target=proxy.serve_forever, args=(0.01,), daemon=True
    ).start()
    yield {
      "https_proxy": f"http://127.0.0.1:{proxy.server_address[1]}",
      "CURL_CA_BUNDLE": str(folder / "authority.pem"),
    }
    proxy.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
  """One connection."""

  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def log_message(self, *args):
    pass

  def _handle(self):
    url = urllib.parse.urlsplit(self.path)
    asked = dict(urllib.parse.parse_qsl(url.query))
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    match = re.fullmatch(
      r"/(download/|upload/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path
    )
    server = self.server
    with server.lock:
      disturbed = server.disturb(self.command, url.path)
      if disturbed in ("cut", "lost"):
        self.close_connection = True
      if disturbed == "cut":
        return None
      if disturbed == "lost":
        self.wfile = io.BytesIO()
      elif disturbed:
        return self._error(int(disturbed), "as the test wants it")
      if server.refused and url.path.startswith(server.refused):
        return self._error(403, "not for you")
      if self.headers["Host"].startswith("storage.googleapis.com"):
        name = urllib.parse.unquote(url.path).removeprefix(f"/{server.bucket}/")
        if name not in server.objects:
          return self._error(404, f"No such object: {server.bucket}/{name}")
        return self._content(name)
      if not match or match[2] != server.bucket:
        return self._error(404, "The specified bucket does not exist.")
      if url.path.startswith("/upload/"):
        return self._upload(asked, body)
      name = match[3] and urllib.parse.unquote(match[3])
      if name is None:
        return (
          self._list(asked)
          if "/o" in url.path[-2:]
          else self._json({"name": server.bucket, "kind": "storage#bucket"})
        )
      if name not in server.objects:
        return self._error(404, f"No such object: {server.bucket}/{name}")
      if not self._may_change(name, asked):
        return self._error(412, "conditionNotMet")
      if self.command == "DELETE":
        del server.objects[name]
        return self._answer(204, b"")
      if asked.get("alt") == "media" or match[1]:
        return self._content(name)
      return self._json(self._described(name))

  do_GET = do_POST = do_PUT = do_DELETE = _handle

  def _may_change(self, name, asked):
    now = self.server.generations[name] if name in self.server.objects else 0
    return int(asked.get("ifGenerationMatch", now)) == now

  def _list(self, asked):
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
    items, prefixes = [], set()
    for name in sorted(self.server.objects):
      if not name.startswith(prefix):
        continue
      if not asked.get("startOffset", "") <= name:
        continue
      if "endOffset" in asked and name >= asked["endOffset"]:
        continue
      head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
      if found:
        prefixes.add(prefix + head + found)
      else:
        items.append(self._described(name))
    self._json({"items": items, "prefixes": sorted(prefixes)})

  def _described(self, name):
    content = self.server.objects[name]
    return {
      "kind": "storage#object",
      "bucket": self.server.bucket,
      "name": name,
      "size": str(len(content)),
      "metageneration": "1",
      "generation": str(self.server.generations[name]),
      "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
      "updated": "2026-01-01T00:00:00.000Z",
      "timeCreated": "2026-01-01T00:00:00.000Z",
    }

  def _upload(self, asked, body):
    uploads = self.server.uploads
    if "upload_id" in asked:
      name, content = uploads[asked["upload_id"]]
      content += body
      if self.headers["Content-Range"].endswith("/*"):
        self.send_response(308)
        self.send_header("Range", f"bytes=0-{len(content) - 1}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return
      return self._store(name, bytes(content), asked)
    kind = asked["uploadType"]
    if kind == "resumable":
      name = asked.get("name") or json.loads(body)["name"]
      number = str(next(self.server.counter))
      uploads[number] = name, bytearray()
      self.send_response(200)
      path = urllib.parse.urlsplit(self.path).path
      self.send_header(
        "Location", f"{self.server.address}{path}?upload_id={number}"
      )
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    if kind == "media":
      return self._store(asked["name"], body, asked)
    mark = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1]
    parts = body.split(f"--{mark}".encode(), 2)
    described, content = (
      re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[1:]
    )
    content = content[: content.rindex(f"--{mark}--".encode())]
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    self._store(json.loads(described)["name"], content, asked)

  def _store(self, name, content, asked):
    if not self._may_change(name, asked):
      return self._error(412, "conditionNotMet")
    try:
      self.server.before_change(name)
    except Refused as e:
      return self._error(e.args[0], "as the test wants it")
    self.server.written.append(name)
    self.server.objects[name] = content
    self.server.generations[name] = next(self.server.counter)
    self._json(self._described(name))

  def _content(self, name):
    content, status = self.server.objects[name], 200
    headers = {"x-goog-generation": str(self.server.generations[name])}
    if asked := self.headers.get("Range"):
      start, end = asked.removeprefix("bytes=").split("-")
      size = len(content)
      first = int(start) if start else size - int(end)
      last = int(end) if start and end else size - 1
      if first >= size:
        return self._error(416, "Requested range not satisfiable")
      last = min(last, size - 1)
      content, status = content[first : last + 1], 206
      headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    self._answer(status, content, headers)

  def _json(self, value):
    headers = {"Content-Type": "application/json"}
    self._answer(200, json.dumps(value).encode(), headers)

  def _error(self, status, message):
    error = {"error": {"code": status, "message": message}}
    self._answer(status, json.dumps(error).encode())

  def _answer(self, status, content, headers=()):
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)
