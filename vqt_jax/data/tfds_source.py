"""Examples of TFDS datasets, read with TensorFlow.

Examples are read in the order in which TFDS stores them (one file at a time, no
shuffling of files), so that `train[:800]` is the same 800 images in the same
order on every machine.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vqt_jax.data import builders
from vqt_jax.data import damage
from vqt_jax.data import preprocess as preprocess_lib
from vqt_jax.data import source
from vqt_jax.data.rows import Batch
from vqt_jax.data.rows import ProcessRows
from vqt_jax.data.task import TfdsTask
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds

# Undecoded examples held for shuffling. Splits up to this size are reshuffled
# as a whole each epoch; of larger ones, a window this large slides over the
# stored order, which is itself a random one.
SHUFFLE_BYTES = 2**30


@source.load_labels.register
def load_labels(task: TfdsTask, split: str) -> np.ndarray:
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  decode = lambda example: {"label": _label(task, example)}
  order = _stored_order(task, builder, split)
  rows = ProcessRows(count, 0, 1)
  batch = next(_batches(task, builder, split, order, decode, rows))
  return batch["label"].astype(np.int32)


@source.read.register
def read(
  task: TfdsTask,
  split: str,
  rows: ProcessRows,
  *,
  start: int,
  shuffle: int | None,
  image_size: preprocess_lib.ImageSize,
  value_range: str,
  resize: str,
) -> Iterator[Batch]:
  builder = builders.open_builder(task)
  count = builders.split_size(builder, task, split)
  decode = _decoder(task, builder, image_size, value_range, resize)
  order = _stored_order(task, builder, split)
  if shuffle is not None:
    order = order.shuffle(
      _shuffle_buffer(builder, count),
      seed=shuffle,
      reshuffle_each_iteration=False,
    )
  return _batches(task, builder, split, order.skip(start), decode, rows)


def _shuffle_buffer(builder: Any, count: int) -> int:
  """Examples that fit in `SHUFFLE_BYTES`, by their average size on disk."""
  fitting = SHUFFLE_BYTES // builders.example_bytes(builder)
  return max(1, min(count, fitting))


def _stored_order(task: TfdsTask, builder: Any, split: str) -> Any:
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
  task: TfdsTask,
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


def _label(task: TfdsTask, example: dict[str, Any]) -> Any:
  return tf.cast(task.label(example), tf.int64)


def _batches(
  task: TfdsTask,
  builder: Any,
  split: str,
  order: Any,
  decode: Any,
  rows: ProcessRows,
) -> Iterator[Batch]:
  """Yield this process's rows of all batches, then empty ones without end.

  Args:
    task: what is read.
    builder: of its dataset.
    split: of the task.
    order: its numbered examples, those of the first batch first.
    decode: from an undecoded example to a row.
    rows: of this process.

  Raises:
    UserError: an image or a record is damaged.
  """
  # They have no Python control flow to convert, which would take a second.
  plain = tf.autograph.experimental.do_not_convert
  mine = order.enumerate().filter(plain(rows.include))
  dataset = (
    mine.map(
      plain(lambda _, numbered: decode(numbered[1])),
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
    while True:
      yield next(iterator, empty)
      done += 1
  except tf.errors.OpError as error:
    failed = mine.skip(done * rows.count).take(rows.count)
    every = _stored_order(task, builder, split)
    raise damage.explain(
      error, task, builder, split, every, failed, decode
    ) from error
