"""From a task's split to numpy: in memory, in batches, or shuffled.

Examples come in the order in which they are stored, so that a split is the same
images in the same order on every machine. Images are decoded only after a
process has picked its rows of each batch.
"""

from collections.abc import Iterator

import numpy as np

from vqt_jax import errors
from vqt_jax.data import preprocess as preprocess_lib
from vqt_jax.data import rows as rows_lib
from vqt_jax.data import source
from vqt_jax.data.rows import Batch
from vqt_jax.data.task import Task

# Examples decoded at a time when a whole split is read.
LOAD_BATCH = 64


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
    value_range: as `scaling.find_scaling` takes it.
    resize: key of `preprocess.RESIZES`.

  Returns:
    {"image": float32 (n, height, width, 3), "label": int32 (n,)}.

  Raises:
    UserError: not prepared, no such split, damaged, or labels out of range.
  """
  count = source.num_examples(task, split)
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
  rows = rows_lib.ProcessRows(batch_size, process_index, process_count)
  found = source.read(
    task,
    split,
    rows,
    start=start,
    shuffle=None,
    image_size=image_size,
    value_range=value_range,
    resize=resize,
  )
  left = source.num_examples(task, split) - start
  return _complete(task, found, rows, -(-left // batch_size))


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

  The order depends on `seed` and `epoch` only (with TFDS also on TensorFlow's
  global seed, which this package never sets): not on the number of processes,
  and an epoch begun at `start_step` continues as if it had not been
  interrupted.

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
  rows = rows_lib.ProcessRows(batch_size, process_index, process_count)
  count = source.num_examples(task, split)
  if count < process_count:
    raise errors.UserError(
      f"{count} examples in {split} of {task.name!r} are too few for"
      f" {process_count} processes: each needs at least one to train on."
    )
  found = source.read(
    task,
    split,
    rows,
    start=start_step * batch_size,
    shuffle=_shuffle_seed(seed, epoch),
    image_size=image_size,
    value_range=value_range,
    resize=resize,
  )
  return _complete(task, found, rows, -(-count // batch_size) - start_step)


def _shuffle_seed(seed: int, epoch: int) -> int:
  mixed = np.random.SeedSequence((seed % 2**32, epoch)).generate_state(1)
  return int(mixed[0])


def _complete(
  task: Task, found: Iterator[Batch], rows: rows_lib.ProcessRows, steps: int
) -> Iterator[Batch]:
  """Yield so many batches, checked, padded and masked."""
  for _, batch in zip(range(steps), found):
    _check_labels(task, batch["label"])
    yield rows_lib.pad(batch, rows.count)


def _check_labels(task: Task, labels: np.ndarray) -> None:
  wrong = labels[(labels < 0) | (labels >= task.num_classes)]
  if len(wrong):
    raise errors.UserError(
      f"Label {wrong[0]} in {task.name!r} is outside its {task.num_classes}"
      f" classes, 0..{task.num_classes - 1}. Check the dataset, or"
      " num_classes and label_key."
    )
