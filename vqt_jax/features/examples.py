"""Where the examples of each split live, decided from their size."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.features import batches as batches_lib
from vqt_jax.features import disk
from vqt_jax.features import memory_budget
from vqt_jax.features import store
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes
from vqt_jax.runtime import units

# A dataset of this size is read for its labels alone: a second or two.
LABEL_BYTES = 2**28


@dataclasses.dataclass
class Examples:
  """Serves the splits of a task to training and evaluation.

  Attributes:
    config: of the run.
    console: hears what was decided.
    task: whose splits are served.
    backbone: tells image size, value range, and what features come from.
    tuner: tells what must be stored.
    params: the backbone's, on the devices.
    mesh: examples are spread over its `data` axis.
    extracted: seconds before the first images were through the backbone, and
      of each after them; None until features were extracted.
  """

  config: ml_collections.ConfigDict
  console: console_lib.Console
  task: data.Task
  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  params: Any
  mesh: jax.sharding.Mesh
  extracted: tuple[float, float] | None = None
  _held: tuple[str, Any] | None = None
  _bases: dict[str, str] = dataclasses.field(default_factory=dict)
  _counts: dict[str, int] = dataclasses.field(default_factory=dict)
  _places: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
  _known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def count(self, split: str) -> int:
    """Examples in a split."""
    if split not in self._counts:
      self._counts[split] = data.num_examples(self.task, split)
    return self._counts[split]

  def source(
    self, split: str, some: np.ndarray | None = None
  ) -> batches_lib.Source:
    """The examples of a split, or some rows of it, to train on.

    Raises:
      UserError: rows of a split that is read anew every epoch.
    """
    c = self.config
    if self._place(split)[0] != "stream":
      held, rows = self._resident(split)
      rows = rows if some is None else rows[some]
      if isinstance(held, batches_lib.Stored):
        return dataclasses.replace(held, rows=rows)
      return batches_lib.Resident(held, rows, c.batch_size, c.seed, self.mesh)
    if some is not None:
      self.check_rows(split)
    check_batch(c.batch_size, self.mesh)
    read = functools.partial(
      data.train_batches,
      self.task,
      split,
      batch_size=c.batch_size,
      seed=c.seed,
      **self._reading,
    )
    return batches_lib.Streamed(
      lambda epoch, start: processes.iterate_together(
        read(epoch=epoch, start_step=start)
      ),
      self.count(split),
      c.batch_size,
      self.mesh,
    )

  def evaluation(
    self, split: str, some: np.ndarray | None = None
  ) -> Iterator[batches_lib.Chunk]:
    """A split, or some rows of it, in order, each example exactly once.

    What is to be held of it is there when this returns.
    """
    if split == "test" or self._place(split)[0] == "stream":
      batches = self._batches(split)
      return (batches_lib.on_devices(batch, self.mesh) for batch in batches)
    held, rows = self._resident(split)
    rows = rows if some is None else rows[some]
    if isinstance(held, batches_lib.Stored):
      held = dataclasses.replace(held, rows=rows, batch_size=self._batch_size)
      return held.chunks()
    shards = self.mesh.shape["data"]
    order, mask = store.order(rows, self._batch_size, shards)
    return ((held, *batch) for batch in zip(order[:, None], mask[:, None]))

  def check_rows(self, split: str) -> None:
    """Raises a `UserError` if some rows of a split cannot be had."""
    if self._place(split)[0] == "stream":
      raise errors.UserError(
        f"config.protocol=best trains on parts of {split}, but it is read"
        " anew every epoch: keep its features (config.features=disk) or"
        " images (config.data=device), or take protocol=full."
      )

  def is_live(self, split: str) -> bool:
    """Whether its images go through the backbone in every step."""
    return self._place(split)[0] in ("images", "stream")

  def check_classes(self) -> None:
    """Notes classes that are not trained on; see `data.check_classes`.

    Nobody can choose the splits of VTAB. Of what is read anew every epoch
    labels are only read if all of it is small. Those of the test set wait for
    the test.
    """
    if self.task.group:
      return
    checked = []
    for split in ("train", "val", "trainval"):
      base = self._base(split)
      if self._place(base)[0] == "stream":
        with processes.raise_on_all():
          if data.num_bytes(self.task, base) > LABEL_BYTES:
            continue
      checked.append(split)
    with processes.raise_on_all():
      labels = {
        split: self._labels(self._base(split))[self._rows_of(split)]
        for split in checked
      }
      note = data.check_classes(self.task, labels)
    if note:
      self.console.note(note, "classes")

  @property
  def _decoding(self) -> dict[str, Any]:
    return {
      "image_size": self.backbone.config.image_size,
      "value_range": self.backbone.value_range,
      "resize": self.config.resize,
    }

  @property
  def _reading(self) -> dict[str, Any]:
    """Of this process's part of each batch."""
    return {
      "process_index": jax.process_index(),
      "process_count": jax.process_count(),
      **self._decoding,
    }

  @property
  def _batch_size(self) -> int:
    """To run the backbone on: a multiple of the devices that share it."""
    shards = self.mesh.shape["data"]
    return -(-self.config.eval_batch_size // shards) * shards

  @property
  def _layout(self) -> store.Layout:
    return store.layout_of(self.config, self.tuner, self.mesh)

  @property
  def _folder(self) -> pathlib.Path:
    return disk.folder(self.config.store_dir)

  def _batches(self, split: str, start: int = 0) -> Iterator[Any]:
    return processes.iterate_together(
      data.batches(
        self.task,
        split,
        batch_size=self._batch_size,
        start=start,
        **self._reading,
      )
    )

  def _base(self, split: str) -> str:
    if split not in self._bases:
      self._bases[split] = base_of(self.task, split)
    return self._bases[split]

  @functools.cached_property
  def _room(self) -> dict[str, int]:
    return memory_budget.room(self.config.store_dir, self.mesh)

  def _place(self, split: str) -> tuple[str, str]:
    """Where a split's examples live, and why; see `places.choose`."""
    base = self._base(split)
    if base not in self._places:
      self._places[base] = self._choose(base)
    return self._places[base]

  def _choose(self, base: str) -> tuple[str, str]:
    count, room = self.count(base), dict(self._room)
    stored = count * self._layout.bytes_per_image
    images = count * 12 * int(np.prod(self.backbone.config.image_size))
    if stored > room["device"]:  # A file that is there needs no more room.
      there = max(file.size for file in self._files(base))
      room["disk"] += int(processes.all_reduce_min(there))
    backend = jax.default_backend()
    return memory_budget.choose(self.config, stored, images, room, backend)

  def _resident(self, split: str) -> tuple[Any, np.ndarray]:
    """What is held of a split, and which of its rows are the split's."""
    base = self._base(split)
    if self._held is None or self._held[0] != base:
      self._held = None  # Makes room before the next one comes.
      self._held = (base, self._load(base, *self._place(split)))
    return self._held[1], self._rows_of(split)

  def _rows_of(self, split: str) -> np.ndarray:
    """Rows of a split in what is loaded for it."""
    first = 0
    if self._base(split) != split and split == "val":
      first = self.count("train")
    return np.arange(first, first + self.count(split))

  def _labels(self, base: str) -> np.ndarray:
    if base not in self._known:
      self._known[base] = data.load_labels(self.task, base)
    return self._known[base]

  def _load(self, base: str, place: str, why: str) -> Any:
    if place == "images":
      return self._load_images(base, why)
    count, layout = self.count(base), self._layout
    if place == "device":
      room = self._room["device"]
      layout = store.device_layout(layout, self.tuner, count, room)
    self.console.note(_plan(layout, count, place, why), "store")
    with processes.raise_on_all():
      label = self._labels(base)
    if place == "disk" or self.config.store_dir:
      return self._place_kept(self._on_disk(base), label, place, layout)
    with self.console.progress("extract", count, "image") as line:
      parts = self._stream(base)
      if place == "host":
        kept = store.on_host(layout, parts, count, line.update)
        held = self._stored(kept, label)
      else:
        held = self._on_devices(layout, parts, label, line.update)
      self.extracted = line.start_and_pace()
      return held

  def _on_devices(
    self,
    layout: store.Layout,
    parts: Iterable[store.Part],
    label: np.ndarray,
    progress: Callable[[int], None] = lambda done: None,
  ) -> dict[str, jax.Array]:
    if layout.projected:
      parts = store.project(layout, self.params, parts)
    held = store.on_devices(layout, parts, label, progress)
    return jax.block_until_ready(held)

  def _place_kept(
    self,
    kept: store.HostStore,
    label: np.ndarray,
    place: str,
    layout: store.Layout,
  ) -> Any:
    """Features from a file to where they are used, as `layout` there."""
    if place == "device":
      starts = range(0, len(label), self._batch_size)
      rows = (_rows(s, self._batch_size, len(label)) for s in starts)
      parts = batches_lib.ahead(kept.send, rows)
      return self._on_devices(layout, parts, label)
    if place == "host" and kept.tokens is not None:
      kept = dataclasses.replace(kept, tokens=np.array(kept.tokens))
    return self._stored(kept, label)

  def _stream(self, base: str, start: int = 0) -> Iterator[store.Part]:
    """The stream of a split's images from `start` on."""
    return store.stream(self._layout, self.params, self._batches(base, start))

  def _stored(self, kept: store.HostStore, label: np.ndarray):
    c = self.config
    rows = np.arange(len(label))
    return batches_lib.Stored(kept, label, rows, c.batch_size, c.seed)

  def _files(self, base: str) -> list[disk.File]:
    """Files in which a split's features may be; the first is its own."""
    name = f"{self.task.dataset.replace('/', '_')}-{base}"
    made_from = self._made_from(base)
    layouts = [self._layout]
    if not self._layout.tokens:  # Those of a method that reads more will do.
      layouts.append(dataclasses.replace(self._layout, tokens=True))
    return [
      disk.File(self._folder, name, made_from, layout, self.count(base))
      for layout in layouts
    ]

  def _on_disk(self, base: str) -> store.HostStore:
    """The features in their file, extracted if there is none."""
    known = self._files(base)
    for file in known:
      with processes.raise_on_all():
        kept = self._open(file)
      if not processes.any_process(kept is None):
        self.console.note(f"found in {file.path}", "extract")
        tokens = kept.tokens if self._layout.tokens else None
        return dataclasses.replace(kept, layout=self._layout, tokens=tokens)
    file = known[0]
    with self.console.progress("extract", self.count(base), "image") as line:
      stream = functools.partial(self._stream, base)
      file.write(stream, self._batch_size, line.update)
      self.extracted = line.start_and_pace()
      line.summary = str(file.path)
    return file.open()

  def _open(self, file: disk.File) -> store.HostStore | None:
    try:
      return file.open()
    except disk.Damaged as e:
      self.console.note(f"{file.path} is damaged ({e}); it is made again")
      with files.explain_write_errors(file.path):
        file.path.unlink(missing_ok=True)

  def _made_from(self, base: str) -> dict[str, Any]:
    """All that decides the features of a split."""
    return {
      "weights": self.backbone.digest,
      "vit": dataclasses.asdict(self.backbone.config),
      "decoding": self._decoding,
      "data": data.images_fingerprint(self.task, base),
    }

  def _load_images(self, base: str, why: str) -> dict[str, jax.Array]:
    count = self.count(base)
    with self.console.progress("images", count, "image") as line:
      with processes.raise_on_all():
        examples = data.load_arrays(self.task, base, **self._decoding)
      held = jax.block_until_ready(
        store.resident(examples, self.mesh, self.backbone.config.dtype)
      )
      size = units.format_bytes(sum(x.nbytes for x in held.values()))
      line.summary = (
        f"{size} on the devices, through the backbone every step, {why}"
      )
      line.update(count)
    return held


def check_batch(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises a `UserError` if streamed batches cannot be shared by devices."""
  if batch_size % mesh.shape["data"]:
    raise errors.UserError(
      f"config.batch_size={batch_size} cannot be shared by"
      f" {mesh.shape['data']} devices: streamed training needs a multiple of"
      " their number."
    )


def base_of(task: data.Task, split: str) -> str:
  """The split that is loaded for another: "trainval" where it holds both."""
  if split == "test":
    return split
  splits = task.splits
  both = f"{splits['train']}+{splits['val']}"
  if splits["trainval"] != both and not data.is_concatenation(
    task, ("train", "val"), "trainval"
  ):
    return split
  return "trainval"


def _plan(layout: store.Layout, count: int, place: str, why: str) -> str:
  """What will be kept, how large it is, where, and why there."""
  size, each = units.format_bytes, layout.bytes_per_image
  what = "of final features"
  if layout.tokens:
    what = f"in {layout.dtype}"
  if layout.projected:
    what += " as keys and values"
  return (
    f"{count:,} images x {size(each)} = {size(count * each)} {what}, kept"
    f" {memory_budget.FEATURES[place]}, {why}"
  )


def _rows(start: int, size: int, count: int) -> np.ndarray:
  """Of a batch; the last one repeats its last row."""
  return np.minimum(np.arange(start, start + size), count - 1)
