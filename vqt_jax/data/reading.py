"""One pass over a split: stored examples -> this process's padded batches.

Examples are read in the order in which TFDS stores them (one file at a time, no
shuffling of files), so that `train[:800]` is the same 800 images in the same
order on every machine. Images are decoded only after a process has picked its
rows of each batch.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import re
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import preprocess as preprocess_lib
from vqt_jax.data.task import Task
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds
from vqt_jax.runtime import files

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Which rows of the global batches this process reads.

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
  def local(self) -> int:
    """Rows of this process in each batch."""
    return self.batch_size // self.process_count

  def mine(self, position: Any, _: Any) -> Any:
    """Whether the example at this position of the epoch is this process's."""
    return position % self.batch_size // self.local == self.process_index


def stored_order(task: Task, builder: Any, split: str) -> Any:
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


def decoder(
  task: Task,
  builder: Any,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str,
) -> Any:
  """The map from an undecoded example to its image and label."""
  stored = builder.info.features[task.image_key].shape[-1]
  channels = 1 if stored == 1 else 3
  preprocess = preprocess_lib.make_preprocess(
    image_size, value_range, resize, task.pixel_scale
  )

  def decode(example: dict[str, Any]) -> dict[str, Any]:
    image = preprocess_lib.decode(example[task.image_key], channels)
    return {
      "image": preprocess(image),
      "label": label_of(task, example),
    }

  return decode


def label_of(task: Task, example: dict[str, Any]) -> Any:
  return tf.cast(task.label(example), tf.int64)


def read(
  task: Task,
  builder: Any,
  split: str,
  order: Any,
  decode: Any,
  rows: Rows,
  steps: range,
) -> Iterator[Batch]:
  """Yields this process's rows of the batches `steps`, padded and masked.

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
  mine = order.enumerate().filter(rows.mine)
  dataset = (
    mine.map(
      lambda _, numbered: decode(numbered[1]),
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )
    .batch(rows.local)
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
      yield _pad(batch, rows.local)
      done += 1
  except tf.errors.OpError as error:
    failed = mine.skip(done * rows.local).take(rows.local)
    raise errors.UserError(
      _unreachable(task, builder, error)
      or _wrong_image(task, builder, split, failed, decode)
      or _wrong_record(task, builder, split, error)
    ) from error


def _unreachable(task: Task, builder: Any, error: Any) -> str | None:
  """What to say where the files may be well, and only their bucket says no."""
  said_no = (
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
  )
  if not files.in_bucket(builder.data_path) or not isinstance(error, said_no):
    return None
  return (
    f"Dataset {task.dataset!r} in {builder.data_path} cannot be read"
    f" ({type(error).__name__}: {_reason(error)}). See that the network is"
    " up, and that you may read the folder; the same command resumes."
  )


def _wrong_image(
  task: Task, builder: Any, split: str, examples: Any, decode: Any
) -> str | None:
  """Names the first of some examples that cannot be decoded, if there is one.

  Args:
    task: what is read.
    builder: of its dataset.
    split: of the task.
    examples: (position, (number, example)), as a dataset.
    decode: what fails for one of them.
  """
  with contextlib.suppress(tf.errors.OpError):  # Then a record is wrong.
    for _, (number, example) in examples:
      try:
        decode(example)
      except Exception as error:  # Each of the decoders has its own.
        content = example[task.image_key].numpy()
        return (
          "Cannot decode image"
          f" {_where(task, builder, split, int(number), example)}"
          f" ({_reason(error)}; {len(content):,} bytes). "
          + _repair(
            task,
            builder,
            "Replace or remove that image and write the dataset again.",
          )
        )
  return None


def _wrong_record(task: Task, builder: Any, split: str, error: Any) -> str:
  """Names the first record that cannot be read."""
  number = 0
  with contextlib.suppress(tf.errors.OpError):
    for _ in stored_order(task, builder, split):
      number += 1
  advice = "Make it readable."
  if not isinstance(error, tf.errors.PermissionDeniedError):
    advice = _repair(
      task,
      builder,
      "Write the dataset again, or restore its files from a copy.",
    )
  return (
    f"Record {_where(task, builder, split, number)} cannot be read"
    f" ({type(error).__name__}: {_reason(error)}). {advice}"
  )


def _where(
  task: Task, builder: Any, split: str, number: int, example: Any = None
) -> str:
  """Number in the split, and the names of files that lead to an example."""
  found = [f"split {task.splits[split]!r}, counted from 0"]
  for key, value in (example or {}).items():
    is_text = tf.is_tensor(value) and value.dtype == tf.string
    if "file" in key and is_text and value.shape == ():
      found.append(f"{key} {value.numpy().decode(errors='replace')!r}")
  return (
    f"{number} of {split} ({'; '.join(found)}) of dataset {task.dataset!r} in"
    f" {builder.data_path}"
  )


def _repair(task: Task, builder: Any, what: str) -> str:
  return builders.repair_advice(
    task.dataset, task.data_dir, builder.data_path, what
  )


def _reason(error: Exception) -> str:
  """What an exception says, without TensorFlow's nodes and operations."""
  text = error.message if isinstance(error, tf.errors.OpError) else str(error)
  line = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", text).strip().split("\n")[0]
  return line.strip().rstrip(".") or type(error).__name__


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
