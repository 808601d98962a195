"""Models of bundles: images in, answers out; and where backbones are found."""

import io
import json
import os
import pathlib
import pickle
import shutil

from huggingface_hub import constants
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.data import decoding
from vqt_jax.data import preprocess
from vqt_jax.tuned import inputs

CLASSES = 3


def make_model(method="vqt", num_seeds=2, **changes):
  backbone = helpers.tiny_backbone(depth=1, **changes)
  tuner = vqt_jax.make_tuner(method, backbone, CLASSES, target_size=48)
  seeds = [
    tuner.init(jax.random.key(seed), backbone.params)
    for seed in range(num_seeds)
  ]
  return helpers.tuned_model(backbone, tuner, *seeds)


@pytest.fixture(scope="module")
def model():
  return make_model()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Paths of images of several kinds, and their pixels (h, w, 3)."""
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  pixels = [
    rng.integers(0, 255, (9 + i, 20 - i, 3), np.uint8) for i in range(5)
  ]
  paths = [folder / f"{i}.png" for i in range(len(pixels))]
  for path, each in zip(paths, pixels):
    PIL.Image.fromarray(each).save(path)
  return paths, pixels


def prepared(pixels):
  run = preprocess.make_preprocess((12, 12), "-1..1")
  return np.stack([run(each) for each in pixels])


@pytest.mark.parametrize(
  "method", ["vqt", "head2toe", "instant", "linear", "vqt+lora"]
)
def test_seeds_answer_in_one_pass_what_each_does_alone(method):
  model = make_model(method)
  images = helpers.tiny_examples(model.backbone, 3, CLASSES)["image"]
  logits = model(images)
  assert logits.shape == (2, 3, CLASSES)
  for i in range(2):
    variables = jax.tree.map(lambda x, i=i: x[i], model.variables)
    out = vqt_jax.apply(model.backbone, model.tuner, variables, images)
    helpers.assert_close(logits[i], out.logits, 1e-6)
    helpers.assert_close(model.of_seed(i)(images)[0], logits[i], 1e-6)


def test_probabilities_are_the_mean_over_the_seeds(model):
  images = helpers.tiny_examples(model.backbone, 5, CLASSES)["image"]
  expected = jax.nn.softmax(model(images), axis=-1).mean(axis=0)
  found = model.predict_proba(images)
  helpers.assert_close(found, expected, 1e-6)
  names = model.predict(images)
  assert list(names) == [f"class {i}" for i in found.argmax(axis=-1)]


def test_images_as_people_have_them(model, pictures):
  paths, pixels = pictures
  expected = model.logits(prepared(pixels))
  for x in (
    paths,
    [str(path) for path in paths],
    tuple(path.read_bytes() for path in paths),
    [PIL.Image.open(path) for path in paths],
    pixels,
    (each for each in pixels),
    np.array([str(path) for path in paths]),
  ):
    np.testing.assert_array_equal(model.logits(x), expected)
  for one in (paths[0], str(paths[0]), pixels[0], PIL.Image.open(paths[0])):
    assert model.logits(one).shape == (2, 1, CLASSES)
    helpers.assert_close(model.logits(one), expected[:, :1], 1e-6)
  grey = pixels[0][..., 0]
  same = np.repeat(grey[..., None], 3, axis=-1)
  for one in (grey, grey[..., None], same[None], jnp.asarray(grey)):
    np.testing.assert_array_equal(model.logits(one), model.logits(same))
  assert model.logits([]).shape == (2, 0, CLASSES)


def test_files_fit_as_they_did_in_training(model, pictures):
  paths, pixels = pictures
  for fit in decoding.FITS:
    prepare = inputs.make_prepare([12, 12], "0..1", fit=fit)
    for path, each in zip(paths, pixels):
      expected = decoding.fit(each, (12, 12), fit) / np.float32(255)
      np.testing.assert_allclose(prepare(path), expected, atol=1e-6)


@pytest.mark.parametrize(
  "count, size", [(1, 1), (2, 2), (3, 4), (33, 18), (61, 32), (240, 30)]
)
def test_one_size_is_compiled_and_no_image_is_lost(model, count, size):
  images = np.zeros((count, 6, 6, 3), np.uint8)
  images[:] = np.arange(count).reshape(-1, 1, 1, 1)
  parts = list(model._batches(images))
  assert sum(real for _, real in parts) == count
  assert {len(part) for part, _ in parts} == {size}
  values = np.concatenate([part[:real, 0, 0, 0] for part, real in parts])
  np.testing.assert_allclose(values, np.arange(count) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
  "x, words",
  [
    (3, "expected paths, PIL images, or uint8 arrays .* found int"),
    (None, "found NoneType"),
    (np.zeros((4, 4, 2), np.uint8), r"found uint8 \(4, 4, 2\)"),
    (np.zeros((4, 4, 3), np.int32), r"found int32 \(4, 4, 3\)"),
    (np.zeros((0, 4, 3), np.uint8), r"found uint8 \(0, 4, 3\)"),
    (np.array("x.png"), "found <U5"),
    (np.zeros((2, 4, 4, 3), np.float32), r"expected floats \(B, 12, 12, 3\)"),
    (np.full((2, 12, 12, 3), 255.0), "found 255 to 255"),
    ("none.png", "none.png: there is no such file"),
    (["none.png"], "none.png: there is no such file"),
    (b"no image", "it is not an image"),
    ([3], "image of int"),
  ],
)
def test_what_is_no_image(model, x, words):
  with pytest.raises(vqt_jax.UserError, match=words):
    model.predict(x)


def test_attention_of_every_seed(model):
  images = helpers.tiny_examples(model.backbone, 3, CLASSES)["image"]
  weights = model.attention(images)
  assert weights.shape == (2, 1, 3, 2, 1, 10)
  helpers.assert_close(weights.sum(axis=-1), np.ones(weights.shape[:-1]), 1e-5)
  one = model.of_seed(1).attention(images)
  helpers.assert_close(one[0], weights[1], 1e-6)
  maps = model.attention_maps(images)  # Without the class token.
  assert maps.shape == (3, 1, 3, 3)
  seen = weights[:, 0, 2, ..., 1:].mean(axis=(0, 1, 2)).reshape(3, 3)
  helpers.assert_close(maps[2, 0], seen, 1e-6)
  with pytest.raises(vqt_jax.UserError, match="linear has no queries"):
    make_model("linear").attention(images)


def test_no_image_has_no_attention(model):
  assert model.attention([]).shape == (2, 1, 0, 2, 1, 10)


def test_a_model_that_was_used_is_pickled(model, pictures):
  paths, _ = pictures
  expected = model.logits(paths)
  again = pickle.loads(pickle.dumps(model))
  np.testing.assert_array_equal(again.logits(paths), expected)


def test_one_seed_is_folded_at_a_time():
  model = make_model("lora")
  with pytest.raises(vqt_jax.UserError, match=r"of_seed\(0\).folded\(\)"):
    model.folded()
  with pytest.raises(vqt_jax.UserError, match="Unknown seed '5'. Known: 0, 1"):
    model.of_seed(5)
  images = helpers.tiny_examples(model.backbone, 2, CLASSES)["image"]
  folded = model.of_seed(1).folded()
  assert folded.tuner.editor is None
  helpers.assert_close(folded(images)[0], model(images)[1], 1e-5)


# Several models.


def test_models_on_one_backbone_answer_in_one_pass(tmp_path, pictures):
  paths, _ = pictures
  alone = {}
  for method in ("vqt", "linear", "head2toe", "ssf"):
    made = make_model(method)
    vqt_jax.save_npz(tmp_path / "vit.npz", made.backbone)
    helpers.write_bundle(tmp_path / method, tmp_path / "vit.npz", made)
    alone[str(tmp_path / method)] = vqt_jax.load(tmp_path / method)
  models = vqt_jax.load([tmp_path / method for method in map(str, alone)])
  assert list(models.models) == list(alone)
  backbones = {id(each.backbone) for each in models.models.values()}
  assert len(backbones) == 1
  logits, names = models.logits(paths), models.predict(paths)
  for name, made in alone.items():
    helpers.assert_close(logits[name], made.logits(paths), 1e-5)
    assert list(names[name]) == list(made.predict(paths))


def test_models_that_cannot_answer_together(tmp_path):
  for name, changes in {"a": {}, "b": {"image_size": (8, 8)}}.items():
    made = make_model(**changes)
    vqt_jax.save_npz(tmp_path / f"{name}.npz", made.backbone)
    helpers.write_bundle(tmp_path / name, tmp_path / f"{name}.npz", made)
  made.info["preprocessing"]["resize"] = "legacy"
  helpers.write_bundle(tmp_path / "c", tmp_path / "b.npz", made)
  for pair, words in (("ab", "trained on image_size"), ("bc", "preproc")):
    with pytest.raises(vqt_jax.UserError, match=words):
      vqt_jax.load([tmp_path / name for name in pair])
  with pytest.raises(vqt_jax.UserError, match="at least one path"):
    vqt_jax.load([])


# Where the backbone is found.


def test_a_backbone_that_has_moved(tmp_path, monkeypatch):
  model = make_model()
  images = helpers.tiny_examples(model.backbone, 3, CLASSES)["image"]
  here, there = tmp_path / "here", tmp_path / "there"
  here.mkdir(), there.mkdir()
  monkeypatch.chdir(here)
  vqt_jax.save_npz("vit.npz", model.backbone)
  helpers.write_bundle("run/tuned", "vit.npz", model)
  config = {"init": os.path.abspath("vit.npz")}
  pathlib.Path("run/config.json").write_text(json.dumps(config))
  monkeypatch.chdir(there)
  same = lambda found: np.testing.assert_array_equal(
    found(images), model(images)
  )
  same(vqt_jax.load(here / "run"))  # Where the run had it.
  same(vqt_jax.load("../here/run/tuned"))
  os.rename(here / "run" / "tuned", "bundle")
  with pytest.raises(
    vqt_jax.UserError,
    match=r"bundle needs .*16x1/4 'vit.npz'.* not at hand\. .*backbone=\.\.\.",
  ):
    vqt_jax.load("bundle")
  same(vqt_jax.load("bundle", backbone="../here/vit.npz"))
  same(vqt_jax.load("bundle", backbone=model.backbone))
  os.rename(here / "vit.npz", "vit.npz")
  same(vqt_jax.load("bundle"))  # Beside the bundle, and in it.
  os.rename("vit.npz", "bundle/vit.npz")
  same(vqt_jax.load(there / "bundle"))
  other = helpers.tiny_backbone(seed=1, depth=1)
  vqt_jax.save_npz("vit.npz", other)
  os.remove("bundle/vit.npz")
  for given in (None, "vit.npz", other):
    with pytest.raises(vqt_jax.UserError, match="trained on other weights"):
      vqt_jax.load("bundle", backbone=given)


@pytest.mark.parametrize(
  "changes",
  [{"pool_type": "mae"}, {"gelu": "exact"}, {"dtype": "bfloat16"}],
  ids=str,
)
def test_a_backbone_that_is_set_up_otherwise(tmp_path, changes):
  """It would answer with other numbers, alone or for several models."""
  made = make_model()
  vqt_jax.save_npz(tmp_path / "vit.npz", made.backbone)
  helpers.write_bundle(tmp_path / "a", tmp_path / "vit.npz", made)
  other = vqt_jax.load_backbone(tmp_path / "vit.npz", image_size=12, **changes)
  tuner = vqt_jax.make_tuner("vqt", other, CLASSES)
  seeds = [tuner.init(jax.random.key(seed)) for seed in range(2)]
  made = helpers.tuned_model(other, tuner, *seeds)
  helpers.write_bundle(tmp_path / "b", tmp_path / "vit.npz", made)
  ((name, value),) = changes.items()
  with pytest.raises(
    vqt_jax.UserError, match=f"b was trained on {name} {value}"
  ):
    vqt_jax.load([tmp_path / "a", tmp_path / "b"])
  with pytest.raises(vqt_jax.UserError, match=f"a was trained on {name} "):
    vqt_jax.load(tmp_path / "a", backbone=other)
  assert vqt_jax.load(tmp_path / "b").backbone.config == other.config


def test_a_config_of_something_else_is_passed_over(tmp_path):
  made = make_model()
  folder = tmp_path / "a" / "bundle"
  vqt_jax.save_npz(tmp_path / "vit.npz", made.backbone)
  helpers.write_bundle(folder, tmp_path / "vit.npz", made)
  os.rename(tmp_path / "vit.npz", folder / "vit.npz")
  for content in ("{", "[]", '{"init": 3}'):
    (tmp_path / "a" / "config.json").write_text(content)
    assert vqt_jax.load(folder).num_seeds == 2


def test_a_bundle_opens_no_place_of_its_choice(tmp_path, monkeypatch):
  """Neither addresses nor files outside: what it names is only a name."""
  model = make_model()
  vqt_jax.save_npz(tmp_path / "vit.npz", model.backbone)
  folder = tmp_path / "a" / "bundle"
  helpers.write_bundle(folder, tmp_path / "vit.npz", model)
  info = runs.read_json(folder / "bundle.json")
  fetched = []
  for room in ("download", "hub"):
    monkeypatch.setattr(
      f"vqt_jax.checkpoints.load.{room}.fetch",
      lambda address, *_: fetched.append(address),
    )
  for source in (
    "https://127.0.0.1:9/vit.npz",
    "gs://bucket/vit.npz",
    "../../vit.npz",
    "hf://owner/name",
    "owner/name",
    str(tmp_path / "vit.npz"),
    "/etc/passwd",
  ):
    changed = info | {"backbone": info["backbone"] | {"source": source}}
    (folder / "bundle.json").write_text(json.dumps(changed))
    with pytest.raises(vqt_jax.UserError, match="not at hand|Cannot use"):
      vqt_jax.load(folder)
  assert not fetched


def test_a_backbone_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
  """By its commit, without the hub, also once the branch has moved on."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  snapshots = tmp_path / "models--owner--name" / "snapshots"
  commits = ["0" * 39 + x for x in "12"]
  for i, commit in enumerate(commits):
    shutil.copytree(helpers.GOLDENS / "foreign/hf_vit", snapshots / commit)
    weights = snapshots / commit / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors = {name: x + i for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, weights)
  (snapshots.parent / "refs").mkdir()
  (snapshots.parent / "refs" / "main").write_text(commits[0])
  backbone = vqt_jax.load_backbone("owner/name", image_size=16)
  assert backbone.revision == commits[0]
  tuner = vqt_jax.make_tuner("linear", backbone, CLASSES)
  model = helpers.tuned_model(backbone, tuner, tuner.init(jax.random.key(0)))
  for source in ("owner/name", "hf://owner/name@main"):
    helpers.write_bundle(tmp_path / "tuned", source, model)
    found = runs.read_json(tmp_path / "tuned" / "bundle.json")["backbone"]
    assert (found["source"], found["revision"]) == (source, commits[0])
    (snapshots.parent / "refs" / "main").write_text(commits[1])
    assert vqt_jax.load(tmp_path / "tuned").backbone.digest == backbone.digest
  (snapshots / commits[0]).rename(tmp_path / "gone")
  with pytest.raises(
    vqt_jax.UserError, match=f"'hf://owner/name@{commits[0]}', .* not at hand"
  ):
    vqt_jax.load(tmp_path / "tuned")


def test_a_trained_size_is_kept(tmp_path):
  model = make_model(image_size=(8, 20))
  vqt_jax.save_npz(tmp_path / "vit.npz", model.backbone)
  backbone = vqt_jax.load_backbone(
    tmp_path / "vit.npz", image_size=12, trained_size=(8, 20)
  )
  assert backbone.trained_size == (8, 20) and backbone.config.grid == (3, 3)
  seeds = [jax.tree.map(lambda x: x[0], model.variables)]
  model = helpers.tuned_model(backbone, model.tuner, *seeds)
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit.npz", model)
  assert vqt_jax.load(tmp_path / "tuned").backbone.digest == backbone.digest


def test_trained_weights_that_are_not_finite(tmp_path):
  model = make_model("linear")
  vqt_jax.save_npz(tmp_path / "vit.npz", model.backbone)
  model.variables["head"]["bias"][0, 1:] = np.nan
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit.npz", model)
  with pytest.raises(
    vqt_jax.UserError,
    match=r"model.safetensors holds NaN .* head/bias \(2 of 6 numbers\)",
  ):
    vqt_jax.load(tmp_path / "tuned")


def test_a_picture_of_too_many_pixels(model):
  content = io.BytesIO()
  PIL.Image.new("1", (10_000, 10_000)).save(content, "PNG")
  with pytest.raises(vqt_jax.UserError, match="decompression bomb"):
    model.predict(content.getvalue())
