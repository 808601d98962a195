"""The examples of a task, stored where their size permits."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.features import batches as batches_lib
from vqt_jax.features import disk
from vqt_jax.features import images as images_lib
from vqt_jax.features import storage as storage_lib
from vqt_jax.features import store
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import ahead
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes
from vqt_jax.runtime import units

# A dataset of up to this size is read for its labels alone: a second or two.
LABEL_BYTES = 2**28


@dataclasses.dataclass
class Examples:
  """The splits of a task, loaded for training and evaluation.

  One split is loaded at a time. Where "trainval" consists of "train" and "val",
  it is loaded for all three.

  Attributes:
    config: of the run.
    console: shows what is stored, where and why.
    task: of the splits.
    backbone: computes the features; images have its size and value range.
    tuner: reads the features.
    params: the backbone's, on the devices.
    mesh: examples are sharded over its `data` axis.
    extraction_seconds: time before the first images had passed through the
      backbone, and time of each image after them; None before any extraction.
  """

  config: ml_collections.ConfigDict
  console: console_lib.Console
  task: data.Task
  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  params: Any
  mesh: jax.sharding.Mesh
  extraction_seconds: tuple[float, float] | None = None
  _loaded: tuple[str, Any] | None = None
  _loaded_splits: dict[str, str] = dataclasses.field(default_factory=dict)
  _counts: dict[str, int] = dataclasses.field(default_factory=dict)
  _storages: dict[str, tuple[str, str]] = dataclasses.field(
    default_factory=dict
  )
  _label_arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def count(self, split: str) -> int:
    """Number of examples in a split."""
    if split not in self._counts:
      self._counts[split] = data.num_examples(self.task, split)
    return self._counts[split]

  def training_batches(
    self, split: str, rows: np.ndarray | None = None
  ) -> batches_lib.Batches:
    """Return batches of a split, or of some rows of it, to train on.

    Raises:
      UserError: rows of a split that is streamed.
    """
    c = self.config
    if self._storage(split) != "stream":
      loaded, all_rows = self._load_split(split)
      rows = all_rows if rows is None else all_rows[rows]
      if isinstance(loaded, batches_lib.HostBatches):
        return dataclasses.replace(loaded, rows=rows)
      return batches_lib.ResidentBatches(
        loaded, rows, c.batch_size, c.seed, self.mesh
      )
    if rows is not None:
      self.check_rows(split)
    check_batch_size(c.batch_size, self.mesh)
    read = functools.partial(
      data.train_batches,
      self.task,
      split,
      batch_size=c.batch_size,
      seed=c.seed,
      **self._reading,
    )
    return batches_lib.StreamedBatches(
      lambda epoch, start: processes.iterate_together(
        read(epoch=epoch, start_step=start)
      ),
      self.count(split),
      c.batch_size,
      self.mesh,
    )

  def evaluation_calls(
    self, split: str, rows: np.ndarray | None = None
  ) -> Iterator[batches_lib.Call]:
    """Return calls over a split, or of some rows of it, each example once.

    When this returns, a split that is stored is loaded.
    """
    if split == "test" or self._storage(split) == "stream":
      batches = self._read_batches(split)
      return (batches_lib.call_of_batch(x, self.mesh) for x in batches)
    loaded, all_rows = self._load_split(split)
    rows = all_rows if rows is None else all_rows[rows]
    if isinstance(loaded, batches_lib.HostBatches):
      loaded = dataclasses.replace(
        loaded, rows=rows, batch_size=self._eval_batch_size
      )
      return loaded.calls()
    shards = self.mesh.shape["data"]
    order, mask = batches_lib.batch_order(rows, self._eval_batch_size, shards)
    return ((loaded, *batch) for batch in zip(order[:, None], mask[:, None]))

  def check_rows(self, split: str) -> None:
    """Raise a `UserError` if a split is streamed: it has no rows to pick."""
    if self._storage(split) == "stream":
      raise errors.UserError(
        f"Cross-validation trains on parts of {split}, but it is read anew"
        " every epoch: keep its features (config.features=disk) or images"
        " (config.data=device), or do without: protocol=full, and a"
        " method other than auto."
      )

  def is_live(self, split: str) -> bool:
    """Return whether a split passes through the backbone in every step."""
    return self._storage(split) in ("images", "stream")

  def check_classes(self) -> None:
    """Note classes that are not trained on; see `data.check_classes`.

    Splits of VTAB are fixed, so nothing is noted. Labels of a split that is
    streamed are only read if all of it is small. Labels of the test set are not
    read before the test.
    """
    if self.task.group:
      return
    checked = []
    for split in ("train", "val", "trainval"):
      loaded_split = self._loaded_split(split)
      if self._storage(loaded_split) == "stream":
        with processes.raise_on_all():
          if data.num_bytes(self.task, loaded_split) > LABEL_BYTES:
            continue
      checked.append(split)
    with processes.raise_on_all():
      labels = {
        split: self._labels(self._loaded_split(split))[self._rows_of(split)]
        for split in checked
      }
      note = data.check_classes(self.task, labels)
    if note:
      self.console.note(note, "classes")

  def labels(self, split: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Labels of a split, or of some rows of it, (n,) int32."""
    with processes.raise_on_all():
      found = self._labels(self._loaded_split(split))[self._rows_of(split)]
    return found if rows is None else found[rows]

  def time_forward(self, count: int) -> tuple[float, float]:
    """Time the backbone on `count` images for each device.

    Returns:
      Seconds to compile, and seconds of an image after that.
    """
    count *= self.mesh.shape["data"]
    mine = count // jax.process_count()
    shape = (mine, *self.backbone.config.image_size, 3)
    batches = itertools.repeat({"image": np.zeros(shape, np.float32)}, 3)
    times = [time.monotonic()]
    for _ in store.extract(self._layout, self.params, batches):
      times.append(time.monotonic())
    each = (times[3] - times[1]) / 2
    return max(0.0, times[1] - times[0] - each), each / count

  @property
  def _decoding(self) -> dict[str, Any]:
    return {
      "image_size": self.backbone.config.image_size,
      "value_range": self.backbone.value_range,
      "resize": self.config.resize,
    }

  @property
  def _reading(self) -> dict[str, Any]:
    """Options to read this process's part of each batch."""
    return {
      "process_index": jax.process_index(),
      "process_count": jax.process_count(),
      **self._decoding,
    }

  @property
  def _eval_batch_size(self) -> int:
    return eval_batch_size(self.config, self.mesh)

  @property
  def _layout(self) -> store.Layout:
    return store.make_layout(self.config, self.tuner, self.mesh)

  @property
  def _folder(self) -> pathlib.Path:
    return disk.folder(self.config.store_dir)

  def _read_batches(self, split: str, start: int = 0) -> Iterator[Any]:
    return processes.iterate_together(
      data.batches(
        self.task,
        split,
        batch_size=self._eval_batch_size,
        start=start,
        **self._reading,
      )
    )

  def _loaded_split(self, split: str) -> str:
    if split not in self._loaded_splits:
      self._loaded_splits[split] = loaded_split(self.task, split)
    return self._loaded_splits[split]

  @functools.cached_property
  def _available(self) -> dict[str, int]:
    return storage_lib.available_bytes(self.config.store_dir, self.mesh)

  def _storage(self, split: str) -> str:
    return self._storage_and_reason(split)[0]

  def _storage_and_reason(self, split: str) -> tuple[str, str]:
    """Storage of a split, and the reason; see `storage.choose`."""
    split = self._loaded_split(split)
    if split not in self._storages:
      count, available = self.count(split), dict(self._available)
      feature_bytes = self._layout.bytes_in(count)
      image_size = self.backbone.config.image_size
      if feature_bytes["device"] > available["device"]:
        # A file that exists already needs no more space.
        existing = max(file.size for file in self._files(split))
        available["disk"] += int(processes.all_reduce_min(existing))
      self._storages[split] = storage_lib.choose(
        self.config,
        self.tuner,
        feature_bytes,
        count * images_lib.bytes_per_image(image_size),
        available,
        jax.default_backend(),
      )
    return self._storages[split]

  def _load_split(self, split: str) -> tuple[Any, np.ndarray]:
    """Load a split; return what is loaded, and the split's rows in it."""
    loaded_split = self._loaded_split(split)
    if self._loaded is None or self._loaded[0] != loaded_split:
      self._loaded = None  # Free memory before the next split is loaded.
      self._loaded = (loaded_split, self._load(loaded_split))
    return self._loaded[1], self._rows_of(split)

  def _rows_of(self, split: str) -> np.ndarray:
    """Rows of a split in the split that is loaded for it."""
    first = 0
    if self._loaded_split(split) != split and split == "val":
      first = self.count("train")
    return np.arange(first, first + self.count(split))

  def _labels(self, split: str) -> np.ndarray:
    if split not in self._label_arrays:
      self._label_arrays[split] = data.load_labels(self.task, split)
    return self._label_arrays[split]

  def _load(self, split: str) -> Any:
    storage, reason = self._storage_and_reason(split)
    if storage == "images":
      return self._load_images(split, reason)
    count, layout = self.count(split), self._layout
    if storage == "device":
      available = self._available["device"]
      layout = store.device_layout(layout, self.tuner, count, available)
    self.console.note(_describe(layout, count, storage, reason), "store")
    with processes.raise_on_all():
      label = self._labels(split)
    if storage == "disk" or self.config.store_dir:
      return self._load_file(split, label, storage, layout)
    with self.console.progress("extract", count, "image") as line:
      features = self._extract(split)
      if storage == "host":
        host_store = store.store_on_host(layout, features, count, line.update)
        loaded = self._host_batches(host_store, label)
      else:
        loaded = self._store_on_devices(layout, features, label, line.update)
      self.extraction_seconds = line.start_and_pace()
      return loaded

  def _store_on_devices(
    self,
    layout: store.Layout,
    features: Iterable[store.FeatureBatch],
    label: np.ndarray,
    progress: Callable[[int], None] = lambda done: None,
  ) -> dict[str, jax.Array]:
    if layout.projected:
      features = store.project(layout, self.params, features)
    if layout.num_features:
      features = store.read(self.tuner, features)
    arrays = store.store_on_devices(layout, features, label, progress)
    return jax.block_until_ready(arrays)

  def _load_file(
    self, split: str, label: np.ndarray, storage: str, layout: store.Layout
  ) -> Any:
    """Load a split's features from their file, extracting them if needed."""
    host_store = self._open_or_extract(split)
    if storage == "device":
      starts = range(0, len(label), self._eval_batch_size)
      rows = (_rows(s, self._eval_batch_size, len(label)) for s in starts)
      features = ahead.prefetch(host_store.send, rows)
      return self._store_on_devices(layout, features, label)
    if storage == "host":
      host_store = host_store.in_memory()
    return self._host_batches(host_store, label)

  def _extract(
    self, split: str, start: int = 0
  ) -> Iterator[store.FeatureBatch]:
    """Extract the features of a split's images from `start` on."""
    batches = self._read_batches(split, start)
    return store.extract(self._layout, self.params, batches)

  def _host_batches(
    self, host_store: store.HostStore, label: np.ndarray
  ) -> batches_lib.HostBatches:
    c, rows = self.config, np.arange(len(label))
    return batches_lib.HostBatches(
      host_store, label, rows, c.batch_size, c.seed
    )

  def _files(self, split: str) -> list[disk.FeatureFile]:
    """Files that may hold a split's features; the first is its own."""
    name = f"{self.task.dataset.replace('/', '_')}-{split}"
    inputs = {
      "weights": self.backbone.digest,
      "vit": self.backbone.config.as_dict(),
      "decoding": self._decoding,
      "data": data.images_fingerprint(self.task, split),
    }
    layouts = [self._layout]
    if not self._layout.tokens:  # A file with tokens has the final feature too.
      layouts.append(dataclasses.replace(self._layout, tokens=True))
    return [
      disk.FeatureFile(self._folder, name, inputs, layout, self.count(split))
      for layout in layouts
    ]

  def _open_or_extract(self, split: str) -> store.HostStore:
    known = self._files(split)
    for file in known:
      with processes.raise_on_all():
        host_store = self._open(file)
      if not processes.any_process(host_store is None):
        self.console.note(f"found in {file.path}", "extract")
        tokens = host_store.tokens if self._layout.tokens else None
        return dataclasses.replace(
          host_store, layout=self._layout, tokens=tokens
        )
    file = known[0]
    with self.console.progress("extract", self.count(split), "image") as line:
      extract = functools.partial(self._extract, split)
      file.write(extract, self._eval_batch_size, line.update)
      self.extraction_seconds = line.start_and_pace()
      line.summary = str(file.path)
    return file.open()

  def _open(self, file: disk.FeatureFile) -> store.HostStore | None:
    """Open a file if it exists; remove it if it is damaged."""
    try:
      return file.open()
    except disk.DamagedFile as e:
      self.console.note(f"{file.path} is damaged ({e}); it is made again")
      with files.explain_write_errors(file.path):
        file.path.unlink(missing_ok=True)

  def _load_images(self, split: str, reason: str) -> dict[str, jax.Array]:
    count = self.count(split)
    with self.console.progress("images", count, "image") as line:
      with processes.raise_on_all():
        examples = data.load_arrays(self.task, split, **self._decoding)
      dtype = self.backbone.config.dtype
      arrays = jax.block_until_ready(
        images_lib.images_on_devices(examples, self.mesh, dtype)
      )
      size = units.format_bytes(sum(x.nbytes for x in arrays.values()))
      line.summary = (
        f"{size} on the devices, through the backbone every step, {reason}"
      )
      line.update(count)
    return arrays


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raise a `UserError` if streamed batches do not divide among the devices."""
  if batch_size % mesh.shape["data"]:
    raise errors.UserError(
      f"config.batch_size={batch_size} cannot be shared by"
      f" {mesh.shape['data']} devices: streamed training needs a multiple of"
      " their number."
    )


def eval_batch_size(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> int:
  """Batch size of extraction and evaluation, a multiple of the devices."""
  shards = mesh.shape["data"]
  return -(-config.eval_batch_size // shards) * shards


def loaded_split(task: data.Task, split: str) -> str:
  """Return the split to load for another: "trainval" if it holds both parts."""
  if split == "test":
    return split
  splits = task.splits
  both = f"{splits['train']}+{splits['val']}"
  if splits["trainval"] != both and not data.is_concatenation(
    task, ("train", "val"), "trainval"
  ):
    return split
  return "trainval"


def _describe(
  layout: store.Layout, count: int, storage: str, reason: str
) -> str:
  """Describe what is stored, its size, the storage and the reason."""
  size, each = units.format_bytes, layout.bytes_per_image
  content = "of final features"
  if layout.tokens:
    content = f"in {layout.dtype}"
  if layout.projected:
    content += " as keys and values"
  if layout.num_features:
    content += " as features of the head"
  return (
    f"{count:,} images x {size(each)} = {size(count * each)} {content}, kept"
    f" {storage_lib.FEATURE_STORAGE[storage]}, {reason}"
  )


def _rows(start: int, size: int, count: int) -> np.ndarray:
  """Rows of a batch; the last batch repeats the last row."""
  return np.minimum(np.arange(start, start + size), count - 1)
