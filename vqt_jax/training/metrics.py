"""Metrics of a run: metrics.jsonl and TensorBoard events."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import io
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, BinaryIO

from etils import epy
import PIL.Image

from vqt_jax.runtime import files
from vqt_jax.runtime import mirror
from vqt_jax.runtime.files import PathLike


def metrics_bytes(workdir: files.Path) -> bytes:
  """Read metrics.jsonl; empty if there is none."""
  with contextlib.suppress(FileNotFoundError):
    return files.read(workdir / "metrics.jsonl")
  return b""


with epy.lazy_imports():  # Slow to import.
  from tensorboard.compat.proto import event_pb2
  from tensorboard.compat.proto import summary_pb2
  from tensorboard.plugins.hparams import summary_v2
  from tensorboard.summary.writer import record_writer


class MetricsWriter:
  """Appends epochs to metrics.jsonl and TensorBoard events.

  A row is a flat dict with at least `epoch` (finished epochs, from 1) and `run`
  (index of the trial in its stage). The first call for a stage passes all rows
  up to the resumed checkpoint: later rows in the file, written between that
  checkpoint and a crash, are cut off, as these epochs are trained again.

    writer = MetricsWriter(workdir)
    writer.epochs("seeds", rows_up_to_epoch_40)  # [] at the start of a stage.
    writer.epochs("seeds", rows_of_epoch_41)
  """

  def __init__(self, workdir: PathLike):
    """Read the rows that are there, up to a line that a crash cut off.

    Raises:
      UserError: the file cannot be read.
    """
    self._workdir = files.path(workdir)
    self._mirror = mirror.MirroredFolder(self._workdir, "metrics.jsonl")
    self._path = self._mirror.folder / "metrics.jsonl"
    self._folder = self._mirror.folder / "tensorboard"
    self._rows = read_metrics(workdir)
    self._begun: set[str] = set()
    self._events: Events | None = None

  def epochs(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows of a stage and flush them to disk.

    In a bucket they appear a little later, see `mirror.MirroredFolder`.

    Raises:
      UserError: they cannot be written; earlier rows are kept.
    """
    rows = [files.to_json_types({"phase": phase, **row}) for row in rows]
    if phase not in self._begun:
      self._begun.add(phase)
      rows = self._resume(phase, rows)
    with files.explain_write_errors(self._path), self._open("ab") as file:
      file.write(b"".join(map(files.json_line, rows)))
      file.flush()
      os.fsync(file.fileno())
    self._write_events(rows)
    self._rows += rows

  def outcomes(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add accuracies of finished trials to the events only.

    Raises:
      UserError: they cannot be written.
    """
    self._write_events([{"phase": phase, **row} for row in rows])

  def _write_events(self, rows: Sequence[Mapping[str, Any]]) -> None:
    with files.explain_write_errors(self._folder):
      if self._events is None:
        # Events cannot be cut at an epoch, so all are written again.
        remove(self._workdir / "tensorboard")
        self._events = Events(self._folder)
        self._events.write(self._rows)
      self._events.write(rows)
    self._mirror.sync()

  def close(self) -> None:
    if self._events is not None:
      with files.explain_write_errors(self._folder):
        self._events.close()
    self._mirror.close()

  def _resume(self, phase: str, rows: list[Any]) -> list[Any]:
    """Cut the file behind the last row that fits; return the rows to add."""
    phases = [row["phase"] for row in self._rows]
    start = phases.index(phase) if phase in phases else len(phases)
    same = 0
    for old, new in zip(self._rows[start:], rows):
      if old != new:
        break
      same += 1
    self._rows = self._rows[: start + same]
    if self._path.exists():
      with files.explain_write_errors(self._path), self._open("r+b") as file:
        file.truncate(sum(len(files.json_line(row)) for row in self._rows))
    return rows[same:]

  def _open(self, mode: str) -> BinaryIO:
    return open(self._path, mode, opener=files.refuse_link)


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
  """Read all complete rows of a workdir's metrics.jsonl, in order."""
  rows = []
  for line in metrics_bytes(files.path(workdir)).splitlines(keepends=True):
    try:
      row = json.loads(line)
      if files.json_line(row) != line or not _is_row(row):
        break
    except (ValueError, RecursionError):
      break
    rows.append(row)
  return rows


def _is_row(row: Any) -> bool:
  """Return whether a value of JSON is a row: its phase names a folder."""
  return (
    isinstance(row, dict)
    and files.is_of(row.get("phase"), str)
    and re.fullmatch(r"\w[\w.-]*", row["phase"])
    and all(
      files.is_of(row.get(name), int) and 0 <= row[name] < 2**31
      for name in ("epoch", "run")
    )
    and all(_is_number(row.get(x, 0)) for x in (*_SETTING, "query_dropout"))
    and isinstance(row.get("normalize", True), bool)
    and all(_is_number(row.get(name) or 0) for name in PLOTTED)
  )


def _is_number(value: Any) -> bool:
  return files.is_of(value, float) and not abs(value) > sys.float_info.max


# Quantities to plot; the other entries of a row name the trial.
PLOTTED = ("loss", "accuracy", "val_loss", "val_accuracy", "test_accuracy")

# What names a trial's folder.
_SETTING = ("lr", "weight_decay", "seed")
_HPARAMS = (*_SETTING, "query_dropout", "normalize")

# Other programs have the name of the machine in place of "run".
_OWN = re.compile(r"events\.out\.tfevents\.\d+\.run")


def remove(directory: files.Path) -> None:
  """Remove the files that `Events` has written, and nothing else."""
  for phase in files.list_names(directory):
    for run in files.list_names(directory / phase):
      folder = directory / phase / run
      for name in filter(_OWN.fullmatch, files.list_names(folder)):
        (folder / name).unlink()


def write_picture(workdir: files.Path, picture: files.Path) -> None:
  """Add a PNG file to the TensorBoard events of a finished run."""
  content = files.read(picture)
  width, height = PIL.Image.open(io.BytesIO(content)).size
  image = summary_pb2.Summary.Image(
    encoded_image_string=content, width=width, height=height, colorspace=4
  )
  value = summary_pb2.Summary.Value(tag=picture.stem, image=image)
  event = event_pb2.Event(summary=summary_pb2.Summary(value=[value]))
  records = io.BytesIO()
  writer = record_writer.RecordWriter(records)
  writer.write(
    event_pb2.Event(file_version="brain.Event:2").SerializeToString()
  )
  writer.write(event.SerializeToString())
  name = f"tensorboard/{picture.stem}/picture/events.out.tfevents.0.run"
  files.write(workdir / name, records.getvalue())


class Events:
  """TensorBoard events: a folder per stage and trial.

  In each are the hyperparameters, and a scalar per quantity.
  """

  def __init__(self, directory: pathlib.Path):
    """Write nothing yet; older events are to be removed before."""
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
    with contextlib.ExitStack() as closing:  # All, if one of them fails.
      for writer in self._writers.values():
        closing.callback(writer.close)

  def _add(self, row: Mapping[str, Any], **what: Any) -> None:
    name = _run_name(row)
    if name not in self._writers:
      folder = files.below(self._directory, name)
      folder.mkdir(parents=True, exist_ok=True)
      path = folder / f"events.out.tfevents.{int(time.time())}.run"
      file = open(path, "wb", opener=files.refuse_link)
      self._writers[name] = record_writer.RecordWriter(file)
      start = event_pb2.Event(
        wall_time=time.time(), file_version="brain.Event:2"
      )
      self._writers[name].write(start.SerializeToString())
      setting = {k: row[k] for k in _HPARAMS if k in row}
      told = summary_v2.hparams_pb({"phase": row["phase"], **setting}, name)
      self._add({**row, "epoch": 0}, summary=told)
    event = event_pb2.Event(wall_time=time.time(), step=row["epoch"], **what)
    self._writers[name].write(event.SerializeToString())


def _run_name(row: Mapping[str, Any]) -> str:
  keys = [k for k in _SETTING if k in row]
  told = " ".join(f"{key}={row[key]:g}" for key in keys)
  return f"{row['phase']}/{row['run']:02d} {told}".strip()
