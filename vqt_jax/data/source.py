"""The interface of a source of examples: functions of a task, by its kind.

A source is a file with a kind of task and an implementation of each function
here (`num_examples.register` etc.). `tfds_source.py` is for datasets of TFDS,
`image_files.py` for folders and tables; functions with a body here need not be
implemented. Everything else in the package works with any of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import numpy as np

from vqt_jax.data.preprocess import ImageSize
from vqt_jax.data.rows import Batch
from vqt_jax.data.rows import ProcessRows
from vqt_jax.data.task import Task


@functools.singledispatch
def check_prepared(task: Task) -> None:
  """Check that the splits of a task are there, without reading them.

  Raises:
    UserError: the dataset is not there, or lacks a split or examples in it.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def num_examples(task: Task, split: str) -> int:
  """Examples in one of the task's splits; raises as `check_prepared`."""
  raise NotImplementedError(type(task))


@functools.singledispatch
def num_bytes(task: Task, split: str) -> int:
  """Approximate size of a split on disk; raises as `check_prepared`."""
  raise NotImplementedError(type(task))


@functools.singledispatch
def is_concatenation(task: Task, parts: tuple[str, ...], whole: str) -> bool:
  """Return whether a split has the rows of others, one after another."""
  raise NotImplementedError(type(task))


@functools.singledispatch
def images_fingerprint(task: Task, split: str) -> dict[str, Any]:
  """Describe what determines the images of a split: files, and rows of them.

  Files are known by name, size and time of change; labels play no part.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def dataset_identity(task: Task) -> dict[str, Any]:
  """Describe a task's dataset, wherever its copy is.

  Returns:
    `dataset` (its full name), `image_key`, `num_classes`, `splits` (of each its
    `slices` and its number of `images`), and `sha256`, of the sizes of all that
    the dataset holds.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def load_labels(task: Task, split: str) -> np.ndarray:
  """Load the labels of a split, (n,) int32, in stored order.

  Decodes no image. Raises as `pipeline.load_arrays`.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def read(
  task: Task,
  split: str,
  rows: ProcessRows,
  *,
  start: int,
  shuffle: int | None,
  image_size: ImageSize,
  value_range: str,
  resize: str,
) -> Iterator[Batch]:
  """Iterate once over a process's rows of the batches of a split.

  Args:
    task: what to read.
    split: "train", "val", "trainval" or "test".
    rows: of this process.
    start: examples of the order to skip, before the first batch.
    shuffle: seed of a random order, the same on every process; None: stored
      order.
    image_size, value_range, resize: as in `pipeline.load_arrays`.

  Returns:
    Iterator over {"image": float32 (rows, height, width, 3), "label": (rows,)},
    with fewer rows, or none, in the last batch of an epoch.

  Raises:
    UserError: as `check_prepared`, or an image is damaged.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def pick(task: Task, split: str, positions: Sequence[int]) -> Task:
  """Return the task with only some examples of a split, without reading any.

  Args:
    task: whose examples.
    split: "train", "val" or "test".
    positions: of the examples in stored order, from 0; theirs is the new order.
  """
  raise NotImplementedError(type(task))


@functools.singledispatch
def example_names(task: Task, split: str) -> list[str]:
  """Names of a split's examples in stored order: numbers, if they have none."""
  return [str(number) for number in range(num_examples(task, split))]


@functools.singledispatch
def expected_examples(task: Task, split: str) -> int:
  """Return `num_examples`, without reading where a table knows the sizes."""
  return num_examples(task, split)


@functools.singledispatch
def notes(task: Task) -> list[str]:
  """Sentences on what a user should know before training."""
  return []


@functools.singledispatch
def find_faults(
  task: Task, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
  """Find images that cannot be used, where that is quickly done.

  Args:
    task: whose images.
    progress: called with the numbers of images that are done, and of all.

  Returns:
    Name -> reason.
  """
  return {}


@functools.singledispatch
def leave_out(task: Task, faults: Mapping[str, str]) -> Task:
  """Return the task without the images that `find_faults` found.

  Raises:
    UserError: a split would be empty.
  """
  return task
