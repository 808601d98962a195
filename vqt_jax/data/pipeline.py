"""From a task's split to numpy: in memory, in batches, or shuffled."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import preprocess
from vqt_jax.data import reading
from vqt_jax.data.task import Task

# Examples decoded at a time when a whole split is read.
LOAD_BATCH = 64

# Undecoded examples held for shuffling. Splits up to this size are reshuffled
# as a whole each epoch; of larger ones, a window this large slides over the
# stored order, which is itself a random one.
SHUFFLE_BYTES = 2**30


def load_arrays(
  task: Task,
  split: str,
  *,
  image_size: preprocess.ImageSize,
  value_range: str,
  resize: str = "bilinear",
) -> reading.Batch:
  """A whole split in memory, in stored order.

  Args:
    task: what to read.
    split: "train", "val", "trainval" or "test".
    image_size: side, or (height, width), pixels.
    value_range: key of `backbone.VALUE_RANGES`.
    resize: key of `images.RESIZES`.

  Returns:
    {"image": float32 (n, height, width, 3), "label": int32 (n,)}.

  Raises:
    UserError: not prepared, no such split, damaged, or labels out of range.
  """
  count = builders.num_examples(task, split)
  arrays: reading.Batch = {}
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


def batches(
  task: Task,
  split: str,
  *,
  batch_size: int,
  image_size: preprocess.ImageSize,
  value_range: str,
  resize: str = "bilinear",
  process_index: int = 0,
  process_count: int = 1,
  start: int = 0,
) -> Iterator[reading.Batch]:
  """One pass over a split in stored order, each example exactly once.

  Args:
    task: what to read.
    split: "train", "val", "trainval" or "test".
    batch_size: examples in a global batch, over all processes.
    image_size: side, or (height, width), pixels.
    value_range: key of `backbone.VALUE_RANGES`.
    resize: key of `images.RESIZES`.
    process_index: this process, 0..process_count-1.
    process_count: processes that share the work.
    start: examples to leave out at the beginning.

  Returns:
    Iterator over this process's rows of the global batches, {"image": float32
    (rows, height, width, 3), "label": int32 (rows,), "mask": float32 (rows,)},
    rows = batch_size / process_count. Every process gets the same number of
    batches; rows without an example are zero and have mask 0.

  Raises:
    UserError: as `load_arrays`, or a batch size the processes cannot share.
  """
  rows = reading.Rows(batch_size, process_index, process_count)
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  decode = reading.decoder(task, builder, image_size, value_range, resize)
  order = reading.stored_order(task, builder, split).skip(start)
  steps = range(-(-(count - start) // batch_size))
  return reading.read(task, builder, split, order, decode, rows, steps)


def load_labels(task: Task, split: str) -> np.ndarray:
  """The labels of a split, (n,) int32, in stored order; decodes no image.

  Raises:
    UserError: as `load_arrays`.
  """
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  batches_ = reading.read(
    task,
    builder,
    split,
    reading.stored_order(task, builder, split),
    lambda example: {"label": reading.label_of(task, example)},
    reading.Rows(count, 0, 1),
    range(1),
  )
  return next(batches_)["label"]


def train_batches(
  task: Task,
  split: str,
  *,
  batch_size: int,
  epoch: int,
  seed: int,
  image_size: preprocess.ImageSize,
  value_range: str,
  resize: str = "bilinear",
  process_index: int = 0,
  process_count: int = 1,
  start_step: int = 0,
) -> Iterator[reading.Batch]:
  """One epoch in random order, for data too large to keep on the device.

  The order depends on `seed` and `epoch` only (and on TensorFlow's global seed,
  which this package never sets): not on the number of processes, and an epoch
  begun at `start_step` continues as if it hadn't been interrupted. A split of
  up to `SHUFFLE_BYTES` is shuffled as a whole.

  Args:
    task: what to read.
    split: "train", "val", "trainval" or "test".
    batch_size: examples in a global batch, over all processes.
    epoch: epoch, from 0.
    seed: of the order of the data.
    image_size: side, or (height, width), pixels.
    value_range: key of `backbone.VALUE_RANGES`.
    resize: key of `images.RESIZES`.
    process_index: this process, 0..process_count-1.
    process_count: processes that share the work.
    start_step: batches of this epoch to leave out at its beginning.

  Returns:
    As `batches`: the last batch is padded and masked.

  Raises:
    UserError: as `batches`, or fewer examples than processes.
  """
  rows = reading.Rows(batch_size, process_index, process_count)
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  if count < process_count:
    raise errors.UserError(
      f"{count} examples in {split} of {task.name!r} are too few for"
      f" {process_count} processes: each needs at least one to train on."
    )
  decode = reading.decoder(task, builder, image_size, value_range, resize)
  order = reading.stored_order(task, builder, split).shuffle(
    _shuffle_buffer(builder, count),
    seed=_shuffle_seed(seed, epoch),
    reshuffle_each_iteration=False,
  )
  steps = range(start_step, -(-count // batch_size))
  order = order.skip(start_step * batch_size)
  return reading.read(task, builder, split, order, decode, rows, steps)


def _shuffle_buffer(builder: Any, count: int) -> int:
  """Examples that fit in `SHUFFLE_BYTES`, by their average size on disk."""
  fitting = SHUFFLE_BYTES // builders.example_bytes(builder)
  return max(1, min(count, fitting))


def _shuffle_seed(seed: int, epoch: int) -> int:
  mixed = np.random.SeedSequence((seed % 2**32, epoch)).generate_state(1)
  return int(mixed[0])
