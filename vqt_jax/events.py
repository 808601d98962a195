"""TensorBoard events from rows of metrics.

Written with TensorBoard's own record writer and messages, which, unlike
`tf.summary`, leave TensorFlow alone.
"""

from collections.abc import Iterable, Mapping
import pathlib
import re
import time
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.summary.writer import record_writer

from vqt_jax import files

# Quantities among a row's entries; the others say which run it is.
PLOTTED = ("loss", "accuracy", "val_loss", "val_accuracy")

# Other programs name their machine where this one has "run".
_OWN = re.compile(r"events\.out\.tfevents\.\d+\.run")


def remove(directory: files.Path) -> None:
  """Removes what `Events` has written there, and nothing else."""
  for phase in files.names(directory):
    for run in files.names(directory / phase):
      folder = directory / phase / run
      for name in filter(_OWN.fullmatch, files.names(folder)):
        (folder / name).unlink()


class Events:
  """A folder per phase and run; a scalar per quantity and epoch."""

  def __init__(self, directory: pathlib.Path):
    """Touches nothing; older events are to be removed before."""
    self._directory = directory
    self._writers: dict[str, record_writer.RecordWriter] = {}

  def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
      values = [
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in row.items()
        if name in PLOTTED and value is not None
      ]
      self._add(row, summary=summary_pb2.Summary(value=values))
    for writer in self._writers.values():
      writer.flush()

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()

  def _add(self, row: Mapping[str, Any], **what: Any) -> None:
    name = _run_name(row)
    if name not in self._writers:
      folder = self._directory / name
      folder.mkdir(parents=True, exist_ok=True)
      file = open(folder / f"events.out.tfevents.{int(time.time())}.run", "wb")
      self._writers[name] = record_writer.RecordWriter(file)
      start = event_pb2.Event(
        wall_time=time.time(), file_version="brain.Event:2"
      )
      self._writers[name].write(start.SerializeToString())
    event = event_pb2.Event(wall_time=time.time(), step=row["epoch"], **what)
    self._writers[name].write(event.SerializeToString())


def _run_name(row: Mapping[str, Any]) -> str:
  keys = [k for k in ("lr", "weight_decay", "seed") if k in row]
  told = " ".join(f"{key}={row[key]:g}" for key in keys)
  return f"{row['phase']}/{row['run']:02d} {told}".strip()
