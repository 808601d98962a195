"""The weights in the repository are whole, safe to read and really trained."""

from importlib import resources
import pathlib

import jax
import numpy as np
from sklearn import datasets
from sklearn import linear_model

from scripts import cpu_vit
from tests import helpers
import vqt_jax
from vqt_jax import checkpoints
from vqt_jax.models import vit

PATH = resources.files("vqt_jax") / "assets" / "fashion_vit.npz"
# The first images of Fashion-MNIST's test split (MIT licence, Zalando SE).
FASHION = pathlib.Path(__file__).parent / "goldens" / "fashion_test.npz"
MAX_BYTES = 6_000_000


def fresh(trained: vqt_jax.Backbone) -> vqt_jax.Backbone:
  """The same architecture before any training."""
  params = jax.jit(vit.init_params, static_argnums=0)(
    trained.config, jax.random.key(0)
  )
  return vqt_jax.Backbone(trained.config, params)


def model_input(images: np.ndarray) -> np.ndarray:
  """Grey images (n, h, w) in 0..1 to (n, h, w, 3) in -1..1."""
  x = 2 * images.astype(np.float32) - 1
  return x[..., None].repeat(3, axis=-1)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
  """scikit-learn's first digits, resized to 28 pixels, and their labels."""
  data = datasets.load_digits()
  shape = (count, 28, 28)
  x = jax.image.resize(data.images[:count] / 16, shape, "bilinear")
  return model_input(np.asarray(x)), data.target[:count]


def probe_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
  """Of a linear classifier fitted to the first half, on the second."""
  half = len(labels) // 2
  features = features - features[:half].mean(axis=0)
  features /= features[:half].std(axis=0)
  classifier = linear_model.LogisticRegression(C=0.01, max_iter=100)
  classifier.fit(features[:half], labels[:half])
  return classifier.score(features[half:], labels[half:])


def test_file_is_small_and_has_the_leaves_of_its_architecture():
  assert PATH.stat().st_size <= MAX_BYTES
  with np.load(PATH, allow_pickle=False) as file:
    assert all(file[name].dtype == np.float32 for name in file.files)
  backbone = checkpoints.load_backbone(PATH)
  shapes = jax.tree.map(np.shape, vit.param_shapes(backbone.config))
  assert jax.tree.map(np.shape, backbone.params) == shapes
  config = backbone.config
  assert (config.width, config.depth, config.mlp_dim) == (128, 6, 512)
  assert (config.patch_size, config.image_size) == ((4, 4), (28, 28))
  assert (config.num_heads, config.num_classes) == (4, 10)
  assert (config.pool_type, backbone.value_range) == ("tok", "-1..1")


def test_head_recognises_clothes():
  backbone = checkpoints.load_backbone(PATH)
  with np.load(FASHION, allow_pickle=False) as file:
    images, labels = model_input(file["image"] / 255), file["label"]
  predicted = np.asarray(backbone(images).logits).argmax(axis=-1)
  assert (predicted == labels).mean() > 0.75


def test_features_of_digits_are_better_than_those_of_random_weights():
  trained = checkpoints.load_backbone(PATH)
  images, labels = digits(240)
  accuracies = {}
  for name, backbone in (("trained", trained), ("fresh", fresh(trained))):
    final = np.asarray(backbone(images).final)
    accuracies[name] = probe_accuracy(final, labels)
  assert accuracies["trained"] > accuracies["fresh"] + 0.03, accuracies


def test_pretraining_trains_the_model_that_is_loaded():
  backbone = helpers.tiny_backbone(num_classes=5)
  grey = np.random.default_rng(0).uniform(-1, 1, (4, 12, 12))
  kept = np.tile(np.arange(9), (4, 1))
  params = cpu_vit.unstacked(backbone.params)
  logits = cpu_vit.logits(backbone.config, params, grey, kept)
  expected = backbone(model_input((grey + 1) / 2)).logits
  helpers.assert_close(logits, expected, tolerance=0.02)
  again = cpu_vit.stacked(params)
  jax.tree.map(np.testing.assert_array_equal, again, backbone.params)
