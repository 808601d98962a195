"""Images on the devices, for training through the backbone."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax.features import store
from vqt_jax.runtime import mesh as mesh_lib


def images_on_devices(
  examples: dict[str, np.ndarray], mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, jax.Array]:
  """Place images on the devices.

  Like tokens they are sharded over their content, not over images, where the
  number of devices allows. Columns and channels are one axis, since a TPU pads
  the last one to 128; if neither it nor the rows can be sharded, an image is
  cut into one piece per device.

  Args:
    examples: {"image": (n, h, w, 3) float32, "label": (n,)}, on the host.
    mesh: of the devices.
    dtype: of the backbone, which would round to it in every step.

  Returns:
    {"image": (m, h, w * 3) or (m, pieces, size), "label": (m,)}, m >= n.
  """
  count, *image_size, _ = examples["image"].shape
  shapes = image_shapes(count, image_size, mesh, dtype)
  rows = len(shapes["label"])
  images = store.pad_rows(examples["image"].astype(dtype), rows)
  images = images.reshape(shapes["image"].shape)
  label = store.pad_rows(examples["label"], rows)
  target = shapes["image"].format
  # In two steps: with a layout, arrays cannot be made while a mesh is set.
  relayout = jax.jit(lambda x: x, out_shardings=target, donate_argnums=0)
  return {
    "image": relayout(mesh_lib.place_array(images, target.sharding)),
    "label": mesh_lib.place_array(label, shapes["label"].sharding),
  }


def bytes_per_image(image_size: Sequence[int]) -> int:
  """Bytes of an image (height, width) in float32."""
  return 12 * math.prod(image_size)


def image_shapes(
  count: int, image_size: Sequence[int], mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of `images_on_devices`."""
  shards, (height, width) = mesh.shape["data"], image_size
  shape = (-(-count // shards) * shards, height, 3 * width)
  if height % shards and shape[2] % shards and height * shape[2] % shards == 0:
    # Sharded over images, a batch would be a sum over all devices.
    shape = (shape[0], shards, height * shape[2] // shards)
  axis = next(axis for axis in (1, 2, 0) if shape[axis] % shards == 0)
  sharding = mesh_lib.row_major(mesh_lib.batch_sharding(mesh, axis), 3)
  return {
    "image": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding),
    "label": jax.ShapeDtypeStruct(
      shape[:1], jnp.int32, sharding=mesh_lib.replicated_sharding(mesh)
    ),
  }
