"""The feature store: what readers need of every image, computed once.

Without augmentation the stream of an image never changes, so LN_0(z_m) of every
block and the final feature are kept, and every run trains on them. On the
devices the tokens lie as the scan over depth reads them, (L, n, N, D); on the
host, in memory or in a file, row by row, (n, L, N, D), so that an image is one
piece. With several devices a store is cut over D: each holds its part of any
row, putting a batch together is one exchange of that batch, and a process
needs nothing but the columns of its own devices.

On one CPU, where arithmetic is dear and memory is not, the tokens' keys and
values may lie in their place, (L, n, 2, H, N, K): twice the size, but queries
are then scored with K numbers a token and head instead of D.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.layout import Format
import jax.numpy as jnp
import ml_collections
import numpy as np

from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.runtime import mesh as mesh_lib

# A batch of the stream: {"final": (b, D), "tokens": (L, b, N, D) if read}.
Part = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is kept of an image, and where on the devices.

  Attributes:
    config: of the backbone.
    tokens: whether tokens are kept, or the final feature only.
    dtype: of the tokens, or their keys and values.
    mesh: tokens are cut over its `data` axis.
    window: successive tokens of which only the mean is kept.
    projected: whether the devices hold keys and values in place of tokens.
  """

  config: vit_config.ViTConfig
  tokens: bool
  dtype: str
  mesh: jax.sharding.Mesh
  window: int = 1
  projected: bool = False

  @property
  def row(self) -> tuple[int, int, int]:
    """Shape (L, N, D) of one image's tokens, or of their means."""
    c = self.config
    return c.depth, c.num_tokens // self.window, c.width

  @property
  def held_row(self) -> tuple[int, ...]:
    """Shape of one block's share of it on the devices."""
    c = self.config
    if self.projected:
      return 2, c.num_heads, c.num_tokens, c.head_dim
    return self.row[1:]

  @property
  def columns(self) -> int:
    """How much of D this process keeps."""
    width, shards = self.row[-1], self.mesh.shape["data"]
    if width % shards:
      return width
    return width // shards * self.mesh.local_mesh.shape["data"]

  @property
  def bytes_per_image(self) -> int:
    """L * N * D numbers, or twice, if tokens are kept; the final feature."""
    numbers = self.row[0] * np.prod(self.held_row) if self.tokens else 0
    size = numbers * jnp.dtype(self.dtype).itemsize + self.row[-1] * 4
    return int(size)

  def sharding(self, name: str) -> jax.sharding.NamedSharding:
    """Of a batch: "tokens" (L, b, N, D), or what every device has whole."""
    if name != "tokens" or self.row[-1] % self.mesh.shape["data"]:
      return mesh_lib.replicated_sharding(self.mesh)
    return mesh_lib.batch_sharding(self.mesh, 3)

  def held_sharding(self, name: str) -> jax.sharding.NamedSharding | Format:
    """Of all images; between them where they cannot be cut across."""
    if name != "tokens":
      return self.sharding(name)
    sharding = self.sharding(name)
    if self.row[-1] % self.mesh.shape["data"]:
      sharding = mesh_lib.batch_sharding(self.mesh, 1)
    return mesh_lib.row_major(sharding, 2 + len(self.held_row))


def layout_of(
  config: ml_collections.ConfigDict,
  tuner: tuner_lib.Tuner,
  mesh: jax.sharding.Mesh,
) -> Layout:
  """What a method needs kept of an image, in a run of this config."""
  return Layout(
    config=tuner.config,
    tokens=tuner.reads_blocks,
    dtype=config.feature_dtype or tuner.config.dtype,
    mesh=mesh,
    window=tuner.window,
  )


def device_layout(
  layout: Layout, tuner: tuner_lib.Tuner, count: int, room: int
) -> Layout:
  """Of features in device memory: on one CPU projected, if that has room.

  But not if they are to be kept in another dtype than the backbone's.

  Args:
    layout: of what is extracted.
    tuner: that reads it.
    count: images.
    room: bytes that data may take.
  """
  projected = dataclasses.replace(layout, projected=True)
  if (
    tuner.has_queries
    and layout.dtype == layout.config.dtype
    and layout.mesh.size == 1
    and layout.mesh.devices.flat[0].platform == "cpu"
    and count * projected.bytes_per_image <= room
  ):
    return projected
  return layout


def stream(
  layout: Layout, params: Any, batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[Part]:
  """Runs the backbone over batches; one is computed while another is used.

  Args:
    layout: what is wanted of them.
    params: the frozen backbone, on the devices.
    batches: {"image": (b, h, w, 3) float32, ...}, this process's rows.
  """
  run, before = runner(layout), None
  for batch in batches:
    image = mesh_lib.from_process_local({"image": batch["image"]}, layout.mesh)
    part = run(params, image["image"])
    if before is not None:
      yield jax.block_until_ready(before)
    before = part
  if before is not None:
    yield before


@functools.cache
def runner(layout: Layout) -> Callable[[Any, jax.Array], Part]:
  """The compiled (params, images (b, h, w, 3)) -> a batch of the stream."""
  names = ["final"] + ["tokens"] * layout.tokens

  def run(params, images):
    seen = tuner_lib.run_backbone(
      layout.config, layout.tokens, params, images, window=layout.window
    )
    # Shared out by images until all is computed, and only then cut across: else
    # the compiler cuts all of the backbone across, and sums in every block.
    by_image = lambda x, axis: jax.lax.with_sharding_constraint(
      x, mesh_lib.batch_sharding(layout.mesh, axis)
    )
    part = {"final": by_image(seen.final, 0)}
    if layout.tokens:
      part["tokens"] = by_image(seen.tokens.astype(layout.dtype), 1)
    return part

  shardings = {name: layout.sharding(name) for name in names}
  return jax.jit(run, out_shardings=shardings)


def project(
  layout: Layout, params: Any, parts: Iterable[Part]
) -> Iterator[Part]:
  """Puts keys and values (L, b, 2, H, N, K) in the place of parts' tokens."""
  run = projector(layout)
  for part in parts:
    # Ready, or parts that come faster than this would pile up.
    yield {**part, "tokens": jax.block_until_ready(run(params, part["tokens"]))}


@functools.cache
def projector(layout: Layout) -> Callable[[Any, jax.Array], jax.Array]:
  """The compiled (params, tokens (L, b, N, D)) -> their keys and values."""
  block = vit.Block(layout.config)

  def of_block(_, inputs):
    params, tokens = inputs
    return None, block.apply({"params": params}, tokens, method="project")

  def run(params, tokens):
    blocks = params["Transformer"]["encoderblock"]
    return jax.lax.scan(of_block, None, (blocks, tokens))[1]

  return jax.jit(run)


def on_devices(
  layout: Layout,
  parts: Iterable[Part],
  label: np.ndarray,
  progress: Callable[[int], None] = lambda done: None,
) -> dict[str, jax.Array]:
  """Collects the stream of n images on the devices.

  Args:
    layout: of the store.
    parts: of all images, of one size; the last one may be filled up. Of a
      layout that is projected, what `project` gives.
    label: (n,) int32.
    progress: told how many images are done.

  Returns:
    {"tokens": (L, m, N, D), or (L, m, 2, H, N, K), if kept, "final": (m, D),
    "label": (m,)}, m >= n; rows from n on are never used.
  """
  store, start = {}, 0
  for part in parts:
    size = len(part["final"])
    if not store:
      rows = -(-len(label) // size) * size
      store = _empty(layout, rows, tuple(part))
    store = _writer(layout)(store, part, start)
    start += size
    progress(min(start, len(label)))
  replicated = mesh_lib.replicated_sharding(layout.mesh)
  return {
    **store,
    "label": mesh_lib.place_array(_pad(label, rows), replicated),
  }


def device_shapes(layout: Layout, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """What `on_devices` gives for so many rows, in its place."""
  depth, _, width = layout.row
  shape = lambda name, *rest: jax.ShapeDtypeStruct(
    *rest, sharding=layout.held_sharding(name)
  )
  shapes = {
    "final": shape("final", (rows, width), jnp.float32),
    "label": shape("label", (rows,), jnp.int32),
  }
  if layout.tokens:
    dtype = jnp.dtype(layout.dtype)
    all_tokens = (depth, rows, *layout.held_row)
    shapes["tokens"] = shape("tokens", all_tokens, dtype)
  return shapes


def _empty(layout, rows, names):
  shapes = {name: device_shapes(layout, rows)[name] for name in names}
  zeros = lambda: {
    name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()
  }
  shardings = {name: layout.held_sharding(name) for name in names}
  return jax.jit(zeros, out_shardings=shardings)()


@functools.cache
def _writer(layout: Layout) -> Callable[[Part, Part, int], Part]:
  update = jax.lax.dynamic_update_slice_in_dim

  def write(store, part, start):
    return {
      name: update(held, part[name], start, 1 if name == "tokens" else 0)
      for name, held in store.items()
    }

  names = ["final"] + ["tokens"] * layout.tokens
  shardings = {name: layout.held_sharding(name) for name in names}
  return jax.jit(write, donate_argnums=0, out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class HostStore:
  """Features on the host, of this process's devices.

  Attributes:
    layout: of the batches that are sent to the devices.
    tokens: (n, L, N, D'), in memory or mapped from a file, or None.
    final: (n, D) float32.
  """

  layout: Layout
  tokens: np.ndarray | None
  final: np.ndarray

  def send(self, rows: np.ndarray) -> Part:
    """A batch of these rows, on the devices."""
    part = {
      "final": mesh_lib.place_array(
        self.final[rows], self.layout.sharding("final")
      )
    }
    if not self.layout.tokens:
      return part
    depth, *row = self.tokens.shape[1:]
    batch = np.empty((depth, len(rows), *row), self.tokens.dtype)
    for i, number in enumerate(rows):
      batch[:, i] = self.tokens[number]
    depth, tokens, width = self.layout.row
    part["tokens"] = jax.make_array_from_process_local_data(
      self.layout.sharding("tokens"),
      batch,
      (depth, len(rows), tokens, width),
    )
    return part


def on_host(
  layout: Layout,
  parts: Iterable[Part],
  count: int,
  progress: Callable[[int], None] = lambda done: None,
) -> HostStore:
  """Collects the stream of `count` images in the host's memory."""
  depth, tokens, width = layout.row
  held = {"final": np.empty((count, width), np.float32)}
  if layout.tokens:
    shape = (count, depth, tokens, layout.columns)
    held["tokens"] = np.empty(shape, layout.dtype)
  done = 0
  for part in parts:
    rows = rows_of(part, count - done)
    for name, values in rows.items():
      held[name][done : done + len(values)] = values
    done += len(rows["final"])
    progress(done)
  return HostStore(layout, held.get("tokens"), held["final"])


def rows_of(part: Part, most: int) -> dict[str, np.ndarray]:
  """A batch as this process keeps it: "final" (b, D), "tokens" (b, L, N, D').

  Args:
    part: a batch of the stream.
    most: rows that are real; what fills up a batch is left out.
  """
  rows = {"final": mesh_lib.local_part(part["final"], 1)[:most]}
  if "tokens" in part:
    tokens = mesh_lib.local_part(part["tokens"], 3)
    rows["tokens"] = np.moveaxis(tokens, 0, 1)[:most]
  return rows


def resident(
  examples: dict[str, np.ndarray], mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, jax.Array]:
  """Images on the devices, for training through the ViT.

  Like tokens they are cut across, not between, where the number of devices
  allows. Columns and channels are one axis, since a TPU fills up the last one
  to 128; where neither it nor the rows can be cut, an image is one piece for
  each device.

  Args:
    examples: {"image": (n, h, w, 3) float32, "label": (n,)}, on the host.
    mesh: of the devices.
    dtype: of the backbone, which would round to it in every step.

  Returns:
    {"image": (m, h, w * 3) or (m, pieces, size), "label": (m,)}, m >= n.
  """
  count, *image_size, _ = examples["image"].shape
  shapes = resident_shapes(count, image_size, mesh, dtype)
  rows = len(shapes["label"])
  images = _pad(examples["image"].astype(dtype), rows)
  images = images.reshape(shapes["image"].shape)
  label = _pad(examples["label"], rows)
  wanted = shapes["image"].format
  # In two steps: with a layout, arrays cannot be made while a mesh is set.
  in_order = jax.jit(lambda x: x, out_shardings=wanted, donate_argnums=0)
  return {
    "image": in_order(mesh_lib.place_array(images, wanted.sharding)),
    "label": mesh_lib.place_array(label, shapes["label"].sharding),
  }


def resident_shapes(
  count: int, image_size: Sequence[int], mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
  """What `resident` gives for so many images (height, width), in its place."""
  shards, (height, width) = mesh.shape["data"], image_size
  shape = (-(-count // shards) * shards, height, 3 * width)
  if height % shards and shape[2] % shards and height * shape[2] % shards == 0:
    # Many devices: between images a batch would be a sum over all of them.
    shape = (shape[0], shards, height * shape[2] // shards)
  axis = next(axis for axis in (1, 2, 0) if shape[axis] % shards == 0)
  place = mesh_lib.row_major(mesh_lib.batch_sharding(mesh, axis), 3)
  return {
    "image": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place),
    "label": jax.ShapeDtypeStruct(
      shape[:1], jnp.int32, sharding=mesh_lib.replicated_sharding(mesh)
    ),
  }


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
  missing = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, missing) if rows > len(array) else array


def order(
  rows: np.ndarray, batch_size: int, shards: int, shuffle: tuple | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of resident data in batches, every row exactly once.

  Args:
    rows: (n,) indices into the data.
    batch_size: examples in a batch; the last one may hold fewer.
    shards: each batch is filled up to a multiple of this.
    shuffle: (seed, epoch) decide the order; None keeps it.

  Returns:
    (S, B) int32 rows and (S, B) float32 mask, 0 where a row only fills up.
  """
  if shuffle is not None:
    rows = np.random.default_rng(shuffle).permutation(rows)
  batch_size = min(batch_size, len(rows))
  steps = -(-len(rows) // batch_size)
  width = -(-batch_size // shards) * shards
  index = np.full((steps, width), rows[0], np.int32)
  mask = np.zeros((steps, width), np.float32)
  for step in range(steps):
    part = rows[step * batch_size : (step + 1) * batch_size]
    index[step, : len(part)] = part
    mask[step, : len(part)] = 1
  return index, mask
