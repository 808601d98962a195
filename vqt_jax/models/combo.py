"""The network of `combo` on the sum of all blocks' projected tokens.

After https://arxiv.org/abs/2512.01405. A small transformer (pre-norm) reads the
sum, with positions and a class token of its own; what it makes of the class
token is what the head sees.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqt_jax.models import vit_config

WIDTH = 64
LAYERS = 3
HEADS = 2
MLP = 4  # Hidden units of the MLP, in multiples of `WIDTH`.
DROPOUT = 0.1
# Blocks that add nothing to the sum of an image, in training; as a share.
BLOCK_DROPOUT = 0.4


def draw_blocks(key: jax.Array, depth: int, batch: int) -> jax.Array:
  """Draw what drops out of the sums of a batch.

  Returns:
    Factors (depth, batch) of what blocks add: 0, or more than 1 so that they
    are 1 on average. Padding of the batch changes no other image's.
  """
  kept = 1 - BLOCK_DROPOUT
  return jax.random.bernoulli(key, kept, (batch, depth)).T / kept


class Layer(nn.Module):
  """Attention and MLP, each after a LayerNorm and added to its input.

  Attributes:
    count: tokens of an image.
  """

  count: int

  @nn.compact
  def __call__(self, x: jax.Array, training: bool) -> jax.Array:
    """Apply the layer to the tokens of all images, (B * count, `WIDTH`).

    In training channels of an image drop out, for all of its tokens at once.
    """
    by_image = (-1, self.count, WIDTH)

    def drop(x):
      layer = nn.Dropout(
        DROPOUT, broadcast_dims=(1,), deterministic=not training
      )
      return layer(x.reshape(by_image)).reshape(x.shape)

    # Tokens of all images are rows of one matrix: XLA computes gradients of
    # kernels twice as fast as from (B, count, WIDTH), on a CPU.
    projected = nn.Dense(3 * WIDTH)(nn.LayerNorm()(x))
    heads = (-1, self.count, HEADS, WIDTH // HEADS)
    q, k, v = (x.reshape(heads) for x in jnp.split(projected, 3, axis=-1))
    attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    x += drop(nn.Dense(WIDTH)(attended))
    hidden = nn.gelu(nn.Dense(MLP * WIDTH)(nn.LayerNorm()(x)))
    return x + drop(nn.Dense(WIDTH)(hidden))


class Network(nn.Module):
  """Layers on tokens (B, N, `WIDTH`); float32."""

  @nn.compact
  def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
    """Return the class token after all layers, normalised, (B, `WIDTH`).

    With `training` a fraction of `DROPOUT` drops out; that takes the random
    key "dropout".
    """
    batch, count, _ = x.shape
    small = nn.initializers.normal(0.02)
    first = self.param("class_token", small, (WIDTH,), jnp.float32)
    first = jnp.broadcast_to(first, (batch, 1, WIDTH))
    x += self.param("positions", small, (count, WIDTH), jnp.float32)
    x = jnp.concatenate([first, x], axis=1).reshape(-1, WIDTH)
    for _ in range(LAYERS):
      x = Layer(count + 1)(x, training)
    return nn.LayerNorm()(x.reshape(batch, count + 1, WIDTH)[:, 0])


def gradient_numbers(count: int) -> int:
  """Count what a gradient keeps of an image with `count` tokens.

  Of each layer queries, keys, values, results, hidden units and their
  activations, and attention weights.
  """
  tokens = count + 1
  return LAYERS * tokens * ((8 + 3 * MLP) * WIDTH + 2 * HEADS * tokens)


def steps_per_forward(config: vit_config.ViTConfig) -> float:
  """Number of training steps of a trial with the operations of a forward pass.

  Of matrix products, per token. A step has those of the projections and their
  kernels' gradients, and three times the network's.
  """
  c = config
  forward = c.depth * (8 * c.width**2 + 4 * c.width * c.mlp_dim)
  network = LAYERS * (8 + 4 * MLP) * WIDTH**2
  return forward / (4 * c.depth * c.width * WIDTH + 3 * network)
