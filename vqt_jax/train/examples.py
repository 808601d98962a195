"""Where the examples of each split live, decided from their size."""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax import backbone as backbone_lib
from vqt_jax import console as console_lib
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import parallel
from vqt_jax import tuner as tuner_lib
from vqt_jax.train import sources
from vqt_jax.train import store

# What data may take of the devices' memory; the rest is for the step.
MEMORY_SHARE = 0.4


@dataclasses.dataclass
class Examples:
  """Serves the splits of a task to training and evaluation.

  Attributes:
    config: of the run.
    console: hears what was decided.
    task: whose splits are served.
    backbone: tells image size and value range.
    tuner: tells what must be stored.
    params: the backbone's, on the devices.
    mesh: examples are spread over its `data` axis.
  """

  config: ml_collections.ConfigDict
  console: console_lib.Console
  task: data.Task
  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  params: Any
  mesh: jax.sharding.Mesh
  _held: tuple[str, dict[str, jax.Array]] | None = None

  @property
  def _decoding(self) -> dict[str, Any]:
    return {
        "image_size": self.backbone.config.image_size,
        "value_range": self.backbone.value_range,
        "resize": self.config.resize,
    }

  def count(self, split: str) -> int:
    """Examples in a split."""
    return data.num_examples(self.task, split)

  def source(
      self, split: str, some: np.ndarray | None = None
  ) -> sources.Resident | sources.Streamed:
    """The examples of a split, or some rows of it, to train on."""
    c = self.config
    if self._place(split) != "stream":
      held, rows = self._resident(split)
      rows = rows if some is None else rows[some]
      return sources.Resident(held, rows, c.batch_size, c.seed, self.mesh)
    if c.batch_size % self.mesh.shape["data"]:
      raise errors.UserError(
          f"config.batch_size={c.batch_size} cannot be shared by"
          f" {self.mesh.shape['data']} devices: streamed training needs a"
          " multiple of their number."
      )
    read = functools.partial(
        data.train_batches,
        self.task,
        split,
        batch_size=c.batch_size,
        seed=c.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **self._decoding,
    )
    return sources.Streamed(
        lambda epoch, start: read(epoch=epoch, start_step=start),
        data.num_examples(self.task, split),
        c.batch_size,
        self.mesh,
    )

  def evaluation(
      self, split: str, some: np.ndarray | None = None
  ) -> Iterator[sources.Chunk]:
    """A split, or some rows of it, in order, each example exactly once."""
    batch_size = self._fill(self.config.eval_batch_size)
    if split != "test" and self._place(split) != "stream":
      held, rows = self._resident(split)
      rows = rows if some is None else rows[some]
      shards = self.mesh.shape["data"]
      yield held, *store.order(rows, batch_size, shards)
      return
    for batch in data.batches(
        self.task,
        split,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **self._decoding,
    ):
      yield sources.on_devices(batch, self.mesh)

  def _fill(self, batch_size: int) -> int:
    """The next multiple of the devices that share a batch."""
    shards = self.mesh.shape["data"]
    return -(-batch_size // shards) * shards

  def _base(self, split: str) -> str:
    """The split that is loaded for it: "trainval" where it holds both."""
    splits = self.task.splits
    both = f"{splits['train']}+{splits['val']}"
    return "trainval" if splits["trainval"] == both else split

  @functools.cached_property
  def _room(self) -> float:
    """Bytes that data may take of all devices; the same on every process."""
    memory = MEMORY_SHARE * store.device_memory()
    return parallel.smallest(memory) * self.mesh.shape["data"]

  def _place(self, split: str) -> str:
    """ "store", "device" (images there) or "stream"."""
    c = self.config
    count = data.num_examples(self.task, self._base(split))
    stored = count * store.bytes_per_image(self.tuner)
    images = count * 12 * np.prod(self.backbone.config.image_size)
    # Extraction holds the decoded images on the host, so they must fit too.
    if c.features == "store" or (
        not c.features
        and not c.embedding_dropout
        and c.data != "stream"
        and stored <= self._room
        and images <= self._room
    ):
      return "store"
    if c.data == "device" or (not c.data and images <= self._room):
      return "device"
    return "stream"

  def _resident(self, split: str) -> tuple[dict[str, jax.Array], np.ndarray]:
    """Data on the devices, and which of its rows are the split's."""
    base = self._base(split)
    if self._held is None or self._held[0] != base:
      self._held = None  # Makes room before the next one comes.
      self._held = (base, self._load(base, self._place(split)))
    count = data.num_examples(self.task, split)
    first = 0
    if base != split and split == "val":
      first = data.num_examples(self.task, "train")
    return self._held[1], np.arange(first, first + count)

  def _load(self, base: str, place: str) -> dict[str, jax.Array]:
    count = data.num_examples(self.task, base)
    with self.console.phase("store", count, "image") as line:
      examples = data.load_arrays(self.task, base, **self._decoding)
      if place == "device":
        held = jax.block_until_ready(store.resident(examples, self.mesh))
        what = "images on the device, through the backbone every step"
      else:
        held = store.extract(
            self.tuner, self.params, examples, self.mesh,
            self._fill(self.config.eval_batch_size), line.update,
        )  # fmt: skip
        what = f"frozen tokens, {self.tuner.config.dtype}, kept on the device"
      size = sum(x.nbytes for x in held.values()) / 2**20
      line.summary = f"{size:,.0f} MiB: {what}"
      line.update(count)
    return held
