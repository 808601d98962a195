"""Backbones are written as the files of other libraries, and read again."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests import helpers
from tests.checkpoints import test_families as foreign
import vqt_jax
from vqt_jax import checkpoints
from vqt_jax.checkpoints.families import timm
from vqt_jax.models import vit
from vqt_jax.runtime import files

# Goldens with no counterpart in the other library, and why.
NONE_IN = {
  ("hf_vit", "timm"): "has layer_norm_epsilon 1e-06, not 1e-12.*'hf'",
  ("timm_dinov3", "hf"): "DINOv3 of transformers has pool_type 'tok'.*'timm'",
  ("timm_swiglu_reg", "hf"): "does not have MLPs of 32 at width 32.*'timm'",
  ("timm_vit_avg", "hf"): "has pool_type 'tok', not 'mae'.*'timm' or 'big_",
}
OWN = [name for name in foreign.NAMES if not name.startswith("openclip")]

OTHERS = [
  (name, layout)
  for name in foreign.NAMES
  for layout in ("hf", "timm")
  if not name.startswith(layout)
]


def load(name):
  size = foreign.expected(name)["images"].shape[1:3]
  return foreign.load(name, image_size=size)


def assert_same(loaded, backbone):
  """Parameters, settings and what is derived from them; a head may be lost."""
  params, config = dict(backbone.params), backbone.config
  if not loaded.config.num_classes:
    params.pop("head", None)
    config = dataclasses.replace(config, num_classes=None)
  config = dataclasses.replace(config, class_token=config.has_class_token)
  assert loaded.config == config
  assert loaded.value_range == backbone.value_range
  assert loaded.assumed == ()
  assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params)):
    np.testing.assert_array_equal(a, b)


def tensor_shapes(file):
  return {
    name: x.shape for name, x in safetensors.numpy.load_file(file).items()
  }


@pytest.mark.parametrize("name", OWN)
def test_a_backbone_goes_back_to_where_it_came_from(name, tmp_path):
  backbone = load(name)
  vqt_jax.save_backbone(tmp_path / "saved", backbone)
  loaded = checkpoints.load_backbone(tmp_path / "saved")
  assert_same(loaded, backbone)
  assert loaded.layout == backbone.layout
  assert loaded.config.num_classes == backbone.config.num_classes
  # A tower is written alone, and timm's LayerScale is not written.
  theirs = {
    tensor.removeprefix("vision_model."): shape
    for tensor, shape in tensor_shapes(
      foreign.GOLDENS / name / "model.safetensors"
    ).items()
    if not tensor.startswith(("text_", "visual_", "logit_", "pooler."))
    and ".ls" not in tensor
  }
  assert tensor_shapes(tmp_path / "saved/model.safetensors") == theirs


@pytest.mark.parametrize("name, layout", OTHERS)
def test_a_backbone_goes_to_the_other_library(name, layout, tmp_path):
  backbone = load(name)
  if message := NONE_IN.get((name, layout)):
    with pytest.raises(vqt_jax.UserError, match=message):
      vqt_jax.save_backbone(tmp_path / "saved", backbone, layout)
    assert not list(tmp_path.iterdir())
    return
  vqt_jax.save_backbone(tmp_path / "saved", backbone, layout)
  loaded = checkpoints.load_backbone(tmp_path / "saved")
  assert_same(loaded, backbone)
  assert loaded.layout.startswith(layout)


@pytest.mark.parametrize(
  "changes, layouts",
  [
    (dict(num_classes=3), ("hf", "timm")),
    (dict(pool_type="gap"), ("hf", "timm")),
    (dict(pool_type="map", gelu="exact"), ("hf", "timm")),
    (dict(pool_type="mae", mlp_dim=36), ("timm",)),
    (dict(patch_size=(4, 3), image_size=(12, 15)), ("hf", "timm")),
  ],
)
def test_big_visions_vits_go_to_other_libraries(changes, layouts, tmp_path):
  backbone = helpers.tiny_backbone(**changes)
  backbone = dataclasses.replace(
    backbone, value_range="0.5,0.4,0.3/1.0,0.9,1.0"
  )
  for layout in layouts:
    vqt_jax.save_backbone(tmp_path / layout, backbone, layout)
    assert_same(checkpoints.load_backbone(tmp_path / layout), backbone)


def test_timm_is_told_all_that_differs_from_the_architecture(tmp_path):
  """It takes arguments from here only, whatever stands beside them."""
  backbone = helpers.tiny_backbone(pool_type="mae", image_size=(12, 16))
  vqt_jax.save_backbone(tmp_path / "saved", backbone, "timm")
  config = files.read_json(tmp_path / "saved" / "config.json")
  assert config["architecture"] == "vit_base_patch16_224"
  assert config["model_args"] == {
    "img_size": [12, 16],
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "class_token": True,
    "global_pool": "avg",
    "act_layer": "gelu_tanh",
    "reg_tokens": 0,
    "no_embed_class": False,
    "pre_norm": False,
    "fc_norm": True,
    "init_values": None,
  }


def test_timm_gets_hidden_sizes_that_are_exact():
  for width in (48, 384, 1152):
    for hidden in range(1, 5 * width, 7):
      assert int(width * timm._ratio(hidden, width)) == hidden


def test_computed_positions_are_written_as_a_table(tmp_path):
  backbone = helpers.tiny_backbone(posemb="sincos2d")
  vqt_jax.save_backbone(tmp_path / "saved", backbone, "timm")
  loaded = checkpoints.load_backbone(tmp_path / "saved")
  table = vit.posemb_sincos_2d((3, 3), 16)
  np.testing.assert_array_equal(loaded.params["pos_embedding"], table)


def test_a_bias_that_an_editor_has_moved_is_kept_or_refused(tmp_path):
  backbone = load("hf_dinov3")
  params = dict(vqt_jax.checkpoints.names.flatten(backbone.params))
  key = "Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias"
  params[key] = params[key] + 1
  params = vqt_jax.checkpoints.names.nest(params)
  edited = dataclasses.replace(backbone, params=params)
  vqt_jax.save_backbone(tmp_path / "hf", edited)
  assert_same(checkpoints.load_backbone(tmp_path / "hf"), edited)
  with pytest.raises(vqt_jax.UserError, match="no place for Multi.*/key/bias"):
    vqt_jax.save_backbone(tmp_path / "timm", edited, "timm")


@pytest.mark.parametrize(
  "changes, layout, message",
  [
    (dict(rep_size=8), "hf", "rep_size None, not 8.*layout='big_vision'"),
    (dict(pool_type="0"), "timm", "pool_type 'tok', not '0'.*'big_vision'"),
    (
      dict(pre_norm=True),
      "timm",
      "ViT of timm has no place for embedding/bias",
    ),
    (
      dict(pre_norm=True, layer_norm_epsilon=1e-5),
      "hf",
      "an image tower of CLIP.* has no place for embedding/bias",
    ),
    (dict(posemb="rope"), "hf", "DINOv3.* needs embeddings.register_tokens"),
    (dict(image_size=(13, 12)), "timm", "not a multiple of .* 4x4 patch"),
    (dict(), "onnx", "Unknown layout 'onnx'"),
    (dict(registers=2), "big_vision", "no registers. .*'hf' or 'timm'"),
    (dict(pre_norm=True), "", "no LayerNorm before the blocks"),
    (dict(gated_mlp=True), "", "no gated MLPs"),
    (dict(posemb="rope"), "", "no rotary positions"),
    (dict(layer_norm_epsilon=1e-5), "", "no epsilon of 1e-05"),
    (dict(pool_type="gap", class_token=True), "", "no class token where"),
    (dict(class_token=False), "", "no pool_type 'tok' without"),
  ],
)
def test_what_a_layout_cannot_express_is_refused(
  changes, layout, message, tmp_path
):
  backbone = helpers.tiny_backbone(**changes)
  with pytest.raises(vqt_jax.UserError, match=message):
    vqt_jax.save_backbone(tmp_path / "saved", backbone, layout)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes", [dict(registers=2), dict(pre_norm=True), dict(gated_mlp=True)]
)
def test_bare_parameters_of_other_families_are_no_npz(changes, tmp_path):
  params = helpers.tiny_backbone(**changes).params
  with pytest.raises(vqt_jax.UserError, match="no .* Give save_backbone the"):
    vqt_jax.save_npz(tmp_path / "vit.npz", params)


def test_a_tower_of_openclip_needs_a_layout(tmp_path):
  with pytest.raises(vqt_jax.UserError, match="layout='hf' or layout='timm'"):
    vqt_jax.save_backbone(tmp_path / "saved", load("openclip"))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
  backbone = helpers.tiny_backbone()
  (tmp_path / "saved").mkdir()
  (tmp_path / "saved" / "thesis.tex").write_text("mine")
  with pytest.raises(vqt_jax.UserError, match="thesis.tex"):
    vqt_jax.save_backbone(tmp_path / "saved", backbone, "timm")
  assert files.list_names(tmp_path / "saved") == ["thesis.tex"]
  for _ in range(2):  # Its own files are replaced.
    vqt_jax.save_backbone(tmp_path / "again", backbone, "timm")
