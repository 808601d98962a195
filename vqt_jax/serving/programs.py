"""Tuned models on one backbone, compiled for batches of a few sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from vqt_jax.tuned import inputs
from vqt_jax.tuned import model as model_lib

SIZES = sorted({inputs.batch_size(n + 1) for n in range(inputs.BATCH)})


@dataclasses.dataclass(frozen=True)
class Answer:
  """Answers of all models to an image.

  Attributes:
    probabilities: by model, (C,).
    attention: by model with queries, (L, rows, columns): how much of their
      attention a patch has, 1 if all have the same; None if not asked for.
  """

  probabilities: dict[str, np.ndarray]
  attention: dict[str, np.ndarray] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """Models, their weights on the device, and the programs that answer.

  Attributes:
    models: by name, on one backbone.
    params: of the backbone.
    variables: of each model.
    classify: size of a batch -> program to the probabilities (B, C) of each
      model.
    look: program from one image to the attention (L, 1, N) of the queries of
      each model that has some.
  """

  models: Mapping[str, model_lib.Model]
  params: Any
  variables: tuple[Any, ...]
  classify: Mapping[int, Any]
  look: Any

  @property
  def first(self) -> model_lib.Model:
    return next(iter(self.models.values()))

  def answer(
    self, images: Sequence[np.ndarray], looks: Sequence[bool]
  ) -> list[Answer]:
    """Answer images in one pass, and one more for each attention.

    Args:
      images: at most `inputs.BATCH`, as `first.prepare` makes them.
      looks: for each image, whether attention is asked for.
    """
    batch = inputs.pad(list(images), inputs.batch_size(len(images)))
    found = self.classify[len(batch)](self.variables, self.params, batch)
    each = zip(*jax.device_get(found))  # Ends with the images or the padding.
    return [
      Answer(
        dict(zip(self.models, probabilities)),
        self._attention(image) if look else None,
      )
      for image, look, probabilities in zip(images, looks, each)
    ]

  def _attention(self, image: np.ndarray) -> dict[str, np.ndarray]:
    """Attention of each model with queries, as in `Answer`."""
    c = self.first.backbone.config
    names = [name for name, m in self.models.items() if m.tuner.has_queries]
    found = self.look(self.variables, self.params, image[None])
    patches = [x[:, 0, c.num_prefix_tokens :] for x in jax.device_get(found)]
    return {
      name: (x / x.mean(axis=1, keepdims=True)).reshape(-1, *c.grid)
      for name, x in zip(names, patches)
    }


def compile_programs(
  models: Mapping[str, model_lib.Model], before: Programs | None = None
) -> Programs:
  """Compile the programs of models, and run the largest once.

  Args:
    models: by name, on one backbone.
    before: programs of other models on that backbone, which stays on the
      device. JAX compiles only those that differ.
  """
  members = tuple(models.values())
  backbone = members[0].backbone
  params = before.params if before else jax.device_put(backbone.params)
  tuners = tuple(model.tuner for model in members)
  variables = jax.device_put(tuple(model.variables for model in members))

  def compiled(function, size):
    shape = (size, *backbone.config.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    return function.lower(tuners, variables, params, images).compile()

  programs = Programs(
    models,
    params,
    variables,
    {size: compiled(_classify, size) for size in SIZES},
    compiled(_look, 1),
  )
  # The first image that is prepared may import TensorFlow.
  image = programs.first.prepare(np.zeros((9, 9, 3), np.uint8))
  programs.answer([image] * inputs.BATCH, [True] + [False] * (inputs.BATCH - 1))
  return programs


@functools.partial(jax.jit, static_argnums=0)
def _classify(tuners, variables, params, images):
  logits = model_lib.classify(tuners, variables, params, images)
  return tuple(jax.nn.softmax(x, axis=-1).mean(axis=0) for x in logits)


@functools.partial(jax.jit, static_argnums=0)
def _look(tuners, variables, params, images):
  """Attention (L, B, N) of queries: mean over seeds, heads and queries."""
  asked = [each for each in zip(tuners, variables) if each[0].has_queries]
  if not asked:
    return ()
  found = model_lib.attention(*zip(*asked), params, images)
  return tuple(x.mean(axis=(0, 3, 4)) for x in found)
