"""`vqt-jax serve`: it begins, ends, and says what is wrong."""

import importlib.util
import os
import re
import signal
import socket
import threading
import urllib.request

import pytest

from tests import helpers
from vqt_jax import serve


@pytest.fixture(scope="module", autouse=True)
def few_batch_sizes():
  with helpers.few_batch_sizes():
    yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with two bundles on one backbone, and one on another."""
  place = tmp_path_factory.mktemp("place")
  for name, seed in (("a", 0), ("b", 0), ("other", 1)):
    source = place / f"vit{seed}.npz"
    helpers.write_linear_bundle(place / name, source, seed)
  return place


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_ends_well(
  place, monkeypatch, capsys, number
):
  monkeypatch.chdir(place)
  before, said = signal.getsignal(number), []
  run = serve.server.make_server

  def watched(*args):
    server = run(*args)

    def visit():
      while not server.started:
        pass
      port = server.servers[0].sockets[0].getsockname()[1]
      with urllib.request.urlopen(f"http://127.0.0.1:{port}/models") as page:
        said.append(page.read())
      os.kill(os.getpid(), number)

    threading.Thread(target=visit, daemon=True).start()
    return server

  monkeypatch.setattr("vqt_jax.serving.server.make_server", watched)
  with pytest.raises(SystemExit) as ended:
    serve.main(["serve", "a", "b", "--port=0"])
  assert not ended.value.code
  assert b'"name": "a"' in said[0] and b'"name": "b"' in said[0]
  assert signal.getsignal(number) == before
  lines = capsys.readouterr().err.splitlines()
  assert re.match(r"ready +http://127.0.0.1:\d+ ", lines[3])
  assert re.fullmatch(r".*GET /models  200  .* s", lines[4])


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "No run given"),
    (["none"], "none holds no tuned model: there is no such folder"),
    (["a", "none"], "none holds no tuned model"),
    (["a", "a"], "found one twice"),
    (["a", "other"], "other was trained on other weights than .*vit0.npz"),
    (["a", "--backbone=none.npz"], "none.npz is neither a file"),
    (["a", "--port=99999"], "port"),
    (["a", "--images=0"], "images"),
    (["a", "--host=no.such.host.invalid"], "--host no.such.host.invalid"),
    (["a", "--host=192.0.2.1"], "Cannot assign requested address"),
    (["a", "--prot=1"], "prot"),
  ],
)
def test_mistakes(place, monkeypatch, capsys, arguments, words):
  monkeypatch.chdir(place)
  assert serve.main(["serve", "--port=0", *arguments]) == 2
  *notes, line = capsys.readouterr().err.strip().splitlines()
  assert re.search(f"error: .*{words}", line), line
  assert all(note.startswith("compile") for note in notes)


def test_a_port_in_use(place, capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert serve.main(["serve", str(place / "a"), f"--port={port}"]) == 2
  assert "Address already in use. Name an" in capsys.readouterr().err


def test_without_the_extra(place, monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *args: None if name == "starlette" else find(name, *args),
  )
  assert serve.main(["serve", str(place / "a")]) == 2
  assert "packages: pip install starlette uv" in capsys.readouterr().err
