"""The estimator of scikit-learn."""

import pickle

import numpy as np
import PIL.Image
import pytest
import sklearn.base
import sklearn.model_selection
import sklearn.pipeline

from tests import faults
from tests import helpers
import vqt_jax
from vqt_jax.training import preemption

CLASSES = np.array(["blue", "green", "red"])


@pytest.fixture(scope="module")
def squares():
  """Images of a noisy colour, uint8 (n, 8, 8, 3), and its name."""
  rng = np.random.default_rng(0)
  x = rng.integers(0, 120, (36, 8, 8, 3), np.uint8)
  number = np.arange(36) % 3
  x[np.arange(36), ..., 2 - number] += 130
  return x, CLASSES[number]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  path = tmp_path_factory.mktemp("vit") / "vit.npz"
  vqt_jax.save_npz(path, helpers.tiny_backbone(image_size=(8, 8)))
  settings = dict(image_size=8, epochs=15, lr=(4.0,), seeds=(1, 2))
  settings |= {"options": {"batch_size": 12, "keep_fraction": 1.0}}
  return lambda **changes: vqt_jax.Classifier(path, **settings | changes)


@pytest.fixture(scope="module")
def trained(make, squares):
  return make().fit(*squares)


def test_fit_and_predict(trained, squares):
  x, y = squares
  assert list(trained.classes_) == list(CLASSES)
  assert trained.score(x, y) > 0.8
  p = trained.predict_proba(x)
  assert p.shape == (36, 3)
  np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
  assert list(trained.predict(x[:2])) == list(CLASSES[p[:2].argmax(axis=1)])
  assert trained.model_.num_seeds == 2


def test_files_and_arrays_train_alike(trained, make, squares, tmp_path):
  x, y = squares
  paths = [tmp_path / f"{i}.png" for i in range(len(x))]
  for path, each in zip(paths, x):
    PIL.Image.fromarray(each).save(path)
  found = make().fit(paths, y)
  np.testing.assert_array_equal(
    found.predict_proba(paths), trained.predict_proba(x)
  )


def test_images_are_upright_in_training_too(trained, make, squares, tmp_path):
  """As they are when they are predicted."""
  x, y = squares
  exif = PIL.Image.Exif()
  exif[0x0112] = 3  # Upside down.
  turned = []
  for i, each in enumerate(x):
    image = PIL.Image.fromarray(np.ascontiguousarray(each[::-1, ::-1]))
    image.save(tmp_path / f"{i}.png", exif=exif)
    turned.append(PIL.Image.open(tmp_path / f"{i}.png"))
  found = make().fit(turned, y)
  np.testing.assert_array_equal(
    found.predict_proba(turned), trained.predict_proba(x)
  )


def test_grey_images_and_numbers(make, squares):
  x, y = (each[::2] for each in squares)  # As many as in a fold below.
  found = make(lr=1.0, seeds=3, epochs=1).fit(x[..., 0], y == "red")
  assert found.predict(x[..., 0]).dtype == bool
  assert pickle.loads(pickle.dumps(found)).predict_proba(x).shape == (18, 2)


def test_what_is_saved_is_loaded(trained, squares, tmp_path):
  x, _ = squares
  trained.save(tmp_path / "model")
  source = trained.model_.backbone.source
  found = vqt_jax.load(tmp_path / "model", backbone=source)
  np.testing.assert_array_equal(
    found.predict_proba(x), trained.predict_proba(x)
  )
  assert found.classes == tuple(CLASSES)
  assert "| not tested |" in (tmp_path / "model" / "README.md").read_text()


def test_scikit_learn_takes_it(make, squares):
  x, y = squares
  y = y == "red"
  estimator = make(seeds=(1,), epochs=2)
  again = sklearn.base.clone(estimator)
  assert again.get_params() == estimator.get_params()
  pipeline = sklearn.pipeline.Pipeline([("vit", again)])
  found = sklearn.model_selection.cross_val_score(pipeline, x, y, cv=2)
  assert found.shape == (2,) and (found > 0).all()


@pytest.mark.parametrize(
  "x, y, words",
  [
    ([], [], "at least two classes, found none"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, "two classes, found 0"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, 1], "expected 4 labels"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, "a", None, 1], "labels that can be"),
    (np.zeros((4, 8, 8, 3)), [0, 0, 1, 1], "found float64"),
    (
      list("abcd"),
      [0, 0, 1, 1],
      "4 of 4 images cannot be used, such as .*/a: there is no such file",
    ),
  ],
)
def test_bad_input(make, x, y, words):
  with pytest.raises(vqt_jax.UserError, match=words):
    make().fit(x, y)


def test_a_full_temporary_folder(make, squares):
  with pytest.raises(vqt_jax.UserError, match="temporary file: .* Set TMPDIR"):
    with faults.largest_file(0):
      make().fit(*squares)


def test_it_has_to_be_trained(make, tmp_path):
  with pytest.raises(sklearn.exceptions.NotFittedError):
    make().predict(np.zeros((1, 8, 8, 3), np.uint8))
  with pytest.raises(sklearn.exceptions.NotFittedError):
    make().save(tmp_path)


@pytest.mark.parametrize("name", ["task", "splits.test", "fit", "num_classes"])
def test_options_that_describe_data(make, squares, name):
  with pytest.raises(
    vqt_jax.UserError, match=f"options: '{name}' describes data"
  ):
    make(options={name: "x"}).fit(*squares)


def test_a_fit_that_is_interrupted(make, squares, monkeypatch):
  def stop(*args):
    raise preemption.Stopped

  monkeypatch.setattr("vqt_jax.training.run.run", stop)
  with pytest.raises(KeyboardInterrupt):
    make().fit(*squares)
