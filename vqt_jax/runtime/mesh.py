"""Meshes of devices, shardings, and arrays placed by them."""

from collections.abc import Sequence
import re
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from vqt_jax import errors

# Frozen block weights along `model`: attention by heads, the MLP by its hidden
# units. Everything else is replicated. First axis of a block leaf: depth.
MODEL_RULES = (
  (r"/encoderblock/.*/(query|key|value)/kernel$", P(None, None, "model")),
  (r"/encoderblock/.*/(query|key|value)/bias$", P(None, "model")),
  (r"/encoderblock/.*/out/kernel$", P(None, "model")),
  (r"/encoderblock/.*/Dense_0/kernel$", P(None, None, "model")),
  (r"/encoderblock/.*/Dense_0/bias$", P(None, "model")),
  (r"/encoderblock/.*/Dense_1/kernel$", P(None, "model")),
)


def make_mesh(
  data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A `data` x `model` mesh over all devices of all processes.

  Those of a process follow one another, and so do processes: process p's are
  rows p*B/P .. (p+1)*B/P - 1 of a batch. (JAX's own order is that of a TPU's
  links, in which hosts take turns.)

  Args:
    data: devices that share the batch; -1: all that `model` leaves.
    model: devices that share one copy of the backbone.
    devices: others than those that are here, to compile for.

  Raises:
    UserError: the product is not the number of devices, or a process would get
      no examples of its own.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  processes = len({device.process_index for device in devices})
  wanted = count // model if data == -1 and model > 0 else data
  if model < 1 or wanted * model != count:
    raise errors.UserError(
      f"mesh data={data}, model={model} does not fit {count} device(s):"
      " data x model must be their number (data=-1: as many as there are)."
    )
  if wanted % processes:
    raise errors.UserError(
      f"mesh data={wanted}, model={model} does not fit"
      f" {processes} processes: data must be a multiple of their"
      " number, so that each reads examples of its own."
    )
  order = sorted(devices, key=lambda each: (each.process_index, each.id))
  return jax.sharding.Mesh(
    np.array(order).reshape(wanted, model),
    ("data", "model"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def check_heads(mesh: jax.sharding.Mesh, heads: int) -> None:
  """Raises a `UserError` if attention cannot be cut along `model`."""
  model = mesh.shape["model"]
  if heads % model:
    fitting = [n for n in range(1, heads + 1) if heads % n == 0]
    raise errors.UserError(
      f"mesh model={model} cannot share the {heads} attention heads of this"
      f" backbone: expected one of {', '.join(map(str, fitting))}."
    )


def _spec(path: str, shape: tuple[int, ...], model: int) -> P:
  for pattern, spec in MODEL_RULES:
    if re.search(pattern, path):
      sharded = spec.index("model")
      return spec if shape[sharded] % model == 0 else P()
  return P()


def place_backbone(params: Any, mesh: jax.sharding.Mesh, dtype: str) -> Any:
  """Puts the frozen weights on the devices; matrices in `dtype`.

  LayerNorm stays float32, so does everything when `dtype` is float32.
  """

  place = lambda leaf, to: place_array(np.asarray(leaf, to.dtype), to.sharding)
  return jax.tree.map(place, params, backbone_shapes(params, mesh, dtype))


def backbone_shapes(params: Any, mesh: jax.sharding.Mesh, dtype: str) -> Any:
  """What `place_backbone` gives, as `jax.ShapeDtypeStruct` with shardings."""

  def shape(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    keep = re.search(r"(LayerNorm_\d|encoder_norm)/", name)
    spec = _spec(name, leaf.shape, mesh.shape["model"])
    return jax.ShapeDtypeStruct(
      leaf.shape,
      np.float32 if keep else dtype,
      sharding=NamedSharding(mesh, spec),
    )

  return jax.tree_util.tree_map_with_path(shape, params)


def place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """A global array of which every process holds the whole on its host."""
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def constrain(x: Any, *spec: str | None) -> Any:
  """Asks for a sharding where a mesh is set (in compiled code)."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*spec))


def axis_size(axis: str) -> int:
  """Devices along an axis of the mesh that is set; 1 if none is."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def auto_axis_size(axis: str) -> int:
  """As `axis_size`, but 1 inside a `shard_map` over it, which sees parts."""
  by_hand = axis in jax.sharding.get_abstract_mesh().manual_axes
  return 1 if by_hand else axis_size(axis)


def backend() -> str:
  """The platform that compiled code is for: "cpu", "gpu" or "tpu".

  That of the mesh that is set, which need not be here; else of this machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Numpy arrays, the same on every process, on all devices.

  What is on the devices already stays as it is.
  """
  place = lambda x: place_array(x, replicated_sharding(mesh))
  return jax.tree.map(
    lambda x: x if isinstance(x, jax.Array) else place(x), tree
  )


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Examples, found on `axis`, shared out over `data`."""
  return NamedSharding(mesh, P(*[None] * axis, "data"))


def row_major(sharding: NamedSharding, ndim: int) -> Format:
  """The sharding, with elements in memory as numpy has them: rows are whole.

  Left to itself a TPU takes the order that pads least, often with the rows
  innermost, and copies all of it into another one before it fetches any row.
  """
  return Format(Layout(tuple(range(ndim))), sharding)


def from_process_local(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Each process's part of a batch (first axis) to sharded global arrays."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, part)
    for name, part in batch.items()
  }


def local_part(x: jax.Array, axis: int) -> np.ndarray:
  """This process's part of an array that is cut along one axis at most."""
  parts = {s.index[axis].start or 0: s.data for s in x.addressable_shards}
  arrays = [np.asarray(parts[start]) for start in sorted(parts)]
  return np.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]
