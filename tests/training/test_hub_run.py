"""A run from nothing but the name of a model on the hub."""

import signal

from huggingface_hub import constants

import main
from tests import helpers
from tests import hub_server
from tests import runs
import vqt_jax


def test_a_run_by_name(material, tmp_path, monkeypatch):
  """It is resumed, and its bundle finds its backbone, without the hub."""
  folder = helpers.GOLDENS / "foreign" / "hf_dinov3_gated"
  files = {
    name: (folder / name).read_bytes()
    for name in ("config.json", "model.safetensors")
  }
  changes = {"epochs": 2, "lr": 0.1, "seeds": 7}
  argv = runs.command(
    material, tmp_path / "run", init="owner/vit", image_size=16, **changes
  )
  with hub_server.serve() as hub:
    hub.models["owner/vit"] = {hub_server.OLD: files | {"a.bin": b""}}
    process = runs.Process(
      argv,
      signals={"vqt_jax.training.step:train_steps": (1, signal.SIGTERM)},
      environment={
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
      },
    )
    assert process.wait() == 75, process.said()
    assert sorted(hub.fetched) == sorted(files)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  assert main.main(argv) == 0
  model = vqt_jax.load(tmp_path / "run")
  backbone = model.info["backbone"]
  assert backbone["source"] == "owner/vit"
  assert backbone["revision"] == hub_server.OLD
  assert backbone["sha256"] == vqt_jax.load_backbone(folder).identity
