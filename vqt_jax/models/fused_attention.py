"""cuDNN's fused attention, on GPUs that have it: no scores in memory.

Of each row one number is kept for the gradient (FlashAttention-2,
https://arxiv.org/abs/2307.08691), where attention by products and a softmax
keeps N per head.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vqt_jax.runtime import mesh

AXES = ("data", None, "model", None)  # Of the mesh, for (B, N, H, K).


def takes(q: jax.Array, k: jax.Array) -> bool:
  """Whether `attend` can be used: as many queries (B, N, H, K) as keys.

  Also, what JAX asks for: bfloat16 or float16, and a head size that is a
  multiple of 8 and not too large for the GPU; a mesh that cuts evenly; and
  sizes that are known (`jax.export` may leave the batch open).
  """
  if not is_available() or any(map(jax.export.is_symbolic_dim, q.shape)):
    return False
  even = all(
    size % mesh.auto_axis_size(axis) == 0
    for size, axis in zip(q.shape, AXES)
    if axis
  )
  if not (even and q.shape == k.shape):
    return False
  shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
  try:
    jax.eval_shape(lambda *x: jax.vjp(_even, *x)[0], shape, shape, shape)
  except (NotImplementedError, RuntimeError):
    return False  # It does not take these sizes, or finds no cuDNN.
  return True


def is_available() -> bool:
  """Whether code is compiled for NVIDIA GPUs, of Ampere's generation on."""
  if mesh.backend() != "gpu":
    return False
  capability = jax.local_devices(backend="gpu")[0].compute_capability
  return bool(re.fullmatch(r"([89]|\d\d+)\.\d+", capability))  # Not "gfx90a".


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """`softmax(q k / sqrt(K)) v` of (B, N, H, K) each, as `takes` allows.

  On a mesh each device does its own examples and heads.
  """
  axes = {x for x in AXES if x and mesh.auto_axis_size(x) > 1}
  if not axes:
    return _attend(q, k, v)
  spec = P(*(x if x in axes else None for x in AXES))
  return jax.shard_map(
    _attend,
    in_specs=(spec,) * 3,
    out_specs=spec,
    axis_names=axes,
    check_vma=False,
  )(q, k, v)


_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@jax.custom_vjp
def _attend(q, k, v):
  return _cudnn(*_together(q, k, v))


def _forward(q, k, v):
  q, k, v = _together(q, k, v)
  out, gradient = jax.vjp(_even, q, k, v)
  return out, (gradient, q)


def _backward(kept, cotangent):
  gradient, q = kept
  return gradient(_together(cotangent, q)[0])


_attend.defvjp(_forward, _backward)


def _even(q, k, v):
  """The same with an even number of tokens: JAX asks for it in a gradient.

  (For a bias that is not there: `check_is_flash_attention` in its
  cudnn/fused_attention_stablehlo.py.)
  """
  count = q.shape[1]
  if count % 2 == 0:
    return _cudnn(q, k, v)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
  lengths = jnp.where(_any(q), jnp.int32(count), count)  # See `_together`.
  out = _cudnn(
    pad(q),
    pad(k),
    pad(v),
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
  )
  return out[:, :count]


def _together(*arrays: jax.Array) -> list[jax.Array]:
  """The same arrays (B, ...), each of which `vmap` batches if it does any.

  The rule of JAX 0.10 for cuDNN's attention takes no others; compilers see
  through it.
  """
  any_ = functools.reduce(jnp.logical_or, map(_any, arrays))
  any_ = any_[:, None, None, None]
  return [jnp.where(any_, x, x) for x in arrays]


def _any(x: jax.Array) -> jax.Array:
  """Some (B,) bool that depends on x, as far as JAX knows."""
  return x[:, 0, 0, 0] == 0
