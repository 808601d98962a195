"""Explanations of examples that cannot be read."""

import contextlib
import re
from typing import Any

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data.task import TfdsTask
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.runtime import files

# Kinds of `tf.errors` that a bucket causes while its files are in order.
_BUCKET_ERRORS = (
  "AbortedError DeadlineExceededError PermissionDeniedError"
  " UnauthenticatedError UnavailableError"
).split()


def explain(
  error: Any,
  task: TfdsTask,
  builder: Any,
  split: str,
  order: Any,
  examples: Any,
  decode: Any,
) -> errors.UserError:
  """Make the error for a `tf.errors.OpError`, naming the example if possible.

  Args:
    error: what TensorFlow raised.
    task: what was read.
    builder: of its dataset.
    split: of the task.
    order: all examples of the split, undecoded, in stored order.
    examples: those that failed, (position, (number in the split, example)).
    decode: the map that they went through.
  """
  place, kind = builder.data_path, type(error).__name__
  if files.in_bucket(place) and kind in _BUCKET_ERRORS:
    return errors.UserError(
      f"Dataset {task.dataset!r} in {place} cannot be read"
      f" ({kind}: {_reason(error)}). See that the network is up, and that you"
      " may read the folder; the same command resumes."
    )
  repair = lambda otherwise: builders.repair_advice(
    task.dataset, task.data_dir, place, otherwise
  )
  where = lambda number, *names: (
    f"{number} of {split} ("
    + "; ".join([f"split {task.splits[split]!r}, counted from 0", *names])
    + f") of dataset {task.dataset!r} in {place}"
  )
  with contextlib.suppress(tf.errors.OpError):  # Then a record is damaged.
    for _, (number, example) in examples:
      try:
        decode(example)
      except Exception as e:  # Each of the decoders has its own.
        content = example[task.image_key].numpy()
        advice = repair(
          "Replace or remove that image and write the dataset again."
        )
        return errors.UserError(
          f"Cannot decode image {where(int(number), *_file_names(example))}"
          f" ({_reason(e)}; {len(content):,} bytes). {advice}"
        )
  number = 0
  with contextlib.suppress(tf.errors.OpError):
    for _ in order:
      number += 1
  advice = "Make it readable."
  if not isinstance(error, tf.errors.PermissionDeniedError):
    advice = repair(
      "Write the dataset again, or restore its files from a copy."
    )
  return errors.UserError(
    f"Record {where(number)} cannot be read ({kind}: {_reason(error)})."
    f" {advice}"
  )


def _file_names(example: dict[str, Any]) -> list[str]:
  """Features of an example that hold the name of its file, as text."""
  return [
    f"{key} {value.numpy().decode(errors='replace')!r}"
    for key, value in example.items()
    if "file" in key
    and tf.is_tensor(value)
    and (value.dtype, value.shape) == (tf.string, ())
  ]


def _reason(error: Exception) -> str:
  """Text of an exception, without TensorFlow's nodes and operations."""
  text = error.message if isinstance(error, tf.errors.OpError) else str(error)
  line = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", text).strip().split("\n")[0]
  return line.strip().rstrip(".") or type(error).__name__
