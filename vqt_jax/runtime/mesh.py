"""Meshes of devices, shardings, and arrays placed by them."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from vqt_jax import errors


def make_mesh(
  data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Make a `data` x `model` mesh over the devices of all processes.

  Devices are ordered by process, so that process p of P reads rows p*B/P ..
  (p+1)*B/P - 1 of a batch of B. (JAX's own order follows the links of a TPU,
  where hosts alternate.)

  Args:
    data: devices that share the batch; -1: all that `model` leaves.
    model: devices that share one copy of the backbone.
    devices: other devices than those of this run, to compile for.

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
      f"config.mesh.model={model} does not fit {count} device(s): expected a"
      " divisor of their number."
    )
  if wanted % processes:
    raise errors.UserError(
      f"config.mesh.model={model} does not fit {processes} processes with"
      f" {count // processes} device(s) each: expected a divisor of the latter,"
      " so that each process reads examples of its own."
    )
  order = sorted(devices, key=lambda each: (each.process_index, each.id))
  return jax.sharding.Mesh(
    np.array(order).reshape(wanted, model),
    ("data", "model"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def constrain(x: Any, *spec: str | None) -> Any:
  """Constrain the sharding of arrays in compiled code, if a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*spec))


def axis_size(axis: str) -> int:
  """Number of devices along an axis of the current mesh; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def auto_axis_size(axis: str) -> int:
  """Return `axis_size`, but 1 inside a `shard_map` over the axis."""
  manual = axis in jax.sharding.get_abstract_mesh().manual_axes
  return 1 if manual else axis_size(axis)


def backend() -> str:
  """Platform to compile for: "cpu", "gpu" or "tpu".

  It is that of the current mesh, whose devices may be only described, or, if
  no mesh is set, that of this machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def replicated_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
  """Sharding over `data` of arrays with their examples along `axis`."""
  return NamedSharding(mesh, P(*[None] * axis, "data"))


def row_major(sharding: NamedSharding, ndim: int) -> Format:
  """Give a sharding the memory layout of numpy, in which rows are contiguous.

  By default a TPU chooses the layout with the least padding, often with the
  rows innermost, and copies the whole array before it gathers any row.
  """
  return Format(Layout(tuple(range(ndim))), sharding)


def place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Make a global array of one that every process has in full on its host."""
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Put numpy arrays, equal on all processes, on all devices.

  Arrays that are on devices already are left alone.
  """
  sharding = replicated_sharding(mesh)
  return jax.tree.map(
    lambda x: x if isinstance(x, jax.Array) else place_array(x, sharding), tree
  )


def from_process_local(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Make global arrays, sharded along axis 0, from every process's part."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, part)
    for name, part in batch.items()
  }


def local_part(x: jax.Array, axis: int) -> np.ndarray:
  """This process's part of an array that is sharded along `axis` at most."""
  parts = {s.index[axis].start or 0: s.data for s in x.addressable_shards}
  arrays = [np.asarray(parts[start]) for start in sorted(parts)]
  return np.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]
