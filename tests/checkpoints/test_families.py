"""ViTs of transformers, timm and OpenCLIP compute what these computed."""

import functools
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests import helpers
import vqt_jax
from vqt_jax import errors
from vqt_jax.checkpoints import load_backbone
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
  return load_backbone(folder / name, **settings)


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


def write(folder, name, change=lambda tensors: tensors, **config):
  """Write a golden with other tensors, and other keys in its config."""
  folder.mkdir(exist_ok=True)
  for file in (GOLDENS / name).iterdir():
    if file.suffix == ".json":
      content = json.loads(file.read_text())
      (folder / file.name).write_text(json.dumps({**content, **config}))
    elif file.suffix == ".safetensors":
      tensors = change(safetensors.numpy.load_file(file))
      safetensors.numpy.save_file(tensors, folder / file.name)
  return folder


def without(pattern):
  return lambda tensors: {
    name: x for name, x in tensors.items() if not re.fullmatch(pattern, name)
  }


def weights_of(backbone):
  return jax.tree.leaves_with_path(backbone.params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_in_half_precision(tmp_path, dtype):
  halve = lambda tensors: {n: x.astype(dtype) for n, x in tensors.items()}
  halved = load("", write(tmp_path / "half", "hf_clip", halve))
  for (path, half), (_, whole) in zip(
    weights_of(halved), weights_of(load("hf_clip"))
  ):
    assert half.dtype == np.float32
    if "cls" in str(path):  # A sum of two tensors.
      continue
    exact = whole.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(half, exact, err_msg=str(path))


def test_an_image_tower_among_others_is_the_tower():
  towers, alone = load("hf_siglip_two_towers"), load("hf_siglip")
  assert towers.config == alone.config
  paths = [[path for path, _ in weights_of(each)] for each in (towers, alone)]
  assert paths[0] == paths[1]


def test_what_nothing_tells_is_assumed_or_asked_for(tmp_path):
  file = tmp_path / "model.safetensors"
  shutil.copyfile(GOLDENS / "timm_clip" / "model.safetensors", file)
  with pytest.raises(
    errors.UserError, match=r"attention heads: give num_heads"
  ):
    load_backbone(file)
  backbone = load_backbone(file, num_heads=2)
  assert backbone.assumed == ("gelu", "value_range")
  assert backbone.value_range == "clip"
  assert backbone.config.layer_norm_epsilon == 1e-5
  backbone = load_backbone(file, num_heads=4, gelu="quick", value_range="0..1")
  assert not backbone.assumed
  assert (backbone.config.gelu, backbone.config.num_heads) == ("quick", 4)
  with pytest.raises(
    errors.UserError, match="2 attention heads, not num_heads"
  ):
    load_backbone(GOLDENS / "hf_clip", num_heads=4)


def test_any_mean_and_deviation(tmp_path):
  write(tmp_path / "vit", "hf_vit")
  processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.5]}
  file = tmp_path / "vit" / "preprocessor_config.json"
  file.write_text(json.dumps(processor))
  backbone = load_backbone(tmp_path / "vit")
  assert backbone.value_range == "0.1,0.2,0.3/0.5,0.25,0.5"
  assert not backbone.assumed
  (low, high) = (np.full((1, 32, 32, 3), x, np.float32) for x in (-0.2, 2.8))
  backbone.checked(low), backbone.checked(high)
  with pytest.raises(errors.UserError, match="expected values of 0.1,0.2,0.3/"):
    backbone.checked(high + 2)
  file.write_text(json.dumps({**processor, "image_std": [0, 1, 1]}))
  with pytest.raises(errors.UserError, match="no deviation 0"):
    load_backbone(tmp_path / "vit")
  file.write_text(json.dumps({"do_normalize": False}))
  assert load_backbone(tmp_path / "vit").value_range == "0..1"


@pytest.mark.parametrize("given", ["1,2/3,4", "1,2,3/0,1,1", "a,b,c/1,1,1", 7])
def test_a_value_range_that_is_none(given):
  with pytest.raises(errors.UserError, match="expected one of -1..1"):
    load("hf_vit", value_range=given)


def test_neighbours_that_turn_together(tmp_path):
  """As of timm's models that say so; those it has registered never do."""
  said = write(
    tmp_path / "a", "timm_dinov3", model_args={"rope_rotate_half": False}
  )
  other = write(
    tmp_path / "b", "timm_dinov3", model_args={"rope_rotate_half": True}
  )
  digests = [
    load_backbone(place, num_heads=2).digest
    for place in (GOLDENS / "timm_dinov3", said, other)
  ]
  assert digests[0] == digests[1] != digests[2]


def renamed(tensors):
  return {
    n.replace("norm1.bias", "norm1.offset"): x for n, x in tensors.items()
  }


def wider(tensors):
  return {
    n: np.zeros((31, 32), np.float32) if n.endswith("fc1.weight") else x
    for n, x in tensors.items()
  }


def not_a_number(tensors):
  name = "encoder.layer.1.mlp.fc2.bias"
  return {**tensors, name: np.full_like(tensors[name], np.nan)}


def whole_numbers(tensors):
  name = "layernorm.weight"
  return {**tensors, name: np.ones_like(tensors[name], np.int32)}


@pytest.mark.parametrize(
  "change, config, words",
  [
    (
      without(r".*\.0\.norm1\.bias"),
      {},
      r"missing: encoder.layer.0.norm1.bias",
    ),
    (without(r"layernorm\..*"), {}, r"missing: 2, unused: 0"),
    (without(r".*\.0\.attention\.attention\.key\.bias"), {}, "missing: 1"),
    (without(r".*patch_embeddings\.projection\.weight"), {}, "holds none of"),
    (without(r"encoder\..*"), {}, "holds none of"),
    (renamed, {}, r"unused: encoder.layer.1.norm1.offset \(32,\)"),
    (wider, {}, r"fc1.weight is \(31, 32\), expected \(64, 32\)"),
    (not_a_number, {}, r"NaN or infinity in encoder.layer.1.mlp.fc2.bias \(32"),
    (whole_numbers, {}, r"such as layernorm.weight \(int32\)"),
    (None, {"hidden_size": 64}, "width 64 where its tensors have 32"),
    (None, {"num_hidden_layers": 3}, "depth 3 where its tensors have 2"),
    (None, {"patch_size": 16}, r"patch_size \(16, 16\) where .* \(14, 14\)"),
    (None, {"num_attention_heads": 5}, "which 5 attention heads do not divide"),
    (None, {"num_attention_heads": "2"}, "which '2' attention heads"),
    (None, {"layer_norm_eps": -1.0}, "layer_norm_epsilon -1.0; expected a pos"),
    (None, {"layer_norm_eps": "x"}, "layer_norm_epsilon 'x'; expected a pos"),
    (None, {"hidden_act": "relu"}, "is 'relu'; expected one of gelu"),
    (None, {"hidden_act": ["gelu"]}, "what config.json of .*: TypeError"),
    (None, {"image_size": "large"}, "image_size must be a positive number"),
    (None, {"image_size": 0}, "image_size must be a positive number"),
    (None, {"model_type": "vit"}, "have the names of 'dinov2'"),
    (None, {"model_type": "swin"}, "is a 'swin' by its config.json"),
    (None, {"model_type": 3}, "is a 3 by its config.json"),
  ],
)
def test_files_that_do_not_fit(tmp_path, change, config, words):
  folder = write(
    tmp_path / "vit", "hf_dinov2", change or (lambda tensors: tensors), **config
  )
  with pytest.raises(errors.UserError, match=words) as caught:
    load_backbone(folder)
  first = str(caught.value).partition("\n")[0]
  assert str(folder) in first


@pytest.mark.parametrize(
  "name, tensors, words",
  [
    ("patch_embed.proj.weight", {"dist_token": (1, 1, 8)}, "distillation"),
    ("features.0.weight", {"layer1.0.conv1.weight": (8, 8, 3, 3)}, "a ResNet"),
    ("x.dwconv.weight", {}, "a ConvNeXt"),
    ("layers.0.relative_position_bias_table", {}, "a Swin"),
    ("bert.embeddings.word_embeddings.weight", {}, "a text model"),
    ("embeddings.patch_embedding.weight", {}, "a NaFlex ViT"),
    ("something.else", {}, "found tensors such as something.else"),
  ],
)
def test_other_networks(tmp_path, name, tensors, words):
  arrays = {n: np.zeros(s, np.float32) for n, s in tensors.items()}
  arrays[name] = np.zeros((8, 8), np.float32)
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
  with pytest.raises(errors.UserError, match=words):
    load_backbone(tmp_path)


@pytest.mark.parametrize(
  "config, words",
  [
    ({"architecture": "eva02_tiny_patch14_224"}, "not a plain ViT"),
    ({"architecture": "vit_base_patch16_rpn_224"}, "not a plain ViT"),
    ({"architecture": "vit_pe_core_tiny_patch16_384"}, "not a plain ViT"),
    ({"global_pool": "avgmax"}, "pools by 'avgmax'"),
    ({"model_args": {"num_heads": 3}}, "3 attention heads do not divide"),
    ({"model_args": {"norm_layer": "layernorm"}}, "norm_layer='layernorm'"),
    ({"model_args": {"pool_include_prefix": True}}, "include_prefix=True"),
    ({"model_args": {"embed_dim": 32}}, "tells its number of attention heads"),
    ({"model_args": [1]}, "Cannot read what config.json of .*: "),
    ({"pretrained_cfg": "none"}, "no three channels|Cannot read what"),
    ({"pretrained_cfg": {"input_size": 3}}, "Cannot read what"),
    ({"pretrained_cfg": {"mean": [1], "std": "x"}}, "expected three numbers"),
  ],
)
def test_configs_of_timm(tmp_path, config, words):
  folder = write(tmp_path / "vit", "timm_vit", **config)
  with pytest.raises(errors.UserError, match=words):
    load_backbone(folder)


@pytest.mark.parametrize("name", ["hf_dinov3_gated", "openclip_quickgelu"])
def test_what_is_stored_is_read_as_live(name):
  """Tokens of a store, their keys and values, and the stream: one answer."""
  backbone = load(name)
  images = expected(name)["images"] / 2
  tuner = vqt_jax.make_tuner("vqt", backbone, 3, num_queries=2)
  variables = helpers.random_variables(tuner)
  everything = {**variables, "backbone": backbone.params}

  @jax.jit
  def run_live(everything, images):
    stream = tuner.stream(everything, images)
    return stream, tuner(everything, stream.tokens, stream.final)

  stream, live = run_live(everything, images)
  store = np.concatenate([np.zeros_like(stream.tokens), stream.tokens], axis=1)
  blocks = backbone.params["Transformer"]["encoderblock"]
  project = functools.partial(vit.Block(tuner.config).apply, method="project")
  over_blocks = jax.jit(jax.vmap(lambda p, x: project({"params": p}, x)))
  read_row = jax.jit(lambda *args: tuner(*args, rows=np.array([1], np.int32)))
  for each in (store, over_blocks(blocks, store)):
    read = read_row(everything, each, stream.final)
    helpers.assert_close(read.logits, live.logits, 1e-5)


@pytest.mark.parametrize("method", ["vqt+ssf", "vqt+lora"])
def test_an_edited_gated_block_folds(method):
  backbone = load("hf_dinov3_gated")
  images = expected("hf_dinov3_gated")["images"] / 2
  tuner = vqt_jax.make_tuner(method, backbone, 3, num_queries=2)
  variables = jax.jit(tuner.init)(jax.random.key(0), backbone.params)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: np.float32(x + 0.1 * rng.standard_normal(x.shape)), variables
  )
  model = helpers.tuned_model(backbone, tuner, variables)
  helpers.assert_close(model.folded()(images)[0], model(images)[0], 1e-5)


def test_a_bundle_finds_a_backbone_whose_heads_were_given(tmp_path):
  backbone = load("timm_swiglu_reg")
  shutil.copytree(GOLDENS / "timm_swiglu_reg", tmp_path / "vit")
  tuner = vqt_jax.make_tuner("vqt", backbone, 3, num_queries=1)
  variables = helpers.random_variables(tuner)
  model = helpers.tuned_model(backbone, tuner, variables)
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit", model)
  assert vqt_jax.load(tmp_path / "tuned").backbone.config == backbone.config


@pytest.mark.parametrize(
  "name, args, words",
  [
    ("timm_dinov3", {"rope_type": "cat"}, "rope_type='cat'"),
    ("timm_dinov3", {"rope_grid_offset": 0.5}, "rope_grid_offset=0.5"),
    ("timm_dinov3", {"use_rot_pos_emb": False}, "use_rot_pos_emb=False"),
    ("timm_swiglu_reg", {"act_layer": "gelu"}, "activation 'gelu'"),
  ],
)
def test_arguments_of_timm_that_are_not_read(tmp_path, name, args, words):
  folder = write(tmp_path / "vit", name, model_args=args)
  with pytest.raises(errors.UserError, match=words):
    load("", folder, image_size=64)


def test_arguments_of_timm_that_are_read(tmp_path):
  args = {"rope_temperature": 7.0, "rope_type": "dinov3", "rope_grid_offset": 0}
  folder = write(tmp_path / "timm_dinov3", "timm_dinov3", model_args=args)
  loaded = load(folder.name, tmp_path, image_size=64)
  assert loaded.config.rope_theta == 7.0
  # LayerNorm before the blocks, but the name is not of a CLIP.
  folder = write(
    tmp_path / "timm_clip", "timm_clip", architecture="vit_tiny_patch16"
  )
  assert load(folder.name, tmp_path).config.layer_norm_epsilon == 1e-6


def test_attention_pooling_before_a_last_norm(tmp_path):
  def rename(tensors):
    return {
      n.replace("norm.", "fc_norm.", n.startswith("norm.")): x
      for n, x in tensors.items()
    }

  folder = write(tmp_path / "vit", "timm_siglip", rename)
  with pytest.raises(errors.UserError, match="before its last LayerNorm"):
    load("", folder)


def test_no_registers_that_have_a_tensor(tmp_path):
  def add(tensors):
    none = np.zeros((1, 0, 32), np.float32)
    return {**tensors, "embeddings.register_tokens": none}

  folder = write(tmp_path / "vit", "hf_dinov2", add)
  assert load("", folder).config == load("hf_dinov2").config


def test_no_class_token_to_pool_by(tmp_path):
  with pytest.raises(errors.UserError, match="has no class token to pool by"):
    load("hf_siglip", pool_type="tok")
  assert load("hf_siglip", pool_type="gap").config.num_prefix_tokens == 0
