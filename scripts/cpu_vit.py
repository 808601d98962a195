"""The forward pass of `models.vit.ViT`, written out for training on a CPU.

Same parameters (but the blocks are a list), same numbers up to rounding. Every
product takes bfloat16 and returns float32 without a transposed operand: in this
form XLA calls the matrix units of current x86 processors. Patches can be left
out (PatchDropout, https://arxiv.org/abs/2208.07220).

Letters: B batch, K patches seen, N = K + 1 tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vqt_jax.models import vit_config

_EPSILON = 1e-6  # `ViTConfig.layer_norm_epsilon`


def _transposed(x: jax.Array) -> jax.Array:
  # Without the barrier XLA folds the transposition into the product, for which
  # it then has no bfloat16 kernel.
  return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


@jax.custom_vjp
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _product_forward(x, y):
  return _product(x, y), (x, y)


def _product_backward(saved, gradient):
  x, y = saved
  g = gradient.astype(x.dtype)
  dx = jnp.matmul(g, _transposed(y), preferred_element_type=jnp.float32)
  dy = jnp.matmul(_transposed(x), g, preferred_element_type=jnp.float32)
  return dx.astype(x.dtype), dy.astype(y.dtype)


_product.defvjp(_product_forward, _product_backward)


def _dense(params: Any, x: jax.Array) -> jax.Array:
  """(n, in) to (n, out), float32."""
  kernel = params["kernel"].astype(jnp.bfloat16)
  return _product(x.astype(jnp.bfloat16), kernel) + params["bias"]


def _layer_norm(params: Any, x: jax.Array) -> jax.Array:
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
  x = (x - mean) * jax.lax.rsqrt(variance + _EPSILON)
  return x * params["scale"] + params["bias"]


def _attend(
  config: vit_config.ViTConfig, params: Any, x: jax.Array, batch: int
) -> jax.Array:
  """Self-attention of tokens (B N, D)."""
  width, heads, size = config.width, config.num_heads, config.head_dim

  def flat(name):
    kernel, bias = params[name]["kernel"], params[name]["bias"]
    return {"kernel": kernel.reshape(width, width), "bias": bias.reshape(width)}

  def split(name):
    y = _dense(flat(name), x).astype(jnp.bfloat16)
    return y.reshape(batch, -1, heads, size).transpose(0, 2, 1, 3)

  scores = _product(split("query"), split("key").swapaxes(-1, -2))
  weights = jax.nn.softmax(scores * size**-0.5).astype(jnp.bfloat16)
  y = _product(weights, split("value")).astype(jnp.bfloat16)
  return _dense(flat("out"), y.transpose(0, 2, 1, 3).reshape(-1, width))


def _block(
  config: vit_config.ViTConfig, params: Any, z: jax.Array, batch: int
) -> jax.Array:
  """One encoder block on tokens (B N, D)."""
  attention = params["MultiHeadDotProductAttention_0"]
  tokens = _layer_norm(params["LayerNorm_0"], z)
  z += _attend(config, attention, tokens.astype(jnp.bfloat16), batch)
  mlp = params["MlpBlock_0"]
  hidden = _dense(mlp["Dense_0"], _layer_norm(params["LayerNorm_1"], z))
  return z + _dense(mlp["Dense_1"], jax.nn.gelu(hidden))


def _embed(
  config: vit_config.ViTConfig, params: Any, images: jax.Array, kept: jax.Array
) -> jax.Array:
  """Grey images (B, height, width) to tokens (B K, D), positions added."""
  (rows, columns), (height, width) = config.grid, config.patch_size
  x = images.reshape(-1, rows, height, columns, width).swapaxes(2, 3)
  x = x.reshape(-1, rows * columns, height * width)
  x = jnp.take_along_axis(x, kept[..., None], axis=1)
  # Grey as RGB: the kernels of the three channels add up.
  kernel = params["embedding"]["kernel"].sum(axis=2)
  kernel = kernel.reshape(-1, config.width)
  embedding = {"kernel": kernel, "bias": params["embedding"]["bias"]}
  positions = params["pos_embedding"][0].astype(jnp.bfloat16)
  # A product, because the gradient of indexing is slow.
  one_hot = jax.nn.one_hot(kept.reshape(-1), len(positions), dtype=jnp.bfloat16)
  patches = _dense(embedding, x.reshape(-1, x.shape[-1]))
  return patches + _product(one_hot, positions)


def logits(
  config: vit_config.ViTConfig, params: Any, images: jax.Array, kept: jax.Array
) -> jax.Array:
  """What the pre-trained head says about images of which it sees some patches.

  Args:
    config: architecture, with a class token and a head.
    params: as `unstacked` gives them.
    images: (B, height, width), grey, float32.
    kept: (B, K), int: which patches it sees, different ones.

  Returns:
    (B, classes), float32.
  """
  batch = len(images)
  z = _embed(config, params, images, kept).reshape(batch, -1, config.width)
  z = jnp.concatenate([jnp.tile(params["cls"], (batch, 1, 1)), z], axis=1)
  z = z.reshape(-1, config.width)
  for block in params["Transformer"]["blocks"]:
    z = _block(config, block, z, batch)
  final = z.reshape(batch, -1, config.width)[:, 0]
  final = _layer_norm(params["Transformer"]["encoder_norm"], final)
  return _dense(params["head"], final)


def unstacked(params: Any) -> Any:
  """The parameters of a `vit.ViT`, as `logits` wants them."""
  encoder = params["Transformer"]
  depth = len(encoder["encoderblock"]["LayerNorm_0"]["scale"])
  part = lambda i: jax.tree.map(lambda leaf: leaf[i], encoder["encoderblock"])
  blocks = [part(i) for i in range(depth)]
  encoder = {"blocks": blocks, "encoder_norm": encoder["encoder_norm"]}
  return {**params, "Transformer": encoder}


def stacked(params: Any) -> Any:
  """The inverse of `unstacked`."""
  encoder = params["Transformer"]
  blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *encoder["blocks"])
  encoder = {"encoderblock": blocks, "encoder_norm": encoder["encoder_norm"]}
  return {**params, "Transformer": encoder}
