"""ViTs of transformers, timm and OpenCLIP compute what these computed."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests import helpers
from vqt_jax import checkpoints
from vqt_jax.models import vit

GOLDENS = helpers.GOLDENS / "foreign"
NAMES = sorted(each.name for each in GOLDENS.iterdir() if each.is_dir())
# Pooled by what is not read here, or before a final LayerNorm.
NOT_COMPARED = {
  "hf_vit": ("pooled",),
  "timm_vit_avg": ("encoded",),
  **dict.fromkeys(
    ("hf_clip", "hf_clip_gelu", "hf_clip_two_towers"), ("encoded",)
  ),
}


def load(name, folder=GOLDENS, **settings):
  if name.startswith("timm"):  # Their config is that of larger models.
    settings.setdefault("num_heads", 2)
  return checkpoints.load_backbone(folder / name, **settings)


def expected(name):
  with np.load(GOLDENS / name / "expected.npz") as file:
    return dict(file)


def run(backbone, images):
  model = vit.ViT(backbone.config)
  apply = jax.jit(
    lambda params, x: model.apply({"params": params}, x, collect=("blocks",))
  )
  return apply(backbone.params, images)


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_its_library_does(name):
  golden = expected(name)
  images = golden["images"]
  backbone = load(name, image_size=images.shape[1:3])
  stream = run(backbone, images)
  found = {
    "blocks": stream.blocks,
    "encoded": stream.encoded,
    "pooled": stream.final,
    "logits": stream.logits,
  }
  if "projected" in golden:
    file = GOLDENS / name / "open_clip_model.safetensors"
    projection = safetensors.numpy.load_file(file)["visual.proj"]
    found["projected"] = stream.final @ projection
  compared = [k for k in golden if "/" not in k and k != "images"]
  for key in compared:
    if key not in NOT_COMPARED.get(name, ()):
      helpers.assert_close(found[key], golden[key], name=key)


@pytest.mark.parametrize(
  "name", [name for name in NAMES if "other_size/images" in expected(name)]
)
def test_positions_are_resized_as_its_library_does(name):
  golden = expected(name)
  images = golden["other_size/images"]
  backbone = load(name, image_size=images.shape[1:3])
  stream = run(backbone, images)
  helpers.assert_close(
    stream.blocks[-1], golden["other_size/blocks"][0], name="last block"
  )
