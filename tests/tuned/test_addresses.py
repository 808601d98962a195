"""Bundles at addresses answer as local ones do; servers here are threads."""

import functools
import http.server
import json
import re
import threading

import numpy as np
import PIL.Image
import pytest

from tests import bucket
from tests import helpers
from tests import hub_server
from tests.checkpoints import test_hub
import vqt_jax
from vqt_jax import evaluate
from vqt_jax import predict
from vqt_jax.runtime import files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with `run/tuned`, the backbone, and a labelled image."""
  place = tmp_path_factory.mktemp("place")
  helpers.write_linear_bundle(place / "run" / "tuned", place / "vit.npz")
  (place / "images" / "class 0").mkdir(parents=True)
  pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), np.uint8)
  PIL.Image.fromarray(pixels).save(place / "images" / "class 0" / "1.png")
  return place


@pytest.fixture
def expected(place):
  model = vqt_jax.load(place / "run", backbone=place / "vit.npz")
  return model.logits(place / "images" / "class 0" / "1.png")


@pytest.fixture
def address(request, monkeypatch, tmp_path, place):
  """The address of the bundle in a bucket, on the web, or on the hub."""
  monkeypatch.setenv("VQT_JAX_CACHE", str(tmp_path / "cache"))
  names = ("bundle.json", "model.safetensors", "README.md")
  contents = {n: (place / "run" / "tuned" / n).read_bytes() for n in names}
  if request.param == "gs":
    with bucket.serve() as server:
      for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
      for name, content in contents.items():
        files.write(files.path(f"gs://bucket/run/tuned/{name}"), content)
      yield "gs://bucket/run"
  elif request.param == "hf":
    with hub_server.serve() as server:
      server.models["owner/name"] = {hub_server.OLD: contents}
      test_hub.set_up(monkeypatch, server.address, tmp_path / "hub")
      yield "hf://owner/name"
  else:
    handler = functools.partial(_Quiet, directory=place)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
      threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
      ).start()
      yield f"http://127.0.0.1:{server.server_port}/run/tuned/"
      server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.mark.parametrize("address", ["gs", "http", "hf"], indirect=True)
def test_a_bundle_is_used_as_if_it_was_here(
  address, place, expected, capsys, monkeypatch
):
  monkeypatch.chdir(place)
  image, backbone = "images/class 0/1.png", "--backbone=vit.npz"
  found = vqt_jax.load(address, backbone="vit.npz").logits(image)
  np.testing.assert_array_equal(found, expected)
  assert predict.main(["predict", address, image, backbone]) == 0
  assert image in capsys.readouterr().out
  assert evaluate.main(["evaluate", address, "images", backbone]) == 0
  assert "1 images" in capsys.readouterr().out
  # Its backbone is not fetched, as little as that of a local one.
  assert predict.main(["predict", address, image]) == 2
  assert "'vit.npz', which is not at hand" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["http"], indirect=True)
def test_what_lies_around_a_copy_is_no_run(address, tmp_path, monkeypatch):
  """A config that came from the same server does not choose what is read."""
  vqt_jax.load(address, backbone=helpers.tiny_backbone(depth=1))
  (copy,) = (tmp_path / "cache").rglob("run")
  (copy / "config.json").write_text(json.dumps({"init": "hf://x/y"}))
  fetched = []
  monkeypatch.setattr(
    "vqt_jax.checkpoints.load.hub.fetch", lambda *args: fetched.append(args)
  )
  with pytest.raises(vqt_jax.UserError, match="not at hand"):
    vqt_jax.load(address)
  assert not fetched


@pytest.mark.parametrize("address", ["hf"], indirect=True)
def test_a_model_of_the_hub_that_is_no_bundle(address, monkeypatch):
  with pytest.raises(vqt_jax.UserError, match="There is no model owner/other"):
    vqt_jax.load("hf://owner/other")
  with pytest.raises(vqt_jax.UserError, match="no revision 'v2'"):
    vqt_jax.load(f"{address}@v2")


@pytest.mark.parametrize("address", ["http"], indirect=True)
@pytest.mark.parametrize(
  "ending, words",
  [("none", "There is no file .*/none/bundle.json"), ("?a=b", "without pass")],
)
def test_addresses_without_a_bundle(address, ending, words, capsys):
  assert predict.main(["predict", address + ending, "x.png"]) == 2
  assert re.search(words, capsys.readouterr().err)
