"""Floating-point operations of matrix products: counted, and expected.

`matmuls` counts what a program does: it walks the traced program and multiplies
the body of a scan by its length (a compiler's cost analysis counts it once).
The other functions say, from the sizes alone, what a step ought to do. All are
2 per multiply-add. Letters as in `vit.py`, and C classes, F features.
"""

from collections.abc import Callable
import math
from typing import Any

from jax.extend import core

from vqt_jax import tuner as tuner_lib
from vqt_jax import vit


def matmuls(function: Callable[..., Any], *args: Any) -> int:
  """Operations of all matrix products and convolutions of one call.

  Args:
    function: made by `jax.jit`.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: a product sits in a loop whose length is not known.
  """
  return _of_jaxpr(function.trace(*args).jaxpr.jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
  return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    inner = math.prod(left[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = math.prod(kernel) // out_features
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  counts = [
      _of_jaxpr(getattr(inner, "jaxpr", inner))
      for value in params.values()
      for inner in (value if isinstance(value, (tuple, list)) else (value,))
      if isinstance(inner, (core.Jaxpr, core.ClosedJaxpr))
  ]
  if name == "while" and any(counts):
    raise ValueError("A matrix product sits in a loop of unknown length.")
  if name == "cond":
    return max(counts)
  return sum(counts) * (params["length"] if name == "scan" else 1)


def embedding(c: vit.ViTConfig) -> int:
  """The patches of one image."""
  return 2 * math.prod(c.grid) * math.prod(c.patch_size) * 3 * c.width


def blocks(c: vit.ViTConfig) -> int:
  """All blocks on the tokens of one image.

  Per block: projections to query, key, value and out (4 N D^2), scores and
  weighted values (2 N^2 D), MLP (2 N D M).
  """
  n, d = c.num_tokens, c.width
  return 2 * c.depth * (4 * n * d * d + 2 * n * n * d + 2 * n * d * c.mlp_dim)


def reading(tuner: tuner_lib.Tuner) -> int:
  """All queries through all blocks for one image, absorbed.

  Per query and block: q, u = W_k q, W_v on the mean and out (4 D^2), scores
  against the tokens and their weighted mean (2 H N D), MLP (2 D M).
  """
  c = tuner.config
  if not tuner.has_queries:
    return 0
  n, d = c.num_tokens, c.width
  per_query = 4 * d * d + 2 * c.num_heads * n * d + 2 * d * c.mlp_dim
  return 2 * c.depth * tuner.num_queries * per_query


def stream(c: vit.ViTConfig) -> int:
  """The frozen forward pass, per image."""
  return embedding(c) + blocks(c)


def reading_step(tuner: tuner_lib.Tuner) -> int:
  """All of a training step that is not the frozen forward pass, per image.

  Each product of the reading has one frozen operand (a weight or the tokens),
  so its gradient costs as much as its value: 2 times. The head (F C) has a
  value, a gradient for its kernel and, if queries are trained, one for the
  features: 3 times.
  """
  head = 2 * tuner.num_features * tuner.num_classes
  return 2 * reading(tuner) + (3 if tuner.has_queries else 2) * head


def finetune_step(c: vit.ViTConfig, num_classes: int) -> int:
  """A step of full fine-tuning, per image.

  3 times everything, but nothing needs the gradient of the image.
  """
  head = 2 * c.width * num_classes
  return 2 * embedding(c) + 3 * (blocks(c) + head)
