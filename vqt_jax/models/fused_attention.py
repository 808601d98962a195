"""cuDNN's fused attention, on GPUs that have it: no scores in memory.

It keeps one number per row and head for the gradient (FlashAttention-2,
https://arxiv.org/abs/2307.08691), where products and a softmax keep N.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vqt_jax.runtime import mesh

# Mesh axes over which (B, N, H, K) is sharded.
AXES = ("data", None, "model", None)


def is_supported(q: jax.Array, k: jax.Array) -> bool:
  """Return whether `attend` can take queries and keys (B, N, H, K).

  It needs as many queries as keys; what JAX asks for, that is bfloat16 or
  float16, and a head size that is a multiple of 8 and not too large for the
  GPU; a mesh that divides evenly; and known sizes (`jax.export` may leave the
  batch symbolic).
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
    jax.eval_shape(lambda *x: jax.vjp(_attend_even, *x)[0], shape, shape, shape)
  except (NotImplementedError, RuntimeError):
    return False  # Unsupported sizes, or no cuDNN.
  return True


def is_available() -> bool:
  """Return whether code is compiled for NVIDIA GPUs, Ampere or newer."""
  if mesh.backend() != "gpu":
    return False
  capability = jax.local_devices(backend="gpu")[0].compute_capability
  return bool(re.fullmatch(r"([89]|\d\d+)\.\d+", capability))  # Not "gfx90a".


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Compute `softmax(q k / sqrt(K)) v`, (B, N, H, K) each.

  On a mesh each device computes its own examples and heads. Only for arrays
  that `is_supported` accepts.
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
  return _cudnn(*_batch_alike(q, k, v))


def _forward(q, k, v):
  q, k, v = _batch_alike(q, k, v)
  out, gradient = jax.vjp(_attend_even, q, k, v)
  return out, (gradient, q)


def _backward(residuals, cotangent):
  gradient, q = residuals
  return gradient(_batch_alike(cotangent, q)[0])


_attend.defvjp(_forward, _backward)


def _attend_even(q, k, v):
  """Attend with the tokens padded to an even number, as JAX asks in a gradient.

  (For a bias that is not used here: `check_is_flash_attention` in JAX's
  cudnn/fused_attention_stablehlo.py.)
  """
  count = q.shape[1]
  if count % 2 == 0:
    return _cudnn(q, k, v)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
  # A selection as in `_batch_alike`.
  lengths = jnp.where(_depends_on(q), jnp.int32(count), count)
  out = _cudnn(
    pad(q),
    pad(k),
    pad(v),
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
  )
  return out[:, :count]


def _batch_alike(*arrays: jax.Array) -> list[jax.Array]:
  """Return the arrays (B, ...) so that `vmap` batches all of them or none.

  JAX 0.10's batching rule for cuDNN's attention takes no other combination. The
  compiler removes the selection.
  """
  any_ = functools.reduce(jnp.logical_or, map(_depends_on, arrays))
  any_ = any_[:, None, None, None]
  return [jnp.where(any_, x, x) for x in arrays]


def _depends_on(x: jax.Array) -> jax.Array:
  """Return a dummy (B,) bool that `vmap` batches exactly when it batches x."""
  return x[:, 0, 0, 0] == 0
