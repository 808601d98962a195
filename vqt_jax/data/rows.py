"""Rows of batches, as several processes share them."""

import dataclasses
from typing import Any

import numpy as np

from vqt_jax import errors

Batch = dict[str, np.ndarray]


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

  def include(self, position: Any, _: Any = None) -> Any:
    """Return whether the example at a position of the epoch is among them."""
    return position % self.batch_size // self.count == self.process_index


def pad(batch: Batch, rows: int) -> Batch:
  """Fill up a batch of {"image", "label"} with zeros, and add its "mask"."""
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
