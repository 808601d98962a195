"""Floating-point operations that a step ought to do, from the sizes alone.

`vqt_jax.planning.cost.matmuls` counts what it does. 2 per multiply-add.
Letters as in `vit.py`, and C classes, F features.
"""

import math

from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit_config


def embedding(c: vit_config.ViTConfig) -> int:
  """The patches of one image."""
  return 2 * math.prod(c.grid) * math.prod(c.patch_size) * 3 * c.width


def blocks(c: vit_config.ViTConfig) -> int:
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


def stream(c: vit_config.ViTConfig) -> int:
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


def finetune_step(c: vit_config.ViTConfig, num_classes: int) -> int:
  """A step of full fine-tuning, per image.

  3 times everything, but nothing needs the gradient of the image.
  """
  head = 2 * c.width * num_classes
  return 2 * embedding(c) + 3 * (blocks(c) + head)
