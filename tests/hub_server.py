"""A server that answers as the Hugging Face hub does.

As much of it as huggingface_hub asks for here; writes go to `OLD`.
"""

import base64
from collections.abc import Iterator
import contextlib
import http.server
import json
import re
import sys
import threading
import urllib.parse

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # Commits.


class Server(http.server.ThreadingHTTPServer):
  """Serves models; how badly is up to the test.

  Attributes:
    models: OWNER/NAME -> commit -> name of a file -> content.
    branches: name -> commit, of all models.
    gated: whether conditions of all models are to be accepted.
    tells_sizes: whether it does when it lists files.
    cut: how many bytes to send of the next contents.
    statuses: answers to the next requests for contents.
    fetched: names of the files sent.
    ranges: that were asked for.
    tokens: that were sent, or None.
    private: names of the models that are.
    refuses: status of the answer to whatever is to be written; 0: it is.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.models: dict[str, dict[str, dict[str, bytes]]] = {}
    self.branches = {"main": OLD, "v2": NEW}
    self.gated, self.tells_sizes = False, True
    self.cut: list[int] = []
    self.statuses: list[int] = []
    self.fetched: list[str] = []
    self.ranges: list[str] = []
    self.tokens: set[str | None] = set()
    self.private: set[str] = set()
    self.refuses = 0
    self.uploads: dict[str, bytes] = {}
    self.address = f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, request, client_address):
    """Clients may leave before they have heard all."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer(send=False)

  def do_GET(self):
    self._answer()

  def do_POST(self):
    server = self.server
    server.tokens.add(self.headers.get("Authorization"))
    body = self._body()
    path = self.path.split("?")[0]
    if path == "/api/validate-yaml":
      return self._tell({})
    if server.refuses:
      return self._refuse(server.refuses, "")
    if path == "/api/repos/create":
      asked = json.loads(body)
      name = f"{asked['organization']}/{asked['name']}"
      server.models[name] = {OLD: {}}
      if asked.get("private") or asked.get("visibility") == "private":
        server.private.add(name)
      return self._tell({"url": f"{server.address}/{name}"})
    if path.endswith(".git/info/lfs/objects/batch"):
      objects = json.loads(body)["objects"]
      for each in objects:
        place = f"{server.address}/lfs/{each['oid']}"
        each["actions"] = {"upload": {"href": place}}
      return self._tell({"transfer": "basic", "objects": objects})
    name, action = re.fullmatch(
      "/api/models/(.*/.*)/(preupload|commit)/main", path
    ).groups()
    if action == "preupload":
      names = [each["path"] for each in json.loads(body)["files"]]
      mode = lambda name: "lfs" if "safetensors" in name else "regular"
      told = [
        {"path": n, "uploadMode": mode(n), "shouldIgnore": False} for n in names
      ]
      return self._tell({"files": told})
    files = server.models[name][OLD]
    for line in body.splitlines():
      operation = json.loads(line)
      value = operation["value"]
      if operation["key"] == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif operation["key"] == "lfsFile":
        files[value["path"]] = server.uploads[value["oid"]]
    self._tell({"commitUrl": f"{self.path}/{OLD}", "commitOid": OLD})

  def do_PUT(self):
    self.server.uploads[self.path.rpartition("/")[2]] = self._body()
    self._tell({})

  def _body(self):
    return self.rfile.read(int(self.headers["Content-Length"]))

  def _tell(self, value):
    self._send(json.dumps(value).encode())

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
        {"rfilename": name}
        | ({"size": len(content)} if server.tells_sizes else {})
        for name, content in files.items()
      ]
      private = name in server.private
      return self._tell(
        {"id": name, "sha": commit, "siblings": told, "private": private}
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


@contextlib.contextmanager
def serve() -> Iterator[Server]:
  with Server() as server:
    threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    ).start()
    yield server
    server.shutdown()
