"""From a task's split to numpy: in memory, in batches, or shuffled.

Examples are read in the order in which TFDS stores them (one file at a time, no
shuffling of files), so that `train[:800]` is the same 800 images in the same
order on every machine. Images are decoded only after a process has picked its
rows of each batch.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import damage
from vqt_jax.data import preprocess as preprocess_lib
from vqt_jax.data.task import Task
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds

Batch = dict[str, np.ndarray]

# Examples decoded at a time when a whole split is read.
LOAD_BATCH = 64

# Undecoded examples held for shuffling. Splits up to this size are reshuffled
# as a whole each epoch; of larger ones, a window this large slides over the
# stored order, which is itself a random one.
SHUFFLE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class ProcessRows:
  """Rows of each global batch that one process reads.

  Global batch k holds examples k*B .. k*B + B-1; process p of P has its rows
  p*B/P .. (p+1)*B/P - 1.
  """

  batch_size: int
  process_index: int
  process_count: int

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise errors.UserError(
        f"batch_size {self.batch_size} must be a positive multiple of the"
        f" number of processes, {self.process_count}."
      )

  @property
  def count(self) -> int:
    """Rows of this process in each batch."""
    return self.batch_size // self.process_count

  def include(self, position: Any, _: Any) -> Any:
    """Return whether the example at a position of the epoch is among them."""
    return position % self.batch_size // self.count == self.process_index


def load_arrays(
  task: Task,
  split: str,
  *,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str = "bilinear",
) -> Batch:
  """Load a whole split, in stored order.

  Args:
    task: what to read.
    split: "train", "val", "trainval" or "test".
    image_size: side, or (height, width), pixels.
    value_range: key of `backbone.VALUE_RANGES`.
    resize: key of `preprocess.RESIZES`.

  Returns:
    {"image": float32 (n, height, width, 3), "label": int32 (n,)}.

  Raises:
    UserError: not prepared, no such split, damaged, or labels out of range.
  """
  count = builders.num_examples(task, split)
  arrays: Batch = {}
  for i, batch in enumerate(
    batches(
      task,
      split,
      batch_size=min(LOAD_BATCH, count),
      image_size=image_size,
      value_range=value_range,
      resize=resize,
    )
  ):
    real = batch.pop("mask") > 0
    for key, rows in batch.items():
      if i == 0:
        arrays[key] = np.empty((count, *rows.shape[1:]), rows.dtype)
      start = i * len(rows)
      arrays[key][start : start + len(rows)] = rows[real]
  return arrays


def load_labels(task: Task, split: str) -> np.ndarray:
  """Load the labels of a split, (n,) int32, in stored order.

  Decodes no image. Raises as `load_arrays`.
  """
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  decode = lambda example: {"label": _label(task, example)}
  order = _stored_order(task, builder, split)
  rows = ProcessRows(count, 0, 1)
  return next(_read(task, builder, split, order, decode, rows, range(1)))[
    "label"
  ]


def batches(
  task: Task,
  split: str,
  *,
  batch_size: int,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str = "bilinear",
  process_index: int = 0,
  process_count: int = 1,
  start: int = 0,
) -> Iterator[Batch]:
  """Iterate over a split once, in stored order.

  Args:
    task, split, image_size, value_range, resize: as in `load_arrays`.
    batch_size: examples in a global batch, over all processes.
    process_index: this process, 0..process_count-1.
    process_count: processes that share the work.
    start: examples to skip.

  Returns:
    Iterator over this process's rows of the global batches, {"image": float32
    (rows, height, width, 3), "label": int32 (rows,), "mask": float32 (rows,)},
    rows = batch_size / process_count. Every process gets the same number of
    batches; rows without an example are zero and have mask 0.

  Raises:
    UserError: as `load_arrays`, or a batch size the processes cannot share.
  """
  rows = ProcessRows(batch_size, process_index, process_count)
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  decode = _decoder(task, builder, image_size, value_range, resize)
  order = _stored_order(task, builder, split).skip(start)
  steps = range(-(-(count - start) // batch_size))
  return _read(task, builder, split, order, decode, rows, steps)


def train_batches(
  task: Task,
  split: str,
  *,
  batch_size: int,
  epoch: int,
  seed: int,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str = "bilinear",
  process_index: int = 0,
  process_count: int = 1,
  start_step: int = 0,
) -> Iterator[Batch]:
  """Iterate over a split once, in random order.

  The order depends on `seed` and `epoch` only (and on TensorFlow's global seed,
  which this package never sets): not on the number of processes, and an epoch
  begun at `start_step` continues as if it had not been interrupted.

  Args:
    task, split, image_size, value_range, resize: as in `load_arrays`.
    batch_size, process_index, process_count: as in `batches`.
    epoch: number of the epoch, from 0.
    seed: of the order.
    start_step: batches of this epoch to skip.

  Returns:
    As `batches`: the last batch is padded and masked.

  Raises:
    UserError: as `batches`, or fewer examples than processes.
  """
  rows = ProcessRows(batch_size, process_index, process_count)
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  if count < process_count:
    raise errors.UserError(
      f"{count} examples in {split} of {task.name!r} are too few for"
      f" {process_count} processes: each needs at least one to train on."
    )
  decode = _decoder(task, builder, image_size, value_range, resize)
  order = _stored_order(task, builder, split).shuffle(
    _shuffle_buffer(builder, count),
    seed=_shuffle_seed(seed, epoch),
    reshuffle_each_iteration=False,
  )
  steps = range(start_step, -(-count // batch_size))
  order = order.skip(start_step * batch_size)
  return _read(task, builder, split, order, decode, rows, steps)


def _shuffle_buffer(builder: Any, count: int) -> int:
  """Examples that fit in `SHUFFLE_BYTES`, by their average size on disk."""
  fitting = SHUFFLE_BYTES // builders.example_bytes(builder)
  return max(1, min(count, fitting))


def _shuffle_seed(seed: int, epoch: int) -> int:
  mixed = np.random.SeedSequence((seed % 2**32, epoch)).generate_state(1)
  return int(mixed[0])


def _stored_order(task: Task, builder: Any, split: str) -> Any:
  """A split in stored order as a `tf.data.Dataset`, no image decoded.

  Its elements are pairs: number in the split, from 0, and example.
  """
  options = tf.data.Options()
  options.deterministic = True
  undecoded = {
    key: tfds.decode.SkipDecoding()
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image)
  }
  with quiet():
    dataset = builder.as_dataset(
      split=task.splits[split],
      decoders=undecoded,
      shuffle_files=False,
      read_config=tfds.ReadConfig(
        options=options,
        interleave_cycle_length=1,
        try_autocache=False,
        skip_prefetch=True,
      ),
    )
  return dataset.enumerate()


def _decoder(
  task: Task,
  builder: Any,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str,
) -> Any:
  """Make the map from an undecoded example to its image and label."""
  stored = builder.info.features[task.image_key].shape[-1]
  channels = 1 if stored == 1 else 3
  preprocess = preprocess_lib.make_preprocess(
    image_size, value_range, resize, task.pixel_scale
  )

  def decode(example: dict[str, Any]) -> dict[str, Any]:
    image = preprocess_lib.decode(example[task.image_key], channels)
    return {"image": preprocess(image), "label": _label(task, example)}

  return decode


def _label(task: Task, example: dict[str, Any]) -> Any:
  return tf.cast(task.label(example), tf.int64)


def _read(
  task: Task,
  builder: Any,
  split: str,
  order: Any,
  decode: Any,
  rows: ProcessRows,
  steps: range,
) -> Iterator[Batch]:
  """Yield this process's rows of the batches `steps`, padded and masked.

  Args:
    task: what is read.
    builder: of its dataset.
    split: of the task.
    order: its numbered examples, those of the first batch first.
    decode: from an undecoded example to a row.
    rows: of this process.
    steps: of the epoch, for which `order` has examples.

  Raises:
    UserError: an image, a record or a label is wrong.
  """
  mine = order.enumerate().filter(rows.include)
  dataset = (
    mine.map(
      lambda _, numbered: decode(numbered[1]),
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )
    .batch(rows.count)
    .prefetch(2)
  )
  empty = {
    key: np.zeros((0, *spec.shape[1:]), spec.dtype.as_numpy_dtype)
    for key, spec in dataset.element_spec.items()
  }
  done = 0  # Steps.
  try:
    iterator = dataset.as_numpy_iterator()
    for _ in steps:
      batch = next(iterator, empty)
      _check_labels(task, batch["label"])
      yield _pad(batch, rows.count)
      done += 1
  except tf.errors.OpError as error:
    failed = mine.skip(done * rows.count).take(rows.count)
    every = _stored_order(task, builder, split)
    raise damage.explain(
      error, task, builder, split, every, failed, decode
    ) from error


def _check_labels(task: Task, labels: np.ndarray) -> None:
  wrong = labels[(labels < 0) | (labels >= task.num_classes)]
  if len(wrong):
    raise errors.UserError(
      f"Label {wrong[0]} in {task.name!r} is outside its {task.num_classes}"
      f" classes, 0..{task.num_classes - 1}. Check the dataset, or"
      " num_classes and label_key."
    )


def _pad(batch: Batch, rows: int) -> Batch:
  count = len(batch["label"])
  if count < rows:
    batch = {
      key: np.pad(value, [(0, rows - count)] + [(0, 0)] * (value.ndim - 1))
      for key, value in batch.items()
    }
  return {
    **batch,
    "label": batch["label"].astype(np.int32),
    "mask": (np.arange(rows) < count).astype(np.float32),
  }
