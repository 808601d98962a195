"""`vqt-jax export`: programs answer as the models in them do."""

import os
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import sklearn.datasets
import tensorflow as tf

from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax import export
from vqt_jax.data import decoding
from vqt_jax.data import preprocess
from vqt_jax.tuned import arguments
from vqt_jax.tuned import exporting
from vqt_jax.tuned import resizing
from vqt_jax.tuned import run_exported


def make_model(method="vqt", num_seeds=2, fit="squash", backbone=None):
  backbone = backbone or helpers.tiny_backbone(depth=1)
  tuner = vqt_jax.make_tuner(method, backbone, 3)
  seeds = [helpers.random_variables(tuner, i) for i in range(num_seeds)]
  model = helpers.tuned_model(backbone, tuner, *seeds)
  model.info["preprocessing"] |= {"fit": fit} if fit else {}
  model.info["preprocessing"] |= {} if not fit else {"resize": ""}
  return model


def pixels(*shape):
  return np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)


IMAGES = [pixels(1, 30, 20), pixels(3, 9, 14)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with bundles, on a backbone with rotary positions, and a file."""
  place = tmp_path_factory.mktemp("place")
  (place / "file").touch()
  source = helpers.GOLDENS / "foreign" / "hf_dinov3"
  backbone = vqt_jax.load_backbone(shutil.copytree(source, place / "dinov3"))
  for method, seeds in (("vqt", 2), ("linear", 1)):
    model = make_model(method, seeds, backbone=backbone)
    helpers.write_bundle(place / method, place / "dinov3", model)
  return place


@pytest.fixture
def start(place, monkeypatch, capsys):
  monkeypatch.chdir(place)

  def start(*arguments):
    status = export.main(["export", *arguments])
    return status, capsys.readouterr().err

  return start


# The program.


def check(models, answers, images):
  for name, model in models.items():
    prefix = exporting.prefix_of(name, models)
    logits = np.swapaxes(answers[f"{prefix}logits"], 0, 1)
    helpers.assert_close(logits, model.logits(images), 1e-5)
    found = answers[f"{prefix}probabilities"]
    helpers.assert_close(found, model.predict_proba(images), 1e-5)


@pytest.mark.parametrize(
  "methods, seeds, fit",
  [
    (["linear"], 1, ""),
    (["vqt", "linear", "vpt_deep"], 2, "pad"),
  ],
)
def test_stablehlo_answers_as_the_models_do(methods, seeds, fit):
  """For any number and size of images."""
  models = {name: make_model(name, seeds, fit) for name in methods}
  content = exporting.to_stablehlo(models)
  exported = jax.export.deserialize(bytearray(content))
  assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
  for images in IMAGES:
    check(models, exported.call(images), images)


@pytest.mark.parametrize("seeds, folded", [(1, True), (2, False)])
def test_an_editor_is_folded(seeds, folded, monkeypatch):
  """Where that is one ViT; else it edits the stream in the program."""
  model, seen = make_model("lora", seeds), []
  classify = exporting.model_lib.classify

  def watched(tuners, *rest):
    seen.extend(tuners)
    return classify(tuners, *rest)

  monkeypatch.setattr(exporting.model_lib, "classify", watched)
  program, weights = exporting.make_program({"a": model})
  answers = jax.jit(program)(weights, IMAGES[1])
  assert [tuner.editor is None for tuner in seen] == [folded]
  check({"a": model}, answers, IMAGES[1])


# Resizing.


@pytest.mark.parametrize("how", decoding.FITS)
def test_images_fit_as_pillow_makes_them(how):
  b, h, w = jax.export.symbolic_shape("b, h, w")
  run = jax.jit(lambda images: resizing.fit(images, (28, 20), how))
  spec = jax.ShapeDtypeStruct((b, h, w, 3), "uint8")
  run = jax.export.export(run)(spec).call
  photo = sklearn.datasets.load_sample_images().images[0]
  # Taller than wide: Pillow 13 begins with the rows.
  images = [photo, photo[:300, :50], pixels(1, 3)]
  if how == "squash":
    images += [pixels(9, 50), pixels(28, 20)]
  for image in images:
    found = np.asarray(run(image[None]))[0].astype(int)
    gap = np.abs(found - decoding.fit(image, (28, 20), how))
    if how == "crop":
      assert gap.max() <= 1 and gap.mean() < 0.1
    else:
      assert gap.max() == 0


@pytest.mark.parametrize("resize", preprocess.RESIZES)
def test_images_are_resized_as_tensorflow_does(resize):
  run = jax.jit(lambda images: resizing.RESIZES[resize](images, (28, 20)))
  for image in (pixels(40, 50), pixels(5, 9), pixels(28, 20)):
    expected = preprocess.RESIZES[resize](image.astype(np.float32), (28, 20))
    found = run(image[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


# The command.


def test_stablehlo(start, tmp_path):
  output = tmp_path / "new" / "a.stablehlo"
  status, said = start("vqt", f"--output={output}")
  assert status == 0, said
  assert "3 images in a new process: logits differ by" in said
  assert sorted(os.listdir(output.parent)) == [
    "a.stablehlo",
    "a.stablehlo.json",
  ]
  info = runs.read_json(output.with_name("a.stablehlo.json"))
  assert info["models"]["vqt"]["classes"] == ["class 0", "class 1", "class 2"]
  assert info["outputs"]["logits"] == "float32 (b, 2, 3)"
  assert info["logits_differ"] < 1e-5


def test_onnx_without_its_packages(start, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  status, said = start("linear", f"--output={tmp_path / 'a.onnx'}")
  assert status == 2 and "pip install jax2onnx onnxruntime" in said
  assert not os.listdir(tmp_path)


def test_short_names_of_runs():
  short = arguments.short_names
  assert short(["a/b", "c/tuned/", "."]) == ["b", "c", "."]
  assert short(["a/b", "c/b"]) == ["a/b", "c/b"]


def test_saved_model_of_several(start, tmp_path, monkeypatch):
  """It runs in this process, as TensorFlow takes seconds to import."""

  def run(command, **options):
    try:
      run_exported.main(*map(str, command[-3:]))
    except tf.errors.OpError as e:
      return subprocess.CompletedProcess(command, 1, stderr=str(e))
    return subprocess.CompletedProcess(command, 0)

  here = types.SimpleNamespace(run=run)
  monkeypatch.setattr(export, "subprocess", here)
  output = tmp_path / "both" / "1"
  status, said = start("vqt", "linear", f"--output={output}")
  if "this TensorFlow is too old for JAX" in said:
    pytest.skip(said.splitlines()[-1])
  assert status == 0, said
  assert os.listdir(output.parent) == ["1"]
  info = runs.read_json(output / "export.json")
  assert list(info["outputs"]) == [
    f"{model}/{output}"
    for model in ("vqt", "linear")
    for output in ("logits", "probabilities")
  ]


@pytest.mark.parametrize("difference", [1e-3, np.nan])
def test_what_answers_otherwise_is_not_kept(
  difference, start, tmp_path, monkeypatch
):
  monkeypatch.setattr(export, "compare", lambda *args: difference)
  to_bytes = "vqt_jax.tuned.exporting.to_stablehlo"
  monkeypatch.setattr(to_bytes, lambda models: b"wrong")
  status, said = start("linear", f"--output={tmp_path / 'a.stablehlo'}")
  assert status == 2 and "answers otherwise than the run" in said
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "No run given"),
    (["vqt"], "No --output given"),
    (["none", "--output=a"], "none holds no tuned model"),
    (["vqt", "--output=a.pb"], "expected NAME.stablehlo"),
    (["vqt", "--output=gs://a/b"], "on this machine"),
    (["vqt", "--output=linear"], "there is linear already"),
    (["vqt", "none.png", "--output=a"], "there is no such file"),
    (["vqt", "--output=file/a"], "Cannot write file/a: "),
  ],
)
def test_bad_input(start, place, arguments, words):
  before = sorted(os.listdir(place))
  status, said = start(*arguments)
  assert status == 2 and "Traceback" not in said
  assert re.search(words, said), said
  assert sorted(os.listdir(place)) == before
