"""Placement of a frozen backbone's weights on a mesh."""

import re
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from vqt_jax import errors
from vqt_jax.runtime import mesh as mesh_lib

# Block weights along `model`: attention by heads, the MLP by its hidden units.
# Everything else is replicated. The first axis of a block's leaf is the depth.
MODEL_RULES = (
  (r"/encoderblock/.*/(query|key|value)/kernel$", P(None, None, "model")),
  (r"/encoderblock/.*/(query|key|value)/bias$", P(None, "model")),
  (r"/encoderblock/.*/out/kernel$", P(None, "model")),
  (r"/encoderblock/.*/Dense_0/kernel$", P(None, None, "model")),
  (r"/encoderblock/.*/Dense_0/bias$", P(None, "model")),
  (r"/encoderblock/.*/Dense_1/kernel$", P(None, "model")),
)


def check_heads(mesh: jax.sharding.Mesh, heads: int) -> None:
  """Raise a `UserError` if attention cannot be split along `model`."""
  model = mesh.shape["model"]
  if heads % model:
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    raise errors.UserError(
      f"mesh model={model} cannot share the {heads} attention heads of this"
      f" backbone: expected one of {', '.join(map(str, fitting))}."
    )


def backbone_shapes(params: Any, mesh: jax.sharding.Mesh, dtype: str) -> Any:
  """Shapes, dtypes and shardings of `place_backbone`'s result."""

  def shape(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    keep = re.search(r"(LayerNorm_\d|encoder_norm)/", name)
    spec = _partition_spec(name, leaf.shape, mesh.shape["model"])
    return jax.ShapeDtypeStruct(
      leaf.shape,
      np.float32 if keep else dtype,
      sharding=NamedSharding(mesh, spec),
    )

  return jax.tree_util.tree_map_with_path(shape, params)


def place_backbone(params: Any, mesh: jax.sharding.Mesh, dtype: str) -> Any:
  """Put the frozen weights on the devices; matrices in `dtype`.

  LayerNorm stays float32.
  """
  place = lambda leaf, to: mesh_lib.place_array(
    np.asarray(leaf, to.dtype), to.sharding
  )
  return jax.tree.map(place, params, backbone_shapes(params, mesh, dtype))


def _partition_spec(path: str, shape: tuple[int, ...], model: int) -> P:
  for pattern, spec in MODEL_RULES:
    if re.search(pattern, path):
      sharded = spec.index("model")
      return spec if shape[sharded] % model == 0 else P()
  return P()
