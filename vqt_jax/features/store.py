"""The feature store: what readers need of every image, computed once.

Without augmentation the stream of an image never changes, so LN_0(z_m) of every
block and the final feature are stored, and all trials train on them. On the
devices the tokens lie as the scan over depth reads them, (L, n, N, D); on the
host, in memory or in a file, image by image, (n, L, N, D). On several devices
the N D numbers of an image and block are flattened, padded and reshaped to (S,
`LANES`), and the store (L, n, S, `LANES`) is sharded over S: each device holds
its part of every image, a batch is gathered by one exchange, and a process
needs only the parts of its own devices.

On one CPU, where arithmetic is slow and memory plentiful, the store may hold
keys and values in place of the tokens, (L, n, 2, H, N, K): twice the size, but
queries are scored with K numbers per token and head instead of D. And on one
device it holds what a reader without weights makes of tokens and final feature,
the features of the head, (n, F).

Letters: n images, b images in a batch, L depth, N tokens, D width, H heads, K
head size, F features.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental.layout import Format
import jax.numpy as jnp
import ml_collections
import numpy as np

from vqt_jax import errors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.runtime import ahead
from vqt_jax.runtime import mesh as mesh_lib

# To a multiple of this a TPU pads the last axis of an array, so that a store
# sharded over D would waste more, the more devices there are.
LANES = 128

# A batch of the stream: {"final": (b, D), "tokens": (L, b, N, D) if read}.
FeatureBatch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Contents of a store, and their placement on the devices.

  Attributes:
    config: of the backbone.
    tokens: tokens are stored, not the final feature only.
    dtype: of the tokens, or of their keys and values.
    mesh: tokens are sharded over its `data` axis.
    window: number of successive tokens of which only the mean is stored.
    projected: the devices hold keys and values in place of tokens.
    num_features: F, if the devices hold the features of the head in place of
      tokens and final feature; else 0.
  """

  config: vit_config.ViTConfig
  tokens: bool
  dtype: str
  mesh: jax.sharding.Mesh
  window: int = 1
  projected: bool = False
  num_features: int = 0

  @property
  def names(self) -> tuple[str, ...]:
    """Entries of a store on the devices, without "label"."""
    if self.num_features:
      return ("features",)
    return ("final", "tokens") if self.tokens else ("final",)

  @property
  def row(self) -> tuple[int, int, int]:
    """Shape (L, N, D) of one image's tokens, or of their means."""
    c = self.config
    return c.depth, c.num_tokens // self.window, c.width

  @property
  def is_sharded(self) -> bool:
    return self.mesh.shape["data"] > 1

  @property
  def batch_row(self) -> tuple[int, int]:
    """Shape of one image and block in a batch.

    (N, D), or sharded (S, `LANES`).
    """
    if not self.is_sharded:
      return self.row[1:]
    return sharded_shape(math.prod(self.row[1:]), self.mesh.shape["data"])

  @property
  def device_row(self) -> tuple[int, ...]:
    """Shape of one image and block in a store on the devices."""
    c = self.config
    if self.projected:
      return 2, c.num_heads, c.num_tokens, c.head_dim
    return self.batch_row

  @property
  def own_numbers(self) -> int:
    """Numbers of an image and block on the devices of this process."""
    shards, own = (m.shape["data"] for m in (self.mesh, self.mesh.local_mesh))
    return math.prod(self.batch_row) // shards * own

  @property
  def host_row(self) -> tuple[int, ...]:
    """Shape of an image's tokens on the host.

    (L, N, D), or of several processes the part of each: (L, numbers).
    """
    if self.mesh.local_mesh.shape == self.mesh.shape:
      return self.row
    return self.row[0], self.own_numbers

  @property
  def bytes_per_image(self) -> int:
    """Bytes of an image: tokens, if stored; final feature."""
    row = self.device_row if self.projected else self.row[1:]
    return self._bytes(math.prod(row))

  @property
  def device_bytes_per_image(self) -> int:
    """Bytes of an image on all devices together, with padding.

    A TPU pads the part of each device to a multiple of (8, `LANES`).
    """
    numbers = math.prod(self.device_row)
    if self.is_sharded and self.mesh.devices.flat[0].platform == "tpu":
      tile = 8 * LANES * self.mesh.shape["data"]
      numbers = -(-numbers // tile) * tile
    return self._bytes(numbers)

  def _bytes(self, numbers: int) -> int:
    """Bytes of an image with so many numbers in each block."""
    if self.num_features:
      return 4 * self.num_features
    tokens = self.row[0] * numbers * jnp.dtype(self.dtype).itemsize
    return self.tokens * tokens + 4 * self.row[-1]

  def bytes_in(self, count: int) -> dict[str, int]:
    """Bytes of the features of `count` images, by storage."""
    found = {name: count * self.bytes_per_image for name in ("host", "disk")}
    return {"device": count * self.device_bytes_per_image, **found}

  def sharding(self, name: str) -> jax.sharding.NamedSharding:
    """Sharding of a batch's "tokens" (L, b, ...), or of another entry."""
    if name != "tokens":
      return mesh_lib.replicated_sharding(self.mesh)
    return mesh_lib.batch_sharding(self.mesh, 2)

  def store_sharding(self, name: str) -> jax.sharding.NamedSharding | Format:
    """Sharding of an entry for all images."""
    if name != "tokens":
      return self.sharding(name)
    return mesh_lib.row_major(self.sharding(name), 2 + len(self.device_row))


def sharded_shape(numbers: int, shards: int) -> tuple[int, int]:
  """Return the shape (S, `LANES`) of numbers with padding, S % shards = 0."""
  return -(-numbers // (shards * LANES)) * shards, LANES


def make_layout(
  config: ml_collections.ConfigDict,
  tuner: tuner_lib.Tuner,
  mesh: jax.sharding.Mesh,
) -> Layout:
  """Return the layout of the features that a tuner reads."""
  return Layout(
    config=tuner.config,
    tokens=tuner.reads_blocks,
    dtype=config.feature_dtype or tuner.config.dtype,
    mesh=mesh,
    window=tuner.window,
  )


def device_layout(
  layout: Layout, tuner: tuner_lib.Tuner, count: int, available: int
) -> Layout:
  """Return the layout of a store on the devices.

  On one CPU it is projected, if that fits in memory and features are stored in
  the backbone's own dtype; on any one device, if only keys can be read. What a
  reader without weights reads in float32 takes as much room as its features.
  """
  if (
    tuner.reads_blocks
    and not (tuner.reader.init or tuner.members)
    and layout.dtype == "float32"
    and layout.mesh.size == 1
  ):
    return dataclasses.replace(layout, num_features=tuner.num_features)
  projected = dataclasses.replace(layout, projected=True)
  if (
    tuner.has_queries
    and layout.dtype == layout.config.dtype
    and layout.mesh.size == 1
    and (
      layout.mesh.devices.flat[0].platform == "cpu"
      or not layout.config.absorbs_keys
    )
    and count * projected.bytes_per_image <= available
  ):
    return projected
  return layout


def extract(
  layout: Layout, params: Any, batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[FeatureBatch]:
  """Run the backbone over batches, ahead of what is yielded.

  Args:
    layout: of the features.
    params: the frozen backbone, on the devices.
    batches: {"image": (b, h, w, 3) float32, ...}, this process's rows.
  """
  run = extractor(layout)

  def compute(batch):
    image = mesh_lib.from_process_local({"image": batch["image"]}, layout.mesh)
    return run(params, image["image"])

  for features in ahead.compute(compute, ((batch,) for batch in batches)):
    yield jax.block_until_ready(features)


@functools.cache
def extractor(layout: Layout) -> Callable[[Any, jax.Array], FeatureBatch]:
  """Make the compiled function (params, images (b, h, w, 3)) -> features."""
  names = ["final"] + ["tokens"] * layout.tokens

  def run(params, images):
    stream = tuner_lib.run_backbone(
      layout.config, layout.tokens, params, images, window=layout.window
    )
    # Sharded over images until all is computed, and only then over S: else the
    # compiler shards the backbone over N, and exchanges in every block.
    by_image = lambda x, axis: jax.lax.with_sharding_constraint(
      x, mesh_lib.batch_sharding(layout.mesh, axis)
    )
    features = {"final": by_image(stream.final, 0)}
    if layout.tokens:
      tokens = stream.tokens.astype(layout.dtype)
      if layout.is_sharded:
        tokens = tokens.reshape(*tokens.shape[:2], -1)
        missing = math.prod(layout.batch_row) - tokens.shape[-1]
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, missing)))
        tokens = tokens.reshape(*tokens.shape[:2], *layout.batch_row)
      features["tokens"] = by_image(tokens, 1)
    return features

  shardings = {name: layout.sharding(name) for name in names}
  return jax.jit(run, out_shardings=shardings)


def project(
  layout: Layout, params: Any, features: Iterable[FeatureBatch]
) -> Iterator[FeatureBatch]:
  """Replace the tokens of batches by keys and values (L, b, 2, H, N, K)."""
  run = _projector(layout)
  for batch in features:
    # Waits, or batches that come faster than this would pile up.
    tokens = jax.block_until_ready(run(params, batch["tokens"]))
    yield {**batch, "tokens": tokens}


@functools.cache
def _projector(layout: Layout) -> Callable[[Any, jax.Array], jax.Array]:
  """Make the compiled function (params, tokens) -> keys and values."""
  block = vit.Block(layout.config)

  def project_block(_, inputs):
    params, tokens = inputs
    return None, block.apply({"params": params}, tokens, method="project")

  def run(params, tokens):
    blocks = params["Transformer"]["encoderblock"]
    return jax.lax.scan(project_block, None, (blocks, tokens))[1]

  return jax.jit(run)


def read(
  tuner: tuner_lib.Tuner, features: Iterable[FeatureBatch]
) -> Iterator[FeatureBatch]:
  """Replace batches of the stream by {"features": (b, F)} of the head."""
  run = jax.jit(tuner.read_fixed)
  for batch in features:
    found = jax.block_until_ready(run(batch["tokens"], batch["final"]))
    yield {"features": found}


def store_on_devices(
  layout: Layout,
  features: Iterable[FeatureBatch],
  label: np.ndarray,
  progress: Callable[[int], None] = lambda done: None,
) -> dict[str, jax.Array]:
  """Collect the features of n images on the devices.

  Args:
    layout: of the store.
    features: of all images, in batches of one size, the last one padded, with
      the entries of the layout: see `project` and `read`.
    label: (n,) int32.
    progress: called with the number of images that are done.

  Returns:
    {"tokens": (L, m, N, D), sharded (L, m, S, LANES), or (L, m, 2, H, N, K),
    if stored, "final": (m, D), "label": (m,)}, or {"features": (m, F),
    "label"}, m >= n; rows from n on are padding.
  """
  store, start = {}, 0
  for batch in features:
    size = len(batch[layout.names[0]])
    if not store:
      rows = -(-len(label) // size) * size
      store = _empty_store(layout, rows)
    store = _writer(layout)(store, batch, start)
    start += size
    progress(min(start, len(label)))
  replicated = mesh_lib.replicated_sharding(layout.mesh)
  label = mesh_lib.place_array(pad_rows(label, rows), replicated)
  return {**store, "label": label}


def store_shapes(layout: Layout, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of `store_on_devices`, for m = `rows`."""
  depth, _, width = layout.row
  shape = lambda name, *rest: jax.ShapeDtypeStruct(
    *rest, sharding=layout.store_sharding(name)
  )
  shapes = {
    "features": ((rows, layout.num_features), jnp.float32),
    "final": ((rows, width), jnp.float32),
    "tokens": ((depth, rows, *layout.device_row), jnp.dtype(layout.dtype)),
    "label": ((rows,), jnp.int32),
  }
  return {name: shape(name, *shapes[name]) for name in (*layout.names, "label")}


def _empty_store(layout, rows):
  shapes = {name: store_shapes(layout, rows)[name] for name in layout.names}
  zeros = lambda: {
    name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()
  }
  shardings = {name: layout.store_sharding(name) for name in layout.names}
  return jax.jit(zeros, out_shardings=shardings)()


@functools.cache
def _writer(
  layout: Layout,
) -> Callable[[FeatureBatch, FeatureBatch, int], FeatureBatch]:
  """Make the compiled function (store, batch, first row) -> store."""
  update = jax.lax.dynamic_update_slice_in_dim

  def write(store, batch, start):
    return {
      name: update(array, batch[name], start, 1 if name == "tokens" else 0)
      for name, array in store.items()
    }

  shardings = {name: layout.store_sharding(name) for name in layout.names}
  return jax.jit(write, donate_argnums=0, out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class HostStore:
  """Features on the host, of several processes the part of each.

  Attributes:
    layout: of the batches that are sent to the devices.
    tokens: (n, *`Layout.host_row`), in memory or mapped from a file, or None.
    final: (n, D) float32.
    sums: (n,) `checksum` of every row of `tokens`, compared when it is sent;
      None: there are none, or they were compared before.
    file: name of the file that it is mapped from.
  """

  layout: Layout
  tokens: np.ndarray | None
  final: np.ndarray
  sums: np.ndarray | None = None
  file: str = ""

  def in_memory(self) -> "HostStore":
    """Return a copy whose tokens are in memory.

    Raises:
      UserError: they are not those that were written.
    """
    if self.tokens is None:
      return self
    tokens = np.empty(self.tokens.shape, self.tokens.dtype)
    for i in range(len(tokens)):
      tokens[i] = self._checked(i)
    return dataclasses.replace(self, tokens=tokens, sums=None)

  def _checked(self, number: int) -> np.ndarray:
    """Return the tokens of an image, of shape `Layout.host_row`."""
    tokens = self.tokens[number]
    if self.sums is not None and checksum(tokens) != self.sums[number]:
      raise errors.UserError(
        f"Cannot read {self.file}: the features of image {number} are not those"
        " that were written. Delete it; the same command makes it again."
      )
    return tokens

  def send(self, rows: np.ndarray) -> FeatureBatch:
    """Send a batch of these rows to the devices."""
    batch = {
      "final": mesh_lib.place_array(
        self.final[rows], self.layout.sharding("final")
      )
    }
    if not self.layout.tokens:
      return batch
    layout, size = self.layout, len(rows)
    depth = layout.row[0]
    tokens = np.zeros((depth, size, layout.own_numbers), self.tokens.dtype)
    for i, number in enumerate(rows):
      flat = self._checked(number).reshape(depth, -1)
      tokens[:, i, : flat.shape[1]] = flat
    batch["tokens"] = jax.make_array_from_process_local_data(
      layout.sharding("tokens"),
      tokens.reshape(depth, size, -1, layout.batch_row[-1]),
      (depth, size, *layout.batch_row),
    )
    return batch


def checksum(array: np.ndarray) -> int:
  """CRC-32C of an array's bits, which is faster than reading them."""
  import google_crc32c  # Comes with gcsfs.

  return google_crc32c.value(np.ascontiguousarray(array).view(np.uint8))


def store_on_host(
  layout: Layout,
  features: Iterable[FeatureBatch],
  count: int,
  progress: Callable[[int], None] = lambda done: None,
) -> HostStore:
  """Collect the features of `count` images in the host's memory."""
  arrays = {"final": np.empty((count, layout.row[-1]), np.float32)}
  if layout.tokens:
    arrays["tokens"] = np.empty((count, *layout.host_row), layout.dtype)
  done = 0
  for batch in features:
    rows = host_rows(layout, batch, count - done)
    for name, values in rows.items():
      arrays[name][done : done + len(values)] = values
    done += len(rows["final"])
    progress(done)
  return HostStore(layout, arrays.get("tokens"), arrays["final"])


def host_rows(
  layout: Layout, batch: FeatureBatch, most: int
) -> dict[str, np.ndarray]:
  """Return a batch as this process stores it on the host.

  Args:
    layout: of the batch.
    batch: of the stream.
    most: number of rows that are not padding.

  Returns:
    "final" (b, D) and "tokens" (b, *`Layout.host_row`).
  """
  rows = {"final": mesh_lib.local_part(batch["final"], 1)[:most]}
  if "tokens" in batch:
    tokens = mesh_lib.local_part(batch["tokens"], 2)
    tokens = np.moveaxis(tokens, 0, 1)[:most]
    depth, *row = layout.host_row
    flat = tokens.reshape(len(tokens), depth, -1)[..., : math.prod(row)]
    rows["tokens"] = flat.reshape(len(tokens), depth, *row)
  return rows


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
  """Pad an array with zeros to a number of rows."""
  missing = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, missing) if rows > len(array) else array
