"""The network of `combo` on the sum of all blocks' projected tokens.

After https://arxiv.org/abs/2512.01405. A small transformer (pre-norm) reads the
sum, with positions and a class token of its own; what it makes of the class
token is what the head sees.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH = 64
LAYERS = 3
HEADS = 2
MLP = 4  # Hidden units of the MLP, in multiples of `WIDTH`.
DROPOUT = 0.1


class Layer(nn.Module):
  """Attention and MLP, each after a LayerNorm and added to its input."""

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> tuple[jax.Array, None]:
    width = x.shape[-1]
    drop = nn.Dropout(DROPOUT, deterministic=not training)
    x += drop(nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x)))
    hidden = nn.gelu(nn.Dense(MLP * width)(nn.LayerNorm()(x)))
    return x + drop(nn.Dense(width)(drop(hidden))), None


class Network(nn.Module):
  """Layers on tokens (B, N, `WIDTH`); float32."""

  @nn.compact
  def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
    """Return the class token after all layers, normalised, (B, `WIDTH`).

    With `training` a fraction of `DROPOUT` drops out; that takes the random
    key "dropout".
    """
    batch, count, width = x.shape
    small = nn.initializers.normal(0.02)
    first = self.param("class_token", small, (width,))
    first = jnp.broadcast_to(first, (batch, 1, width))
    x += self.param("positions", small, (count, width))
    x = nn.Dropout(DROPOUT, deterministic=not training)(x)
    layers = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,
      length=LAYERS,
    )
    x, _ = layers()(jnp.concatenate([first, x], axis=1), training)
    return nn.LayerNorm()(x[:, 0])


def gradient_numbers(count: int) -> int:
  """Count what a gradient keeps of an image with `count` tokens.

  Of each layer queries, keys, values, results, hidden units and their
  activations, and attention weights.
  """
  tokens = count + 1
  return LAYERS * tokens * ((8 + 3 * MLP) * WIDTH + 2 * HEADS * tokens)
