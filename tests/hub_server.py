"""A server that answers as the Hugging Face hub does.

As much of it as huggingface_hub asks for here.
"""

from collections.abc import Iterator
import contextlib
import http.server
import json
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


@contextlib.contextmanager
def serve() -> Iterator[Server]:
  with Server() as server:
    threading.Thread(
      target=server.serve_forever, args=(0.01,), daemon=True
    ).start()
    yield server
    server.shutdown()
