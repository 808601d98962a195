"""`vqt-jax share`: bundles to the hub, which is a thread here."""

import json
import re

from huggingface_hub import constants
import numpy as np
import pytest

from tests import helpers
from tests import hub_server
from tests.checkpoints import test_hub
import vqt_jax
from vqt_jax import share

TOKEN = test_hub.TOKEN
FILES = ["README.md", "bundle.json", "model.safetensors"]
PIXELS = np.random.default_rng(0).integers(0, 255, (1, 12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp("place")
  helpers.write_linear_bundle(place / "run" / "tuned", place / "vit.npz")
  (place / "run" / "tuned" / "notes.txt").write_text("not uploaded")
  return place


@pytest.fixture
def hub(monkeypatch, tmp_path, place):
  monkeypatch.chdir(place)
  with hub_server.serve() as server:
    test_hub.set_up(monkeypatch, server.address, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server


def refused(capsys, *arguments):
  """The sentence of an error, on one line and without the token."""
  assert share.main(["share", *arguments]) == 2
  out, said = capsys.readouterr()
  assert out == "" and len(said.splitlines()) == 1 and TOKEN not in said
  return said


def test_a_bundle_comes_back_from_the_hub(hub, capsys):
  assert share.main(["share", "run", "--to=hf://me/birds"]) == 0
  out, said = capsys.readouterr()
  assert said == "" and f"{hub.address}/me/birds (private)" in out
  assert 'vqt_jax.load("hf://me/birds")' in out and "vit.npz" in out
  assert f"Bearer {TOKEN}" in hub.tokens and hub.private == {"me/birds"}
  files = hub.models["me/birds"][hub_server.OLD]
  assert sorted(files) == FILES
  assert b'load("hf://me/birds")' in files["README.md"]
  found = vqt_jax.load("hf://me/birds", backbone="vit.npz")
  expected = vqt_jax.load("run", backbone="vit.npz").logits(PIXELS)
  np.testing.assert_array_equal(found.logits(PIXELS), expected)


def test_a_bundle_is_replaced_and_stays_as_public_as_it_was(hub, capsys):
  share.main(["share", "run", "--to=hf://me/birds", "--public"])
  assert "(public)" in capsys.readouterr().out and not hub.private
  said = refused(capsys, "run", "--to=hf://me/birds")
  assert "hf://me/birds is public already: add --public" in said
  files = hub.models["me/birds"][hub_server.OLD]
  files["bundle.json"] = b"{}"
  share.main(["share", "run/tuned", "--to=hf://me/birds", "--public"])
  files = hub.models["me/birds"][hub_server.OLD]
  assert json.loads(files["bundle.json"])["task"] == "squares"


def test_other_models_are_not_written_over(hub, capsys):
  files = {"config.json": b"{}", "model.safetensors": b"mine"}
  hub.models["me/vit"] = {hub_server.OLD: files}
  said = refused(capsys, "run", "--to=hf://me/vit", "--public")
  assert "hf://me/vit has other files (config.json)" in said
  assert files["model.safetensors"] == b"mine"


@pytest.mark.parametrize(
  "status, words",
  [
    (401, r"the token is refused \(401\)"),
    (403, r"role `write`, of a user who is me or belongs"),
    (404, r"no such owner, or no model any more \(404\)"),
    (409, r"there already and not yours, or was changed just now \(409\)"),
    (500, "Try again: all files appear together"),
  ],
)
def test_the_hub_refuses(hub, capsys, status, words):
  hub.refuses = status
  said = refused(capsys, "run", "--to=hf://me/birds")
  assert f"Cannot write hf://me/birds at {hub.address}: " in said
  assert re.search(words, said) and not hub.models


def test_no_hub(hub, capsys, monkeypatch):
  hub.shutdown()
  hub.server_close()
  said = refused(capsys, "run", "--to=hf://me/birds")
  assert "Cannot write hf://me/birds at http://127.0.0.1" in said
  test_hub.offline(monkeypatch)
  said = refused(capsys, "run", "--to=hf://me/birds")
  assert "HF_HUB_OFFLINE forbids it" in said


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["run"], "Expected --to. Usage: RUN"),
    (["--to=hf://a/b"], "Expected one run. Usage: RUN"),
    (["run", "run", "--to=hf://a/b"], "Expected one run"),
    (["none", "--to=hf://a/b"], "none holds no tuned model"),
    (["run", "--to=a/b"], "Cannot use 'a/b': expected hf://OWNER/NAME"),
    (["run", "--to=hf://a"], "Cannot use 'hf://a': expected hf://OWNER/NAME"),
    (["run", "--to=hf://a/b@v1"], "without @v1, as the main branch"),
  ],
)
def test_mistakes(hub, capsys, arguments, words):
  assert words in refused(capsys, *arguments)
  assert not hub.tokens


def test_without_a_token(hub, capsys, monkeypatch):
  monkeypatch.delenv("HF_TOKEN")
  said = refused(capsys, "run", "--to=hf://me/birds")
  assert "needs a token: run `hf auth login`" in said and not hub.tokens
