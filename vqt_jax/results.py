"""What a run leaves in its workdir, written so that a crash leaves it whole.

  config.json     the resolved config, written first
  metrics.jsonl   a line per epoch and run
  tensorboard/    the same as TensorBoard events
  results.json    what came out
  tuned/          what was trained: variables.safetensors and info.json

While a run lasts there is also `.vqt_jax.lock`, see `files.alone_in`.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from vqt_jax import config as config_lib
from vqt_jax import errors
from vqt_jax import events as events_lib
from vqt_jax import files
from vqt_jax.files import PathLike

# What the config of every run has, and other programs' do not have together.
_OF_CONFIGS = {"task", "init", "method", "lr", "seeds", "batch_size"}
# What a run replaces, or takes for its own, in a workdir.
_CLAIMED = {
  "metrics.jsonl",
  "results.json",
  "report.png",
  "checkpoints",
  "stages",
  "tuned",
}
_ROW = b'{"phase": '  # How metrics.jsonl begins.


def write_json(path: PathLike, value: Any) -> None:
  """Writes a file of JSON at once, as `files.write`.

  Arrays become lists, and numbers that are not finite, which JSON lacks, null.

  Raises:
    UserError: it cannot be written; an old file is left as it was.
  """
  files.write(files.path(path), _json(value))


def read_json(path: PathLike) -> Any:
  """Reads a file of JSON.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    content = files.read(files.path(path))
  except FileNotFoundError:
    raise errors.UserError(f"There is no {path}.") from None
  try:
    return json.loads(content)
  except ValueError as e:
    raise errors.UserError(f"Cannot read {path}: {e}: it is damaged.") from e


@contextlib.contextmanager
def open_workdir(config: Any, workdir: PathLike) -> Iterator[bool]:
  """Makes a workdir, or recognises it as this config's own, for this run alone.

  One in which nothing has been trained yet is taken over by the new config, so
  that a setting can be mended after a first start that failed.

  Args:
    config: as `config.resolve` returns it.
    workdir: folder, created if it is missing, or `gs://` address.

  Yields:
    Whether a run of this config was begun there before.

  Raises:
    UserError: it cannot be written, holds a run of another config or things of
      another program, or another process is running there. Nothing in it is
      touched then.
  """
  workdir = files.path(workdir)
  now = config_lib.to_json(config)
  _config_of(workdir)  # Somebody else's does not even get a lock.
  with files.alone_in(workdir):
    old, begun = _config_of(workdir), _begun(workdir)
    if begun:
      _check_same_run(old, now, workdir)
    else:
      write_json(workdir / "config.json", now)
    yield begun


def _config_of(workdir: files.Path) -> dict[str, Any] | None:
  """The config that a workdir was opened with; None: it is new.

  Raises:
    UserError: it is not one of this program's.
  """
  path = workdir / "config.json"
  other = "So no run can begin or be resumed there: choose another --workdir."
  if files.exists(path):
    try:
      config = read_json(path)
    except errors.UserError as e:
      raise errors.UserError(f"{e} {other}") from e
    if not isinstance(config, dict) or not _OF_CONFIGS <= config.keys():
      raise errors.UserError(f"{path} is no config of this program. {other}")
    if not _ROW.startswith(_metrics(workdir)[: len(_ROW)]):
      raise errors.UserError(
        f"{workdir / 'metrics.jsonl'} is not of this program. {other}"
      )
    return config
  for name in sorted(_CLAIMED.intersection(files.names(workdir))):
    place = workdir / name
    if files.names(place) or place.is_file():
      raise errors.UserError(
        f"{place} is there, but no config.json of the run it is of. {other}"
      )
  return None


def _begun(workdir: files.Path) -> bool:
  """Whether anything was trained there, or in a folder of one of its tasks."""
  if not files.exists(workdir / "config.json"):
    return False
  return bool(
    files.exists(workdir / "results.json")
    or _metrics(workdir)
    or files.names(workdir / "checkpoints")
    or any(_begun(workdir / name) for name in files.names(workdir))
  )


def _metrics(workdir: files.Path) -> bytes:
  """Contents of metrics.jsonl; nothing if there is none."""
  with contextlib.suppress(FileNotFoundError):
    return files.read(workdir / "metrics.jsonl")
  return b""


def _check_same_run(
  old: dict[str, Any], now: dict[str, Any], workdir: files.Path
) -> None:
  # A field that was not there yet has done what its default does.
  old = config_lib.to_json(config_lib.default_config()) | old
  changed = [
    f"{name} was {before!r}, is now {after!r}"
    for name, (before, after) in config_lib.differences(old, now).items()
    if name not in config_lib.RESUMABLE and config_lib.uses(now["method"], name)
  ]
  if changed:
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise errors.UserError(
      f"{workdir} holds a run of another config: {'; '.join(changed[:3])}"
      f"{more}. Choose another --workdir, or give the old values to resume."
    )


class MetricsWriter:
  """Appends epochs to metrics.jsonl and TensorBoard events.

  A row is a flat dict with at least `epoch` (number of finished epochs, from 1)
  and `run` (its index in the phase). The first call for a phase brings all rows
  that the resumed state knows of: what the file holds beyond them was written
  between that state and the crash, will be done again, and is cut off.

    writer = MetricsWriter(workdir)
    writer.epochs("seeds", rows_up_to_epoch_40)  # [] at the start of a phase.
    writer.epochs("seeds", rows_of_epoch_41)
  """

  def __init__(self, workdir: PathLike):
    """Reads what is there; of a line cut off by a crash nothing counts.

    Raises:
      UserError: it cannot be read.
    """
    self._workdir = files.path(workdir)
    self._growing = files.Growing(self._workdir, "metrics.jsonl")
    self._path = self._growing.folder / "metrics.jsonl"
    self._folder = self._growing.folder / "tensorboard"
    self._rows = read_metrics(workdir)
    self._begun: set[str] = set()
    self._events: events_lib.Events | None = None

  def epochs(self, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows of a phase and sees that they are on disk.

    In a bucket they are a little later, see `files.Growing`.

    Raises:
      UserError: there is no room; what was written before stays.
    """
    rows = [_plain({"phase": phase, **row}) for row in rows]
    if phase not in self._begun:
      self._begun.add(phase)
      rows = self._resume(phase, rows)
    with files.writing(self._path), open(self._path, "ab") as file:
      file.write(b"".join(map(_line, rows)))
      file.flush()
      os.fsync(file.fileno())
    self._rows += rows
    with files.writing(self._folder):
      if self._events is None:
        # Events cannot be cut at an epoch, but made again from what stayed.
        events_lib.remove(self._workdir / "tensorboard")
        self._events = events_lib.Events(self._folder)
        rows = self._rows
      self._events.write(rows)
    self._growing.copy()

  def close(self) -> None:
    if self._events is not None:
      with files.writing(self._folder):
        self._events.close()
    self._growing.close()

  def _resume(self, phase: str, rows: list[Any]) -> list[Any]:
    """Cuts the file behind the last row that is right; returns the missing."""
    phases = [row["phase"] for row in self._rows]
    start = phases.index(phase) if phase in phases else len(phases)
    same = 0
    for old, new in zip(self._rows[start:], rows):
      if old != new:
        break
      same += 1
    self._rows = self._rows[: start + same]
    if self._path.exists():
      with files.writing(self._path):
        os.truncate(self._path, sum(len(_line(row)) for row in self._rows))
    return rows[same:]


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
  """All whole rows of a workdir's metrics.jsonl, in the order of writing."""
  rows = []
  for line in _metrics(files.path(workdir)).splitlines(keepends=True):
    try:
      row = json.loads(line)
      if _line(row) != line or "phase" not in row:
        break
    except ValueError:
      break
    rows.append(row)
  return rows


def save_tuned(
  directory: PathLike, variables: Mapping[str, Any], info: Mapping[str, Any]
) -> int:
  """Writes what was trained, as a folder that appears at once.

  Args:
    directory: the folder; an older one of this kind is replaced.
    variables: nested dict of arrays.
    info: what one must know to use them; JSON-able.

  Returns:
    Bytes of its files.

  Raises:
    UserError: it cannot be written, or holds other files.
  """
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  arrays = {k: np.ascontiguousarray(v) for k, v in flat.items()}
  contents = {
    "variables.safetensors": safetensors.numpy.save(arrays),
    "info.json": _json(info),
  }
  files.write_folder(files.path(directory), contents)
  return sum(map(len, contents.values()))


def load_tuned(directory: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads what `save_tuned` wrote: (variables, info).

  Raises:
    UserError: it is missing or damaged.
  """
  directory = files.path(directory)
  info = read_json(directory / "info.json")
  path = directory / "variables.safetensors"
  try:
    flat = safetensors.numpy.load(files.read(path))
  except (OSError, safetensors.SafetensorError) as e:
    raise errors.UserError(f"Cannot read {path}: {e}.") from e
  return flax.traverse_util.unflatten_dict(flat, sep="/"), info


def _json(value: Any) -> bytes:
  text = json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
  return text.encode()


def _line(row: Mapping[str, Any]) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
  """The same with nothing but what JSON knows."""
  match value:
    case dict():
      return {str(k): _plain(v) for k, v in value.items()}
    case list() | tuple():
      return [_plain(v) for v in value]
    case bool() | int() | str() | None:
      return value
    case float():
      return value if math.isfinite(value) else None
    case os.PathLike():
      return os.fspath(value)
  array = np.asarray(value)
  if array.ndim:
    return [_plain(v) for v in array]
  if array.dtype == np.float32:  # As short as float32 can be told apart.
    return _plain(float(str(array)))
  return _plain(array.item())
