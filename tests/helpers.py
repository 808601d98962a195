"""What several tests need: golden files and tiny models."""

import contextlib
import pathlib

import jax
import matplotlib.image
import numpy as np
import pytest

import vqt_jax
from vqt_jax import accuracy
from vqt_jax import checkpoints
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.serving import programs
from vqt_jax.tuned import bundle

ROOT = pathlib.Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
TOLERANCE = 2e-5


def golden(name: str) -> dict[str, np.ndarray]:
  """Arrays that the official VQT program computed."""
  with np.load(GOLDENS / "vqt" / f"{name}.npz", allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def golden_backbone(pool_type: str | None = None) -> vqt_jax.Backbone:
  """The checkpoint behind all VQT goldens."""
  path = GOLDENS / "vqt" / "backbone.npz"
  return checkpoints.load_backbone(path, gelu="exact", pool_type=pool_type)


def tiny_config(**changes) -> vit_config.ViTConfig:
  sizes = dict(width=16, depth=3, mlp_dim=32, num_heads=2)
  images = dict(patch_size=(4, 4), image_size=(12, 12))
  return vit_config.ViTConfig(**{**sizes, **images, **changes})


def tiny_backbone(seed: int = 0, **changes) -> vqt_jax.Backbone:
  """A random ViT in which every leaf matters (no zeros, no ones)."""
  config = tiny_config(**changes)
  return vqt_jax.Backbone(config, _draw(vit.param_shapes(config), seed))


def random_variables(tuner, seed: int = 0):
  """Random {"tuner", "head"} in which every leaf matters; nothing compiles."""
  return _draw(tuner.shapes(), seed)


def _draw(shapes, seed):
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  arrays = [
    (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
    for leaf in leaves
  ]
  return jax.tree.unflatten(tree, arrays)


def tuned_model(backbone, tuner, *seeds) -> vqt_jax.Model:
  """A model of seeds, each with variables {"tuner", "head"}."""
  c = backbone.config
  info = {
    "task": "squares",
    "classes": [f"class {i}" for i in range(tuner.num_classes)],
    "preprocessing": {
      "image_size": list(c.image_size),
      "value_range": backbone.value_range,
      "resize": "bilinear",
    },
    "seeds": list(range(len(seeds))),
    "results": {
      "test_accuracy": accuracy.summary([0], [0.5], 10),
      "chosen": {"lr": 0.1},
    },
  }
  variables = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
  return vqt_jax.Model(backbone, tuner, variables, tuple(info["classes"]), info)


def write_bundle(folder, source, model, **changes) -> None:
  bundle.write(
    folder,
    str(source),
    model.backbone,
    model.tuner,
    model.variables,
    model.info | changes,
  )


@contextlib.contextmanager
def few_batch_sizes():
  """Let a server compile for few sizes, which is most of what it takes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(programs.inputs, "BATCH", 4)
    patch.setattr(programs.inputs, "batch_size", lambda n: 1 if n == 1 else 4)
    patch.setattr(programs, "SIZES", [1, 4])
    yield


def write_linear_bundle(folder, source, seed: int = 0) -> None:
  """Write a bundle of the linear probe, and its tiny backbone to `source`."""
  backbone = tiny_backbone(seed, depth=1)
  tuner = vqt_jax.make_tuner("linear", backbone, 3)
  model = tuned_model(backbone, tuner, tuner.init(jax.random.key(0)))
  vqt_jax.save_npz(source, backbone)
  write_bundle(folder, source, model)


def tiny_examples(backbone, count: int, classes: int, seed: int = 1):
  rng = np.random.default_rng(seed)
  shape = (count, *backbone.config.image_size, 3)
  return {
    "image": rng.uniform(-1, 1, shape).astype(np.float32),
    "label": rng.integers(0, classes, count).astype(np.int32),
  }


def colours(path) -> int:
  """How many a picture has."""
  pixels = (255 * matplotlib.image.imread(path)).astype(np.uint8)
  return len(np.unique(pixels.view(np.uint32)))


def assert_close(actual, expected, tolerance: float = TOLERANCE, name=""):
  """Largest difference, against the largest value or 1, below `tolerance`."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
  scale = max(1.0, float(np.abs(expected).max(initial=0)))
  worst = float(np.abs(actual - expected).max(initial=0)) / scale
  assert worst <= tolerance, f"{name}: off by {worst:.2e} of {scale:.3g}"
