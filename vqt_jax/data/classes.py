"""Classes: which ones splits have in common, and how much each weighs."""

from collections.abc import Mapping, Sequence

import numpy as np

from vqt_jax import errors
from vqt_jax.data.task import Task

_MOST_NAMED = 5
_ADVICE = (
  "Choose splits that share their classes: of folders and tables leave them"
  " out, and each class is divided; of TFDS set config.splits, or store a"
  " dataset that is sorted by class again, shuffled."
)


def check_classes(task: Task, labels: Mapping[str, np.ndarray]) -> str | None:
  """Compare the classes of what is trained on with those of val.

  Args:
    task: whose splits they are.
    labels: split -> (n,) int, of the splits whose labels are known.

  Returns:
    A note on classes without an image to train on, or None.

  Raises:
    UserError: all images to train on are of one class.
  """
  for split in ("train", "trainval"):
    known = np.unique(labels.get(split, [0, 1]))
    if len(known) == 1 < task.num_classes:
      raise errors.UserError(
        f"All {len(labels[split])} images of {split} (split"
        f" {task.splits[split]!r}) are of one class, {_listed(task, known)},"
        f" so there is nothing to learn. {_ADVICE}"
      )
  if "val" in labels and "train" in labels:
    new = np.isin(labels["val"], labels["train"], invert=True)
    if count := new.sum():
      lacking = np.unique(labels["val"][new])
      return (
        f"{count} of the {len(new)} images of val are of classes that train"
        f" lacks ({_listed(task, lacking)}), so they count as wrong."
        f" {_ADVICE}"
      )
  everything = np.arange(task.num_classes)
  lacking = np.setdiff1d(everything, labels.get("trainval", everything))
  if not len(lacking):
    return None
  return (
    f"trainval has no image of {len(lacking)} of {task.num_classes} classes:"
    f" {_listed(task, lacking)}."
  )


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Weights of classes, (C,) float32, with which all weigh the same.

  They are 1 on average over the labels, (n,). Classes without any have 0.
  """
  count = np.bincount(labels, minlength=num_classes)
  weights = len(labels) / (np.maximum(count, 1) * np.count_nonzero(count))
  return np.where(count, weights, 0).astype(np.float32)


def _listed(task: Task, classes: Sequence[int]) -> str:
  """Names of some classes, or numbers if the dataset has no names."""
  names = task.class_names
  named = [names[i] if names else str(i) for i in classes[:_MOST_NAMED]]
  left = len(classes) - len(named)
  return ", ".join(named) + (f" and {left} more" if left else "")
