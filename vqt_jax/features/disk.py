"""Features in a file, written image by image and found by their inputs.

A file is a NumPy array of n records, {"final": (D,), "tokens": (L, N, D)} (of
several processes each has a file of its part of the tokens),
followed by as many records of checksums, and by JSON of all inputs that they
depend on: weights, preprocessing, data. A digest of that JSON is part of the
file's name, so other inputs have another file. Older files lack the checksums.

Until a file is complete it is called `.part`, and an interrupted extraction
continues after the last complete record.
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

FORMAT = 1  # Increases when the same inputs give other numbers or files.


class DamagedFile(Exception):
  """A file whose content does not match its name."""


def folder(store_dir: str) -> pathlib.Path:
  """Return the folder of feature files: `store_dir`, or one in the cache.

  Raises:
    UserError: there is no cache folder.
  """
  if store_dir:
    return files.path(store_dir)
  return files.cache_folder() / "features"


class FeatureFile:
  """A file of features for this process's devices, which need not exist."""

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    inputs: dict[str, Any],
    layout: store_lib.Layout,
    count: int,
  ):
    """Compute the file's name, without touching the file system.

    Args:
      folder: of feature files.
      name: readable part of the file's name.
      inputs: all that the numbers depend on, JSON-able.
      layout: of the features.
      count: number of images n.
    """
    self._layout, self._count = layout, count
    footer = {
      "format": FORMAT,
      **inputs,
      "images": count,
      "dtype": layout.dtype,
      "tokens": layout.tokens,
      "process": [jax.process_index(), jax.process_count()],
      "columns": layout.host_row[-1],
    }
    if layout.window > 1:
      footer["window"] = layout.window
    self._footer = json.dumps(footer, sort_keys=True, indent=1).encode()
    digest = hashlib.sha256(self._footer).hexdigest()[:16]
    self.path = folder / f"{name}-{digest}.npy"
    self._part = self.path.with_name(self.path.name + ".part")

  @property
  def size(self) -> int:
    """Bytes of it that are on the disk; 0 if there is no such file."""
    for path in (self.path, self._part):
      with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0

  def open(self) -> store_lib.HostStore | None:
    """Map the features from the file; return None if it does not exist.

    Raises:
      DamagedFile: it is truncated, or another file, or bits have changed; those
        of tokens are found when they are sent.
      UserError: it cannot be read.
    """
    files.check_regular(self.path)
    try:
      with open(self.path, "rb") as file:
        header = file.read(len(self._header))
        end = len(header) + self._count * self._record.itemsize
        file.seek(end)
        size = self._count * self._sums.itemsize
        tail = file.read(size + len(self._footer) + 1)
      sums = tail.removesuffix(self._footer)
      complete = header == self._header and tail.endswith(self._footer)
      if not complete or len(sums) not in (0, size):
        raise DamagedFile("it is truncated, or of other features")
      rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
      return None
    except OSError as e:
      raise errors.UserError(
        f"Cannot read {self.path}: {e.strerror or e}. Make it readable, or"
        " choose another config.store_dir."
      ) from e
    final, tokens, of_tokens = np.array(rows["final"]), None, None
    sums = np.frombuffer(sums, self._sums)
    if len(sums) and (_checksums(final) != sums["final"]).any():
      raise DamagedFile("its checksums are not those of its content")
    if self._layout.tokens:
      tokens = rows["tokens"].view(self._layout.dtype)
      of_tokens = sums["tokens"] if len(sums) else None
    return store_lib.HostStore(
      self._layout, tokens, final, of_tokens, str(self.path)
    )

  def write(
    self,
    extract: Callable[[int], Iterable[store_lib.FeatureBatch]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
  ) -> None:
    """Extract and write the features that are missing.

    All processes must call it together.

    Args:
      extract: number of images to skip -> features of the others, in batches.
      batch_size: images in a batch.
      progress: called with the number of images that are done.

    Raises:
      UserError: the file cannot be written, and is removed. Or an error of
        `extract`; what is written then is used the next time.
    """
    part = self._part
    with self._locked(part) as file:
      if not processes.any_process(not self.path.exists()):
        with contextlib.suppress(OSError):  # Another run has finished it.
          part.unlink()
        return
      with _writing(part):
        done = self._complete_records(file)
      # Counted in batches, as processes exchange numbers in float32.
      done = batch_size * int(processes.all_reduce_min(done // batch_size))
      with _writing(part):
        self._truncate(file, done)
        sums = self._sums_of_part(done)
      for batch in extract(done) if done < self._count else ():
        records = self._records(batch, self._count - done)
        with _writing(part):
          file.write(records.data)
        sums.append(self._sums_of(records))
        done += len(records)
        progress(done)
      with _writing(part):
        file.write(b"".join(map(bytes, sums)))
        file.write(self._footer)
        file.flush()
        os.fsync(file.fileno())
        part.rename(self.path)

  @contextlib.contextmanager
  def _locked(self, part: pathlib.Path) -> Iterator[BinaryIO]:
    """Open the unfinished file, for one run at a time."""
    while True:
      with processes.raise_on_all(), files.explain_write_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "ab", opener=files.refuse_link)
      # Closing it may fail as well.
      with files.explain_write_errors(part), file:
        # All processes or none: two runs might each hold a lock that the other
        # waits for.
        while processes.any_process(not locks.try_lock(file)):
          fcntl.flock(file, fcntl.LOCK_UN)
          time.sleep(random.uniform(0.5, 1.5))
        # The run that held it may have finished the file, or removed it.
        if processes.any_process(not locks.is_still_at(file, part)):
          continue
        yield file
        return

  @property
  def _record(self) -> np.dtype:
    """Dtype of an image's record; NumPy files store bfloat16 as two bytes."""
    fields = [("final", np.float32, self._layout.row[-1:])]
    if self._layout.tokens:
      descr = np.lib.format.dtype_to_descr(np.dtype(self._layout.dtype))
      fields.append(("tokens", descr, self._layout.host_row))
    return np.dtype(fields)

  @property
  def _sums(self) -> np.dtype:
    """Dtype of the checksums of an image's record."""
    return np.dtype([(name, "<u4") for name in self._record.names])

  def _sums_of(self, records: np.ndarray) -> np.ndarray:
    sums = np.empty(len(records), self._sums)
    for name in sums.dtype.names:
      sums[name] = _checksums(records[name])
    return sums

  def _sums_of_part(self, count: int) -> list[np.ndarray]:
    """Checksums of the first records of an unfinished file."""
    if not count:
      return []
    start = len(self._header)
    records = np.memmap(self._part, self._record, "r", start, (count,))
    return [self._sums_of(records)]

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

  def _complete_records(self, file: BinaryIO) -> int:
    """Number of complete records; 0 if the file has another header."""
    with open(file.name, "rb") as reader:
      if reader.read(len(self._header)) != self._header:
        return 0
    size = os.fstat(file.fileno()).st_size - len(self._header)
    return min(size // self._record.itemsize, self._count)

  def _truncate(self, file: BinaryIO, records: int) -> None:
    """Leave the header and a number of records in the file."""
    file.truncate(len(self._header) + records * self._record.itemsize)
    if not records:
      file.truncate(0)
      file.write(self._header)

  def _records(self, batch: store_lib.FeatureBatch, most: int) -> np.ndarray:
    rows = store_lib.host_rows(self._layout, batch, most)
    records = np.empty(len(rows["final"]), self._record)
    for name, values in rows.items():
      records[name] = values.view(self._record[name].base)
    return records


def _checksums(rows: np.ndarray) -> np.ndarray:
  return np.array([store_lib.checksum(row) for row in rows], np.uint32)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """If a process cannot write, remove its file and raise on all processes."""
  try:
    with processes.raise_on_all(), files.explain_write_errors(path):
      yield
  except errors.UserError:
    with contextlib.suppress(OSError):
      path.unlink()
    raise
