"""What Python users call: what they may pass, and what they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.models import editors

CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def make_model(method="linear", **changes):
  """A model with random weights, and images that it takes."""
  backbone = helpers.tiny_backbone(depth=1, **changes)
  tuner = vqt_jax.make_tuner(method, backbone, CLASSES, target_size=48)
  variables = helpers.random_variables(tuner)
  images = helpers.tiny_examples(backbone, 3, CLASSES)["image"]
  return helpers.tuned_model(backbone, tuner, variables), images


# Images.

IMAGES = np.zeros((2, 12, 12, 3), np.float32)


@pytest.mark.parametrize(
  "value_range, images, words",
  [
    ("-1..1", np.uint8(IMAGES), r"found uint8 .*: images / 127.5 - 1\.$"),
    ("0..1", np.int64(IMAGES), r"found int64 .*: images / 255\.$"),
    ("imagenet", IMAGES > 0, r"found bool .*find_scaling\('imagenet'\)\.$"),
    ("-1..1", IMAGES[0], r"found float32 \(12, 12, 3\)\. .*images\[None\]"),
    ("-1..1", IMAGES.swapaxes(1, 3), r"\(2, 3, 12, 12\)\. Three channels "),
    ("-1..1", IMAGES[..., :1], r"\(B, 12, 12, 3\) .* Three channels come"),
    ("-1..1", IMAGES[:, :8], r"\(2, 8, 12, 3\)\. .*image_size=\(8, 12\)\)"),
    ("-1..1", np.uint8(IMAGES[0]), r"\[None\]\. Scale pixels of 0..255: "),
    ("-1..1", [IMAGES[0], IMAGES[0, 0]], "images: expected one array"),
    ("-1..1", IMAGES + 255, r"values of -1..1 \(-1 to 1\), found 255 to 2"),
    ("-1..1", IMAGES - 2.1, "found -2.1 to -2.1. Scale pixels"),
    ("0..1", IMAGES - 1, r"0..1 \(0 to 1\), found -1 to -1"),
    ("imagenet", IMAGES + 255, r"imagenet \(-2.12 to 2.64\), found 255"),
    ("-1..1", IMAGES + np.inf, "found inf to inf"),
    ("-1..1", IMAGES + np.nan, "864 of 864 numbers are NaN"),
  ],
)
def test_images_that_are_refused(value_range, images, words):
  backbone = vqt_jax.Backbone(helpers.tiny_config(), None, value_range)
  with pytest.raises(vqt_jax.UserError, match=words):
    backbone(images)


@pytest.mark.parametrize(
  "value_range, low, high",
  [("-1..1", -1.2, 1.2), ("0..1", -0.1, 1.1), ("imagenet", -2.2, 2.7)],
)
@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
def test_images_that_are_taken(value_range, low, high, kind):
  """Also such as bicubic resizing makes, which overshoots."""
  backbone = vqt_jax.Backbone(helpers.tiny_config(), None, value_range)
  images = IMAGES.copy()
  images[0], images[1] = low, high
  images = images.astype(jnp.dtype(kind))
  assert backbone.checked(images) is images
  assert backbone.checked(images[:0]).shape == (0, 12, 12, 3)
  assert backbone.checked(list(images)).dtype == images.dtype
  assert backbone.checked(jnp.asarray(images)).shape == images.shape
  with pytest.raises(vqt_jax.UserError, match="expected values of"):
    backbone.checked(jnp.asarray(images) + 9)


def test_all_that_takes_images_checks_them():
  model, images = make_model("vqt")
  pixels = np.uint8(images)
  for take in (
    model,
    model.backbone,
    jax.jit(model),
    lambda x: vqt_jax.apply(model.backbone, model.tuner, {}, x),
  ):
    with pytest.raises(vqt_jax.UserError, match="found uint8"):
      take(pixels)


# Export.


@pytest.mark.parametrize(
  "method, pool_type, called_with",
  [
    ("vqt", "tok", (1, 3)),
    ("head2toe+vpt_deep", "map", (1,)),
    ("vqt+ssf", "gap", ()),
    ("linear", "0", ()),
  ],
)
def test_any_number_of_images_is_exported_at_once(
  method, pool_type, called_with
):
  model, images = make_model(method, pool_type=pool_type)
  (count,) = jax.export.symbolic_shape("b")
  shape = jax.ShapeDtypeStruct((count, *images.shape[1:]), np.float32)
  exported = jax.export.export(jax.jit(model))(shape)
  for some in called_with:
    expected = model(images)[:, :some]
    helpers.assert_close(exported.call(images[:some]), expected)
  stream = jax.eval_shape(lambda x: model.backbone(x), shape)
  assert stream.blocks.shape[1] == count


# What is printed.


def test_one_line_is_printed():
  model, images = make_model("lora")
  backbone = (
    "Backbone(ViT-16x1/4, 1 blocks of width 16, 12x12 px, inputs -1..1, from"
    " '')"
  )
  assert repr(model.backbone) == backbone
  assert repr(model) == f"Model(lora, 3 classes, 1 seed, {backbone})"
  variables = jax.tree.map(lambda x: x[0], model.variables)
  out = vqt_jax.apply(model.backbone, model.tuner, variables, images)
  assert repr(out) == (
    "Output(logits=float32[3, 3], features=float32[3, 16], queries=None)"
  )
  assert repr(model.backbone(images)).startswith(
    "Stream(tokens=float32[1, 3, 10, 16], blocks=float32[1, 3, 10, 16],"
  )


# Arguments.


def test_a_tuner_is_made_for_a_backbone_or_its_config():
  config = helpers.tiny_config()
  made = vqt_jax.make_tuner("lora", vqt_jax.Backbone(config, None), 3, rank=2)
  options = editors.Options(rank=2)
  assert made == vqt_jax.make_tuner("lora", config, 3, options=options)
  assert made.options.rank == 2 and made.config == config


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"backbone": "vit.npz"}, "backbone: expected a Backbone or its ViTCo"),
    ({"num_querys": 3}, "'num_querys'. Did you mean num_queries"),
    ({"rnak": 3}, "Unknown option of make_tuner 'rnak'. Did you mean rank"),
    ({"num_classes": "10"}, "num_classes: expected a whole number of at l"),
    ({"num_classes": 1}, "num_classes: expected .* at least 2, found 1"),
    ({"num_queries": 2.0}, r"num_queries: expected .* found 2\.0"),
    ({"num_queries": (2,)}, r"num_queries: expected .* found \(2,\)"),
    ({"num_queries": True}, "num_queries: expected .* found True"),
    ({"normalize": 1}, "normalize: expected True or False, found 1"),
    ({"combine": "sum"}, "Unknown combine 'sum'"),
    ({"method": None}, "method: expected text, found None"),
    ({"options": {"rank": 2}}, "options: expected a .*editors.Options"),
    ({"options": editors.Options(rank=0)}, "rank: expected .* least 1, fo"),
    ({"alpha": float("nan")}, "alpha: expected a number .* found nan"),
    ({"last_blocks": 0}, "last_blocks: expected .* at least 1, found 0"),
  ],
)
def test_arguments_of_make_tuner(changes, words):
  given = dict(method="vqt", backbone=helpers.tiny_config(), num_classes=3)
  with pytest.raises(vqt_jax.UserError, match=words):
    vqt_jax.make_tuner(**given | changes)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"image_sise": 8}, "'image_sise'. Did you mean image_size"),
    ({"image_size": "224"}, "image_size must be .*, not '224'"),
    ({"image_size": (224,)}, r"image_size must be .*, not \(224,\)"),
    ({"image_size": 0}, "image_size must be a positive number .* not 0"),
    ({"image_size": True}, "image_size must be .* not True"),
    ({"trained_size": 0.5}, "trained_size must be .* not 0.5"),
    ({"variant": 16}, "variant must be text, .* not 16"),
    ({"gelu": True}, "gelu must be one of tanh, exact, quick, not True"),
    ({"source": None}, "source must be a path, .* not None"),
  ],
)
def test_arguments_of_load_backbone(changes, words):
  given = dict(source=helpers.GOLDENS / "bigvision" / "bv_tok.npz")
  with pytest.raises(vqt_jax.UserError, match=words):
    vqt_jax.load_backbone(**given | changes)
