"""Features in a file: written row by row, found again by what they come from.

A file is a NumPy array of n records, {"final": (D,), "tokens": (L, N, D)}, and
behind it, as JSON, all that they were made from: weights, preprocessing, data.
The same is in the file's name as a digest, so other inputs have another file.
Until it is whole it is called `.part`, and an extraction that was interrupted
goes on behind the last whole record.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import random
import time
from typing import Any, BinaryIO

import jax
import numpy as np

from vqt_jax import errors
from vqt_jax.features import store as store_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import locks
from vqt_jax.runtime import processes

FORMAT = 1  # Changes when the same inputs give other numbers or files.


class Damaged(Exception):
  """A file that is not what its name says."""


def folder(given: str) -> pathlib.Path:
  """Where features are kept: `config.store_dir`, or our own place.

  Raises:
    UserError: there is no place of our own.
  """
  if given:
    return files.path(given)
  return files.cache_folder() / "features"


class File:
  """The features of n images, of this process's devices; may not be there."""

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    made_from: dict[str, Any],
    layout: store_lib.Layout,
    count: int,
  ):
    """Touches nothing.

    Args:
      folder: where files of features lie.
      name: for people, part of the file's name.
      made_from: all that decides the numbers in it, json-able.
      layout: of the batches.
      count: images n.
    """
    self._layout, self._count = layout, count
    footer = {
      "format": FORMAT,
      **made_from,
      "images": count,
      "dtype": layout.dtype,
      "tokens": layout.tokens,
      "process": [jax.process_index(), jax.process_count()],
      "columns": layout.columns,
    }
    if layout.window > 1:
      footer["window"] = layout.window
    self._footer = json.dumps(footer, sort_keys=True, indent=1).encode()
    digest = hashlib.sha256(self._footer).hexdigest()[:16]
    self.path = folder / f"{name}-{digest}.npy"
    self._part = self.path.with_name(self.path.name + ".part")

  @property
  def size(self) -> int:
    """Bytes of it that are on the disk, whole or in part."""
    for path in (self.path, self._part):
      with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0

  def open(self) -> store_lib.HostStore | None:
    """The features, mapped from the file; None if there is none.

    Raises:
      Damaged: it is cut off, or another file.
      UserError: it cannot be read.
    """
    try:
      with open(self.path, "rb") as file:
        header = file.read(len(self._header))
        end = len(header) + self._count * self._record.itemsize
        file.seek(end)
        footer = file.read()
      if (header, footer) != (self._header, self._footer):
        raise Damaged("it is cut off, or of other features")
      rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
      return None
    except OSError as e:
      raise errors.UserError(
        f"Cannot read {self.path}: {e.strerror or e}. Make it readable, or"
        " choose another config.store_dir."
      ) from e
    tokens = None
    if self._layout.tokens:
      tokens = rows["tokens"].view(self._layout.dtype)
    return store_lib.HostStore(self._layout, tokens, np.array(rows["final"]))

  def write(
    self,
    stream: Callable[[int], Iterable[store_lib.Part]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
  ) -> None:
    """Extracts what is not there yet; all processes write together.

    Args:
      stream: images to leave out -> the stream of the others, in batches.
      batch_size: images in a batch.
      progress: told how many images are done.

    Raises:
      UserError: it cannot be written; nothing half-written stays then. Or the
        stream's own; what is written is gone on with the next time.
    """
    part = self._part
    with self._locked(part) as file:
      if not processes.any_process(not self.path.exists()):
        part.unlink(missing_ok=True)  # Another run was faster.
        return
      with _writing(part):
        done = self._whole_records(file)
      # In batches, since processes tell each other float32.
      done = batch_size * int(processes.all_reduce_min(done // batch_size))
      with _writing(part):
        self._cut(file, done)
      for rows in stream(done) if done < self._count else ():
        records = self._records(rows, self._count - done)
        with _writing(part):
          file.write(records.data)
        done += len(records)
        progress(done)
      with _writing(part):
        file.write(self._footer)
        file.flush()
        os.fsync(file.fileno())
        part.rename(self.path)

  @contextlib.contextmanager
  def _locked(self, part: pathlib.Path) -> Iterator[BinaryIO]:
    """The unfinished file; one run at a time."""
    while True:
      with processes.raise_on_all(), files.explain_write_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "ab")
      with file:
        # All processes or none: of two runs each might lock what the other
        # waits for.
        while processes.any_process(not locks.try_lock(file)):
          fcntl.flock(file, fcntl.LOCK_UN)
          time.sleep(random.uniform(0.5, 1.5))
        # Whoever had it may have made the whole file of it, or given up.
        if processes.any_process(not locks.is_still_at(file, part)):
          continue
        yield file
        return

  @property
  def _record(self) -> np.dtype:
    """Of one image; NumPy's files know bfloat16 as two bytes."""
    depth, tokens, width = self._layout.row
    fields = [("final", np.float32, (width,))]
    if self._layout.tokens:
      descr = np.lib.format.dtype_to_descr(np.dtype(self._layout.dtype))
      fields.append(("tokens", descr, (depth, tokens, self._layout.columns)))
    return np.dtype(fields)

  @property
  def _header(self) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
      header,
      {
        "descr": np.lib.format.dtype_to_descr(self._record),
        "fortran_order": False,
        "shape": (self._count,),
      },
    )
    return header.getvalue()

  def _whole_records(self, file: BinaryIO) -> int:
    """How many there are; 0 in a file that begins with something else."""
    with open(file.name, "rb") as begun:
      if begun.read(len(self._header)) != self._header:
        return 0
    size = os.fstat(file.fileno()).st_size - len(self._header)
    return min(size // self._record.itemsize, self._count)

  def _cut(self, file: BinaryIO, records: int) -> None:
    """Leaves the header and some records."""
    file.truncate(len(self._header) + records * self._record.itemsize)
    if not records:
      file.truncate(0)
      file.write(self._header)

  def _records(self, part: store_lib.Part, most: int) -> np.ndarray:
    rows = store_lib.rows_of(part, most)
    records = np.empty(len(rows["final"]), self._record)
    for name, values in rows.items():
      records[name] = values.view(self._record[name].base)
    return records


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """What cannot be written on one process is an error on all, and goes away."""
  try:
    with processes.raise_on_all(), files.explain_write_errors(path):
      yield
  except errors.UserError:
    path.unlink(missing_ok=True)
    raise
