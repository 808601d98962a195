"""One pass over a split: stored examples -> this process's padded batches.

Examples are read in the order in which TFDS stores them (one file at a time, no
shuffling of files), so that `train[:800]` is the same 800 images in the same
order on every machine. Images are decoded only after a process has picked its
rows of each batch.
"""

from collections.abc import Iterator
import dataclasses
import re
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax import files
from vqt_jax.data import images
from vqt_jax.data import prepared
from vqt_jax.data.task import Task
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds

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
  """A split in stored order as a `tf.data.Dataset`, no image decoded."""
  options = tf.data.Options()
  options.deterministic = True
  undecoded = {
      key: tfds.decode.SkipDecoding()
      for key, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Image)
  }
  with quiet():
    return builder.as_dataset(
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


def decoder(
    task: Task,
    builder: Any,
    image_size: images.ImageSize,
    value_range: str,
    resize: str,
) -> Any:
  """The map from an undecoded example to its image and label."""
  image_feature = builder.info.features[task.image_key]
  preprocess = images.make_preprocess(
      image_size, value_range, resize, task.pixel_scale
  )

  def decode(example: dict[str, Any]) -> dict[str, Any]:
    image = image_feature.decode_example(example[task.image_key])
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
    order: Any,
    decode: Any,
    rows: Rows,
    steps: range,
) -> Iterator[Batch]:
  """Yields this process's rows of the batches `steps`, padded and masked."""
  dataset = (
      order.enumerate()
      .filter(rows.mine)
      .map(
          lambda _, example: decode(example),
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
  try:
    iterator = dataset.as_numpy_iterator()
    for _ in steps:
      batch = next(iterator, empty)
      _check_labels(task, batch["label"])
      yield _pad(batch, rows.local)
  except tf.errors.OpError as error:
    advice = (
        "It may be damaged: delete that folder and prepare it again with:"
        f" {prepared.prepare_command(task)}"
    )
    if files.in_bucket(builder.data_path) and _refused(error):
      advice = (
          "See that the network is up, and that you may read the folder; the"
          " same command resumes."
      )
    raise errors.UserError(
        f"Dataset {task.dataset!r} in {builder.data_path} cannot be read"
        f" ({_reason(error)}). {advice}"
    ) from error


def _refused(error: Any) -> bool:
  """Whether the files may be well, and only their bucket says no."""
  return isinstance(
      error,
      (
          tf.errors.AbortedError,
          tf.errors.DeadlineExceededError,
          tf.errors.PermissionDeniedError,
          tf.errors.UnauthenticatedError,
          tf.errors.UnavailableError,
      ),
  )


def _reason(error: Any) -> str:
  """What TensorFlow says without its nodes and operations."""
  line = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message).splitlines()[0]
  return f"{type(error).__name__}: {line.strip()}"


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
