"""Tuned models as programs that need nothing of this package.

A program takes images of any size and number, prepares them, and answers with
all seeds of one model, or of several on one backbone. Its weights are in it.
"""

from collections.abc import Callable, Mapping
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from vqt_jax import errors
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.models import scaling
from vqt_jax.runtime import files
from vqt_jax.tuned import model as model_lib
from vqt_jax.tuned import resizing

PLATFORMS = ("cpu", "cuda", "tpu")
_ANY_IMAGES = "b, h, w, 3"


def make_program(
  models: Mapping[str, model_lib.Model],
) -> tuple[Callable[[Any, jax.Array], dict[str, jax.Array]], Any]:
  """Return a function of weights and images, and the weights.

  Args:
    models: on one backbone, prepared alike. An editor of the only model is
      folded, if it can be and there is one seed.

  Returns:
    The function, from uint8 (B, h, w, 3) to `logits` (B, R, C) of the R seeds
    and `probabilities` (B, C), their mean; of several models with the name of
    each and a slash before.
  """
  if len(models) == 1:
    models = {name: _folded(model) for name, model in models.items()}
  first = next(iter(models.values()))
  tuners = tuple(model.tuner for model in models.values())
  variables = tuple(model.variables for model in models.values())
  prefixes = [prefix_of(name, models) for name in models]
  prepare = make_prepare(**first.info["preprocessing"])

  def program(weights, images):
    logits = model_lib.classify(tuners, *weights, prepare(images))
    answers = {}
    for prefix, each in zip(prefixes, logits):
      each = each.astype(jnp.float32)
      answers[f"{prefix}logits"] = jnp.swapaxes(each, 0, 1)
      mean = jax.nn.softmax(each, axis=-1).mean(axis=0)
      answers[f"{prefix}probabilities"] = mean
    return answers

  return program, (variables, first.backbone.params)


def prefix_of(name: str, models: Mapping[str, Any]) -> str:
  """Return what is before the outputs of a model: nothing if it is alone."""
  return f"{name}/" if len(models) > 1 else ""


def _folded(model: model_lib.Model) -> model_lib.Model:
  if model.tuner.editor and model.num_seeds == 1:
    try:
      return model.folded()
    except errors.UserError:  # No plain ViT computes this.
      pass
  return model


def make_prepare(
  image_size: Any, value_range: str, resize: str = "", fit: str = ""
) -> Callable[[jax.Array], jax.Array]:
  """Make what `inputs.make_prepare` makes, for compiled programs.

  Returns:
    The function from uint8 (B, h, w, 3) to float32 (B, height, width, 3).
  """
  size = tuple(image_size)
  mean, std = (
    jnp.asarray(x, jnp.float32) for x in scaling.find_scaling(value_range)
  )

  def prepare(images):
    if fit:
      images = resizing.fit(images, size, fit).astype(jnp.float32)
    else:
      images = resizing.RESIZES[resize](images, size)
    return (images / 255 - mean) / std

  return prepare


def to_stablehlo(models: Mapping[str, model_lib.Model]) -> bytes:
  """Return a program as `jax.export.deserialize` takes it, for `PLATFORMS`."""
  program, weights = make_program(models)
  shape = jax.export.symbolic_shape(_ANY_IMAGES)
  exported = jax.export.export(
    jax.jit(lambda images: program(weights, images)), platforms=PLATFORMS
  )(jax.ShapeDtypeStruct(shape, jnp.uint8))
  return bytes(exported.serialize())


def write_saved_model(
  models: Mapping[str, model_lib.Model], folder: pathlib.Path
) -> None:
  """Write a program as a SavedModel of TensorFlow.

  Its signature `serving_default` takes `images`.

  Raises:
    UserError: the folder cannot be written.
  """
  from jax.experimental import jax2tf

  program, weights = make_program(models)
  convert = jax2tf.convert(
    program,
    polymorphic_shapes=[None, f"({_ANY_IMAGES})"],
    with_gradient=False,
    native_serialization_platforms=PLATFORMS,
  )
  leaves, tree = jax.tree.flatten(weights)
  module = tf.Module()
  module.weights = [tf.Variable(leaf, trainable=False) for leaf in leaves]
  images = tf.TensorSpec((None, None, None, 3), tf.uint8, name="images")

  @tf.function(autograph=False, input_signature=[images])
  def serve(images):
    return convert(jax.tree.unflatten(tree, module.weights), images)

  module.serve = serve
  signatures = {"serving_default": serve}
  try:
    tf.saved_model.save(module, os.fspath(folder), signatures=signatures)
  except tf.errors.OpError as e:
    raise errors.UserError(
      f"Cannot write {folder}: {files.first_line(e)}"
    ) from e


def to_onnx(models: Mapping[str, model_lib.Model]) -> bytes:
  """Return a program as an ONNX model with the input `images`.

  Raises:
    UserError: jax2onnx is not installed, or cannot convert it.
  """
  try:
    import jax2onnx
  except ImportError as e:
    raise errors.UserError(
      "ONNX needs two more packages: pip install jax2onnx onnxruntime"
    ) from e
  program, weights = make_program(models)
  shape = jax.export.symbolic_shape(_ANY_IMAGES)
  images = jax.ShapeDtypeStruct(shape, jnp.uint8)
  # It warns of each value whose type it does not know.
  logging.getLogger("onnx_ir").setLevel(logging.ERROR)
  # Traced first: jax2onnx replaces functions of jax.numpy that Flax uses.
  traced, outputs = jax.make_jaxpr(
    functools.partial(program, weights), return_shape=True
  )(images)
  try:
    return jax2onnx.to_onnx(
      jax.extend.core.jaxpr_as_fun(traced),
      [images],
      input_names=["images"],
      output_names=sorted(outputs),
    ).SerializeToString()
  except Exception as e:  # Of any kind, and of libraries below it.
    raise errors.UserError(
      f"jax2onnx cannot convert this model: {files.first_line(e)}"
    ) from e
