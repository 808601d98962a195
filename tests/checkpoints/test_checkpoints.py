"""Checkpoints of every generation against what their own programs compute."""

import re
import shutil

import jax
import numpy as np
import pytest

from tests import helpers
from vqt_jax import UserError
from vqt_jax.checkpoints import PUBLIC
from vqt_jax.checkpoints import check_image_size
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import names as names_lib
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.checkpoints import public
from vqt_jax.checkpoints import read_config
from vqt_jax.checkpoints import save_npz
from vqt_jax.models import vit_config

GOLDENS = helpers.GOLDENS / "bigvision"
EXPECTED = sorted(
  p.name.removesuffix(".expected.npz") for p in GOLDENS.glob("*.expected.npz")
)
VIT_MODELS, BIG_VISION = "gs://vit_models/", "gs://big_vision/"
AUGREG = VIT_MODELS + "augreg/"
SOURCES = {"bv_map_scan": "bv_map_scan.npz:img", "bv_ts": "bv_ts/checkpoint.bv"}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """Halves the time of this file, which is spent in the compiler."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def read(path) -> dict[str, np.ndarray]:
  with np.load(path, allow_pickle=False) as file:
    return {name: file[name] for name in file.files}


def source(name: str) -> str:
  return str(GOLDENS / SOURCES.get(name, f"{name}.npz"))


def write(path, leaves, **changes):
  """Saves leaves, with some replaced, added or (None) removed."""
  leaves = {**leaves, **{k: v for k, v in changes.items()}}
  np.savez(path, **{k: v for k, v in leaves.items() if v is not None})
  return str(path)


def assert_same(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden(name):
  model, _, size = name.partition(".res")
  expected = read(GOLDENS / f"{name}.expected.npz")
  images = expected["images"]
  told = images.shape[1:3] if size or "sincos2d" in name else None
  backbone = load_backbone(source(model), image_size=told)
  assert backbone.config.image_size == images.shape[1:3]
  stream = backbone(images)
  blocks = [expected[k] for k in sorted(expected) if k.startswith("block")]
  helpers.assert_close(stream.blocks, np.stack(blocks))
  helpers.assert_close(stream.encoded, expected["encoded"])
  helpers.assert_close(stream.pooled, expected["pre_logits"])
  if "logits" in expected:
    helpers.assert_close(stream.logits, expected["logits"])
  else:
    assert stream.logits is None
  if "pos_embedding" in expected:
    table = expected["pos_embedding"]
    if model.startswith("vt_token"):
      cls = read(GOLDENS / f"{model}.npz")["cls"]
      np.testing.assert_array_equal(backbone.params["cls"], cls + table[:, :1])
      table = table[:, 1:]
    np.testing.assert_array_equal(backbone.params["pos_embedding"], table)


@pytest.mark.parametrize("name", [n for n in EXPECTED if ".res" not in n])
def test_headers_tell_the_architecture(name):
  """What is planned is what is loaded."""
  loaded = load_backbone(source(name), image_size=48).config
  assert read_config(source(name), image_size=48) == loaded


def test_architecture_of_what_is_not_here():
  known = read_config("howto-i21k-L/16", image_size=224, dtype="bfloat16")
  assert known.variant == "L/16" and known.dtype == "bfloat16"
  siglip = read_config("SigLIP2 B/16 256", image_size=256)
  assert siglip.pool_type == "map" and siglip.num_tokens == 256
  named = read_config("gs://a/b.npz", image_size=224, variant="H/14")
  assert named.variant == "H/14" and named.image_size == (224, 224)


@pytest.mark.parametrize(
  "name, variant, words",
  [
    ("gs://a/b.npz", "", "Give its variant"),
    ("gs://a/b.npz", "H", "expected a patch as well"),
    ("gs://a/b.npz", "Z/14", "Unknown ViT variant"),
    ("nowhere.npz", "", "neither a file"),
    ("howto-i21k-B/16", "L/16", "is not the variant L/16"),
    ("Mixer-B_16", "", "an MLP-Mixer"),
  ],
)
def test_architecture_that_is_not_known(name, variant, words):
  with pytest.raises(UserError, match=words):
    read_config(name, image_size=224, variant=variant)


def test_damaged_header(tmp_path):
  damaged = bytearray((GOLDENS / "bv_tok_params.npz").read_bytes())
  start = damaged.index(b"NUMPY")
  damaged[start : start + 5] = b"DUMPY"
  (tmp_path / "a.npz").write_bytes(damaged)
  with pytest.raises(UserError, match="Cannot read .* in .*a.npz: "):
    read_config(tmp_path / "a.npz", image_size=48)


def test_key_biases():
  """No output depends on them, so no golden would notice their loss."""
  leaves = read(source("vt_token_deep"))
  blocks = load_backbone(source("vt_token_deep")).params["Transformer"][
    "encoderblock"
  ]
  for i in range(11):
    np.testing.assert_array_equal(
      blocks["MultiHeadDotProductAttention_0"]["key"]["bias"][i],
      leaves[
        f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/key/bias"
      ],
    )


@pytest.mark.parametrize(
  "name, expected",
  [
    (
      "vt_token_i21k",
      dict(
        width=32,
        depth=3,
        mlp_dim=64,
        num_heads=2,
        patch_size=(8, 8),
        rep_size=24,
        num_classes=11,
      ),
    ),
    ("bv_old_map_inline", dict(depth=2, num_heads=4, pool_type="map")),
    ("bv_gap_sincos2d", dict(posemb="sincos2d", pool_type="gap", rep_size=32)),
    ("bv_map_scan", dict(mlp_dim=96, pool_type="map", num_classes=None)),
  ],
)
def test_config_is_read_from_the_file(name, expected):
  config = load_backbone(source(name), image_size=32).config
  assert {key: getattr(config, key) for key in expected} == expected
  assert (config.gelu, config.dtype) == ("tanh", "float32")


def test_what_a_file_cannot_tell_is_taken_from_arguments():
  backbone = load_backbone(
    source("bv_tok"),
    gelu="exact",
    pool_type="mae",
    value_range="imagenet",
    dtype="bfloat16",
  )
  config = backbone.config
  assert (config.gelu, config.pool_type, config.dtype) == (
    "exact",
    "mae",
    "bfloat16",
  )
  assert backbone.value_range == "imagenet"
  assert {a.dtype for a in jax.tree.leaves(backbone.params)} == {
    np.dtype("float32")
  }


@pytest.mark.parametrize("name", ["bv_gap_sincos2d", "vt_gap"])
def test_the_first_patch_without_a_class_token(name):
  """Big Vision's `pool_type="0"`: `encoded[:, 0]`, then what follows a mean."""
  expected = read(GOLDENS / f"{name}.expected.npz")
  images = expected["images"]
  backbone = load_backbone(
    source(name), image_size=images.shape[1:3], pool_type="0"
  )
  stream = backbone(images)
  final = expected["encoded"][:, 0]
  helpers.assert_close(stream.final, final)
  dense = lambda x, leaf: x @ leaf["kernel"] + leaf["bias"]
  if backbone.config.rep_size:
    final = np.tanh(dense(final, backbone.params["pre_logits"]))
  helpers.assert_close(stream.pooled, final)
  helpers.assert_close(stream.logits, dense(final, backbone.params["head"]))


def test_numbers_that_are_not_finite(tmp_path):
  """Of the leaves that are used, by the names that they have in the file."""
  leaves = {f"params/{k}": a for k, a in read(source("bv_tok_params")).items()}
  kernel, bias = leaves["params/embedding/kernel"], "params/embedding/bias"
  with np.errstate(over="ignore"):
    kernel = (1e6 * kernel).astype(np.float16)
  infinite = (~np.isfinite(kernel)).sum()
  assert 0 < infinite < kernel.size
  changes = {"params/embedding/kernel": kernel, bias: np.full(32, np.nan)}
  message = bad(write(tmp_path / "x.npz", leaves, **changes), "too large for")
  assert f"params/embedding/kernel ({infinite:,} of {kernel.size:,}" in message
  assert f"{bias} (32 of 32 numbers)" in message
  fine = {"opt/params/mu": np.full(3, np.nan)}
  load_backbone(write(tmp_path / "x.npz", leaves, **fine))


def test_folder_of_one_step_and_pointer_agree():
  folder = GOLDENS / "bv_ts" / "checkpoint.bv-000000005"
  assert_same(
    load_backbone(folder).params, load_backbone(source("bv_ts")).params
  )


def test_half_precision_is_read_exactly(tmp_path):
  leaves = read(source("bv_tok_params"))
  halves = {k: a.astype(np.float16) for k, a in leaves.items()}
  backbone = load_backbone(write(tmp_path / "half.npz", halves))
  kernel = backbone.params["embedding"]["kernel"]
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(kernel, halves["embedding/kernel"])


def test_optimiser_is_not_even_read(tmp_path):
  leaves = {f"params/{k}": a for k, a in read(source("bv_tok_params")).items()}
  path = write(
    tmp_path / "x.npz", {**leaves, "opt/0": np.array({"an": "object"})}
  )
  assert_same(
    load_backbone(path).params, load_backbone(source("bv_tok_params")).params
  )


@pytest.mark.parametrize(
  "name", ["vt_token_i21k", "bv_ts", "bv_map_scan", "bv_bf16"]
)
def test_round_trip_is_exact(name, tmp_path):
  backbone = load_backbone(source(name))
  save_npz(tmp_path / "new" / "ckpt.npz", backbone)
  again = load_backbone(tmp_path / "new" / "ckpt.npz")
  assert again.config == backbone.config
  assert_same(again.params, backbone.params)
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["ckpt.npz"]


def test_saves_the_names_that_big_vision_saves(tmp_path):
  save_npz(tmp_path / "ckpt.npz", load_backbone(source("bv_tok")).params)
  ours, theirs = read(tmp_path / "ckpt.npz"), read(source("bv_tok_params"))
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_saves_bfloat16_as_big_vision_does(tmp_path):
  params = load_backbone(source("bv_bf16")).params
  save_npz(
    tmp_path / "x.npz", jax.tree.map(lambda a: a.astype("bfloat16"), params)
  )
  theirs = read(source("bv_bf16"))
  for name, array in read(tmp_path / "x.npz").items():
    assert array.dtype.str == "|V2"
    assert array.tobytes() == theirs[f"params/{name}"].tobytes()


def test_save_replaces_the_old_file_in_one_go(tmp_path):
  path = tmp_path / "ckpt.npz"
  path.write_bytes(b"old")
  with path.open("rb") as reader:
    save_npz(path, load_backbone(source("bv_tok")))
    assert reader.read() == b"old"


def test_save_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "ckpt.npz"
  path.write_bytes(b"old")

  def full(file, **arrays):
    file.write(b"half of it")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  with pytest.raises(UserError, match="No space left on device"):
    save_npz(path, load_backbone(source("bv_tok")))
  assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


# Positions.


def test_resampled_grids():
  grids = read(GOLDENS / "posemb_resample.npz")
  olds = [name for name in grids if name.startswith("old")]
  assert len(olds) > 5
  for name in olds:
    old, new = re.fullmatch(r"old_(\d+)x\d+_to_(\d+)x\d+", name).groups()
    table = positions_lib.resize_positions(
      grids[name], (int(old),) * 2, (int(new),) * 2
    )
    np.testing.assert_array_equal(table, grids[name.replace("old", "new")])


@pytest.mark.parametrize("case", range(4))
def test_positions_of_the_vqt_program(case, tmp_path):
  cases = helpers.golden("posembed_resize")
  old, new = cases[f"case{case}/old"], cases[f"case{case}/new"]
  leaves = helpers.golden("backbone")
  name = "Transformer/posembed_input/pos_embedding"
  path = write(tmp_path / "x.npz", leaves, **{name: old})
  size = 8 * int((new.shape[1] - 1) ** 0.5)
  params = load_backbone(path, image_size=size).params
  np.testing.assert_array_equal(params["cls"], leaves["cls"] + new[:, :1])
  helpers.assert_close(params["pos_embedding"], new[:, 1:], 1e-6)


def tall(tmp_path, positions: int, name: str = "pos_embedding", **changes):
  """A checkpoint whose positions may lie on any grid; 8-pixel patches."""
  leaves = read(source("bv_tok_params"))
  del leaves["pos_embedding"]
  rng = np.random.default_rng(0)
  table = rng.standard_normal((1, positions, 32)).astype(np.float32)
  return write(tmp_path / "tall.npz", leaves, **{name: table}, **changes), table


def test_non_square_grid_is_taken_as_it_is(tmp_path):
  # 2x5 = 3*3 + 1: Big Vision would take a patch for the class token.
  path, table = tall(tmp_path, 10)
  backbone = load_backbone(path, image_size=(16, 40))
  np.testing.assert_array_equal(backbone.params["pos_embedding"], table)
  np.testing.assert_array_equal(
    backbone.params["cls"], read(source("bv_tok_params"))["cls"]
  )
  assert backbone.config.grid == (2, 5)
  images = np.zeros((1, 16, 40, 3), np.float32)
  stream = jax.eval_shape(lambda images: backbone(images), images)
  assert stream.encoded.shape == (1, 11, 32)


def test_non_square_grid_is_resized_if_told(tmp_path):
  path, table = tall(tmp_path, 6)
  params = load_backbone(
    path, image_size=(24, 40), trained_size=(16, 24)
  ).params
  grid = params["pos_embedding"].reshape(3, 5, 32)
  old = table.reshape(2, 3, 32)
  np.testing.assert_allclose(grid[::2, ::2], old, atol=1e-6)
  np.testing.assert_allclose(grid[1, 0], old[:, 0].mean(0), atol=1e-6)
  np.testing.assert_allclose(grid[0, 1], old[0, :2].mean(0), atol=1e-6)


def test_class_row_of_a_non_square_grid(tmp_path):
  # 1 + 3*5 = 4*4, but vision_transformer always stores a class row.
  name = "Transformer/posembed_input/pos_embedding"
  path, table = tall(tmp_path, 16, name)
  params = load_backbone(path, image_size=(24, 40)).params
  np.testing.assert_array_equal(params["pos_embedding"], table[:, 1:])


def test_class_row_is_never_taken_for_a_patch(tmp_path):
  name = "Transformer/posembed_input/pos_embedding"
  with pytest.raises(UserError, match="15 positions do not form a square"):
    load_backbone(tall(tmp_path, 16, name)[0], image_size=32)


def test_class_row_of_big_vision_before_2022(tmp_path):
  path, table = tall(tmp_path, 11, "Transformer/pos_embedding")
  params = load_backbone(path, image_size=(16, 40)).params
  np.testing.assert_array_equal(params["pos_embedding"], table[:, 1:])


def test_single_position_is_no_class_row(tmp_path):
  path, table = tall(tmp_path, 1, "Transformer/pos_embedding", cls=None)
  params = load_backbone(path).params
  np.testing.assert_array_equal(params["pos_embedding"], table)


@pytest.mark.parametrize("told, kept", [((16, 40), 10), (24, 9)])
def test_class_row_without_class_token(tmp_path, told, kept):
  name = "Transformer/posembed_input/pos_embedding"
  path, table = tall(tmp_path, 10, name, cls=None)
  params = load_backbone(path, image_size=told).params
  np.testing.assert_array_equal(params["pos_embedding"], table[:, -kept:])


def test_positions_that_fit_two_grids(tmp_path):
  path, table = tall(tmp_path, 16)
  with pytest.raises(
    UserError, match=r"4x4 and a 2x8.*trained_size=\(16, 64\)"
  ):
    load_backbone(path, image_size=(16, 64))
  params = load_backbone(
    path, image_size=(16, 64), trained_size=(16, 64)
  ).params
  np.testing.assert_array_equal(params["pos_embedding"], table)


@pytest.mark.parametrize(
  "positions, options, message",
  [
    (10, {}, r"10 positions do not form.* --config.trained_size=HEIGHT"),
    (10, {"image_size": 24}, r"one of \(16, 40\), \(40, 16\), \(8, 80\), "),
    (10, {"trained_size": 16}, r"10 positions, but .* 2x2 .* \(16, 40\)"),
    (360, {}, r"one of \(144, 160\), \(160, 144\), .*, \.\.\. \(height"),
    (16, {"image_size": 7}, "7x7 is smaller than one 8x8 patch"),
    (16, {"image_size": 0.5}, "positive number of pixels"),
    (16, {"image_size": (32, 32, 3)}, "positive number of pixels"),
  ],
)
def test_positions_that_cannot_be_placed(tmp_path, positions, options, message):
  with pytest.raises(UserError, match=message):
    load_backbone(tall(tmp_path, positions)[0], **options)


@pytest.mark.parametrize(
  "trained_size, words",
  [(None, "10 positions do not form"), ((8, 40), "have 1x5 patches")],
)
def test_a_plan_of_positions_that_cannot_be_placed(
  tmp_path, trained_size, words
):
  path, _ = tall(tmp_path, 10)
  with pytest.raises(UserError, match=words):
    read_config(path, image_size=24, trained_size=trained_size)
  config = read_config(path, image_size=24, trained_size=(16, 40))
  assert config.grid == (3, 3)


def test_the_trained_size_tells_a_class_row(tmp_path):
  """Before the size of the images does, which fits the other way here."""
  path, table = tall(tmp_path, 10, "Transformer/pos_embedding")
  params = load_backbone(path, image_size=(16, 40), trained_size=24).params
  assert params["pos_embedding"].shape == table.shape
  np.testing.assert_array_equal(params["pos_embedding"][:, 0], table[:, 1])


def test_non_square_patches(tmp_path):
  leaves = read(source("bv_tok_params"))
  kernel = leaves["embedding/kernel"][:, :4]
  path, _ = tall(tmp_path, 32, **{"embedding/kernel": kernel})
  config = load_backbone(path).config
  assert config.patch_size == (8, 4)
  assert (config.image_size, config.grid) == ((32, 32), (4, 8))


def test_computed_positions_need_a_size():
  with pytest.raises(UserError, match="pass image_size"):
    load_backbone(source("bv_gap_sincos2d"))


@pytest.mark.parametrize("size", [32, (24, 40), np.int64(8)])
def test_image_size_that_fits(size):
  check_image_size(8, size)


@pytest.mark.parametrize(
  "patch, size, message",
  [
    (
      14,
      224 + 1,
      "225x225 is not a multiple .* 14x14 .* 224x224 or 238x238",
    ),
    ((8, 4), (32, 10), "32x10 is not a multiple .* 8x4 .* 32x8 or 32x12"),
    (16, 10, "are 16x16 pixels"),
  ],
)
def test_image_size_that_does_not_fit(patch, size, message):
  with pytest.raises(UserError, match=message):
    check_image_size(patch, size)


# Public names.


def test_public_table():
  plain = {public._plain(name) for name in PUBLIC}
  assert len(plain) == len(PUBLIC)
  for name, known in PUBLIC.items():
    assert re.fullmatch(
      r"gs://[\w+.-]+(/[\w+.-]+)+\.npz(:img)?", known.address
    ), name
    vit_config.decode_variant(known.variant.split("+")[-1])
  addresses = [known.address for known in PUBLIC.values()]
  assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(
  "name, address, variant, size, pool",
  [
    (
      "howto-i21k-B/16",
      AUGREG + "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz",
      "B/16",
      224,
      "tok",
    ),
    (
      "howto-i21k-i1k-Ti/16",
      AUGREG + "Ti_16-i21k-300ep-lr_0.001-aug_none"
      "-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384.npz",
      "Ti/16",
      384,
      "tok",
    ),
    (
      "SigLIP2 B/16 256",
      BIG_VISION + "siglip2/siglip2_b16_256.npz:img",
      "B/16",
      256,
      "map",
    ),
    (
      "siglip2 g-opt/16 384",
      BIG_VISION + "siglip2/siglip2_g-opt16_384.npz:img",
      "g-opt/16",
      384,
      "map",
    ),
    (
      "SIGLIP so400m/14  224",
      BIG_VISION + "siglip/webli_en_so400m_224_57633886.npz:img",
      "So400m/14",
      224,
      "map",
    ),
    (
      "deit3_B_224_21k",
      BIG_VISION + "zoo/deit3/bv_deit_3_base_224_21k.npz",
      "B/16",
      224,
      "tok",
    ),
    ("i1k-s16-90ep", BIG_VISION + "vit_s16_i1k_90ep.npz", "S/16", 224, "gap"),
    ("LiT-L16L", VIT_MODELS + "lit/LiT-L16L.npz:img", "L/16", 224, "tok"),
    (
      "imagenet21k ViT-B_16",
      VIT_MODELS + "imagenet21k/ViT-B_16.npz",
      "B/16",
      224,
      "tok",
    ),
    (
      "imagenet21k+imagenet2012/ViT-L_16-224",
      VIT_MODELS + "imagenet21k+imagenet2012/ViT-L_16-224.npz",
      "L/16",
      224,
      "tok",
    ),
    ("gsam/ViT-S_32", VIT_MODELS + "gsam/ViT-S_32.npz", "S/32", 224, "gap"),
  ],
)
def test_public_name(name, address, variant, size, pool):
  known = PUBLIC[public.find_name(name)]
  assert known.address == address
  assert (known.variant, known.image_size, known.pool_type) == (
    variant,
    size,
    pool,
  )
  assert known.value_range == "-1..1"


@pytest.mark.parametrize(
  "name, kind",
  [
    ("howto-i21k-R26+S/32", "hybrid"),
    ("imagenet21k/R50+ViT-B_16", "hybrid"),
    ("FlexiViT-B i1k", "FlexiViT"),
    ("SigLIP2 B/16 NaFlex", "NaFlex"),
    ("Mixer-B_16", "MLP-Mixer"),
  ],
)
def test_public_models_that_are_no_plain_vits(name, kind):
  with pytest.raises(UserError, match=kind):
    load_backbone(name)


def test_unknown_public_name():
  with pytest.raises(UserError, match="Did you mean SigLIP B/16 2"):
    load_backbone("SigLIP B/16 225")


def test_wrong_variant_of_a_public_name_is_found_before_the_download():
  with pytest.raises(UserError, match="width 768 instead of 384"):
    load_backbone("howto-i21k-B/16", variant="S/16")


# Bad input.


def bad(path, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    load_backbone(path, **options)
  return str(caught.value)


def test_no_such_file(tmp_path):
  bad(tmp_path / "none.npz", "none.npz is neither a file .* Check the path")


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "is empty"),
    (b"\x80\x04\x95", "is a Python pickle, which is never loaded"),
    (b"\x93NUMPY\x01\x00", "is a single NumPy array"),
    (b"<html>not found</html>", "is a web page"),
  ],
)
def test_not_an_npz(tmp_path, content, message):
  path = tmp_path / "x.npz"
  path.write_bytes(content)
  bad(path, message)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_truncated(tmp_path, part):
  content = (GOLDENS / "bv_tok.npz").read_bytes()
  path = tmp_path / "x.npz"
  path.write_bytes(content[: int(part * len(content))])
  bad(path, "is truncated")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_flipped_bit(tmp_path, save):
  path = tmp_path / "x.npz"
  save(path, **read(source("bv_tok_params")))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  bad(path, "Cannot read .*x.npz: .*CRC")


def test_pickled_leaf(tmp_path):
  leaves = read(source("bv_tok_params"))
  path = write(tmp_path / "x.npz", leaves, cls=np.array([{"a": 1}], object))
  bad(path, "holds pickled Python objects .cls., .* never loaded")


def test_empty_archive_and_foreign_archive(tmp_path):
  bad(write(tmp_path / "x.npz", {}), "archive of nothing")
  (tmp_path / "a.txt").write_text("a")
  shutil.make_archive(tmp_path / "y", "zip", tmp_path, "a.txt")
  bad(tmp_path / "y.zip", "archive of a.txt")


def test_random_arrays(tmp_path):
  path = write(tmp_path / "x.npz", {}, weight=np.ones((3, 4)), bias=np.ones(4))
  bad(path, "is not a ViT checkpoint: expected .* found bias, weight")


def test_leaves_that_are_no_floats(tmp_path):
  leaves = read(source("bv_tok_params"))
  path = write(
    tmp_path / "x.npz",
    leaves,
    **{
      "cls": np.zeros((1, 1, 32), int),
      "head/bias": np.zeros(11, "V4"),
    },
  )
  bad(path, "no floating-point numbers in 2 of its 56 leaves, such as .*int64")


@pytest.mark.parametrize(
  "names, kind",
  [
    (["conv_root/kernel", "embedding/kernel"], "a hybrid"),
    (
      ["MixerBlock_0/token_mixing/Dense_0/kernel", "stem/kernel"],
      "an MLP-Mixer",
    ),
    (["Embed_0/embedding", "Encoder_0/encoder_norm/bias"], "a text tower"),
    (
      ["img/embedding/kernel", "txt/head/bias", "t"],
      "several towers.*`:img`",
    ),
  ],
)
def test_no_plain_vit(tmp_path, names, kind):
  path = write(
    tmp_path / "x.npz", {name: np.ones(2, np.float32) for name in names}
  )
  bad(path, f"is not a plain ViT but .*{kind}")


def test_naflex(tmp_path):
  leaves = read(source("bv_tok_params"))
  table = np.ones((16, 16, 32), np.float32)
  bad(write(tmp_path / "x.npz", leaves, pos_embedding=table), "a NaFlex ViT")


def test_unknown_subtree():
  bad(
    source("bv_map_scan") + "age",
    "no parameters under 'imgage'; .* b, img, t, txt",
  )


def test_wrong_variant():
  message = bad(
    source("bv_tok"),
    "bv_tok.npz is not the variant mu/16 asked for",
    variant="mu/16",
  )
  assert "depth 3 instead of 1" in message
  assert "patch_size 8x8 instead of 16x16" in message
  assert "width" not in message


def test_variant_without_patch_is_checked_too():
  bad(source("bv_tok"), "width 32 instead of 768", variant="B")


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("variant", "X/16", "Unknown ViT variant 'X/16'"),
    (
      "value_range",
      "0-1",
      "value_range '0-1': expected one of -1..1, 0..1, imagenet, clip, or mean",
    ),
    ("pool_type", "max", "pool_type must be one of tok, gap, map, 0, mae"),
    ("gelu", "erf", "gelu must be one of tanh, exact"),
    ("dtype", "int8", "dtype must be one of float32, bfloat16"),
  ],
)
def test_unknown_choice(field, value, message):
  bad(source("bv_tok"), message, **{field: value})


@pytest.mark.parametrize(
  "name", ["bv_tok_params", "vt_token_augreg", "bv_map_scan"]
)
def test_every_single_leaf_is_missed(name, tmp_path):
  path, _, subtree = source(name).partition(":")
  arrays = read(path)
  picked = names_lib.select_model(arrays, subtree, name)
  leaves = {new: arrays[old] for new, old in picked.items()}
  present = {old: new for new, old in names_lib.map_to_present(leaves).items()}
  # What each of these decides is read from them alone.
  deciding = {"cls", "pos_embedding"}
  for lost in leaves:
    if lost in deciding or "encoderblock_1/" in lost:
      continue
    path = write(tmp_path / "x.npz", leaves, **{lost: None})
    message = bad(path, "missing: 1, unused: 0, of another shape: 0")
    assert f"missing: {present[lost]} " in message


def test_all_wrong_leaves_are_told_at_once(tmp_path):
  leaves = read(source("vt_token_augreg"))
  block = "Transformer/encoderblock_1"
  path = write(
    tmp_path / "x.npz",
    leaves,
    **{
      "embedding/kernel": None,
      f"{block}/LayerNorm_2/scale": None,
      f"{block}/LayerNorm_1/scale/extra": np.ones(3, np.float32),
      "extra/kernel": np.ones((2, 5), np.float32),
      "head/bias": np.ones(12, np.float32),
      f"{block}/MlpBlock_3/Dense_0/kernel": np.ones((48, 95), np.float32),
      "Transformer/posembed_input/pos_embedding": np.ones((65, 48), np.float32),
    },
  )
  message = bad(path, "missing: 2, unused: 2, of another shape: 3")
  for line in (
    "missing: embedding/kernel",
    f"missing: {block}/LayerNorm_1/scale (48,)",
    f"unused: {block}/LayerNorm_1/scale/extra (3,)",
    "unused: extra/kernel (2, 5)",
    "wrong shape: head/bias is (12,), expected (11,)",
    f"wrong shape: {block}/MlpBlock_3/Dense_0/kernel is (48, 95), expected"
    " (48, 96)",
    "wrong shape: Transformer/posembed_input/pos_embedding is (65, 48)",
  ):
    assert line in message


def test_lost_patch_kernel_is_missed_whatever_the_variant(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(vit_config.VARIANTS, "S", (32, 3, 128, 2))
  leaves = read(source("bv_tok_params"))
  path = write(tmp_path / "x.npz", leaves, **{"embedding/kernel": None})
  bad(path, "missing: embedding/kernel", variant="S/8")


def test_leaf_that_is_there_under_two_names(tmp_path):
  leaves = read(source("vt_token_augreg"))
  block = "Transformer/encoderblock_1"
  scale = {f"{block}/LayerNorm_1/scale": np.ones(48, np.float32)}
  message = bad(write(tmp_path / "x.npz", leaves, **scale), "unused: 1")
  assert f"unused: {block}/LayerNorm_2/scale (48,)" in message


def test_positions_of_another_width(tmp_path):
  table = np.ones((1, 16, 31), np.float32)
  leaves = read(source("bv_tok_params"))
  message = bad(
    write(tmp_path / "x.npz", leaves, pos_embedding=table), "shape: 1"
  )
  assert "pos_embedding is (1, 16, 31), expected (1, N, 32)" in message


def test_lost_block(tmp_path):
  leaves = read(source("bv_tok_params"))
  kept = {k: a for k, a in leaves.items() if "encoderblock_1/" not in k}
  message = bad(write(tmp_path / "x.npz", kept), "missing: 16, unused: 0")
  assert (
    "missing: Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias (32,)"
    in message
  )


def test_unused_class_token():
  bad(source("bv_tok"), r"unused: params/cls \(1, 1, 32\)", pool_type="gap")


def test_damaged_folder(tmp_path):
  folder = tmp_path / "checkpoint.bv-1"
  shutil.copytree(GOLDENS / "bv_ts" / "checkpoint.bv-000000005", folder)
  chunk = folder / "params~embedding~bias" / "0"
  content = chunk.read_bytes()
  chunk.unlink()
  bad(folder, "Cannot read .*params~embedding~bias: .*missing")
  chunk.write_bytes(content[:-9])
  bad(folder, "Cannot read .*params~embedding~bias/0.*[Tt]runcated")


def test_a_folder_named_from_elsewhere(tmp_path, monkeypatch):
  shutil.copytree(GOLDENS / "bv_ts", tmp_path / "b:[v]")
  (tmp_path / "below").mkdir()
  monkeypatch.chdir(tmp_path / "below")
  expected = load_backbone(source("bv_ts")).params
  assert_same(load_backbone("../b:[v]/checkpoint.bv").params, expected)


def test_folders_without_a_checkpoint(tmp_path):
  bad(tmp_path, "holds no Big Vision arrays")
  (tmp_path / "checkpoint.bv-LAST").write_text("000000007")
  bad(tmp_path / "checkpoint.bv", "points to .*000000007, which does not exist")
