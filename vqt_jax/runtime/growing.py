"""Files that grow during a run, also where objects cannot."""

from concurrent import futures
import contextlib
import pathlib
import shutil
import tempfile
import time

from vqt_jax.runtime import files

COPY_SECONDS = 60  # Between copies of what grows into a bucket.
_COPIES_AT_ONCE = 16


class Growing:
  """A folder of files that grow, as objects in a bucket cannot.

  It is the place itself, or, if that is in a bucket, a temporary folder from
  which files are copied there now and then.
  """

  def __init__(self, place: files.Path, *names: str):
    """Begins with those of the named files that are there.

    Raises:
      UserError: one of them cannot be read.
    """
    self._place, self._last = place, time.monotonic()
    self.folder = place
    if files.in_bucket(place):
      self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vqt_jax_"))
      for name in names:
        with contextlib.suppress(FileNotFoundError):
          (self.folder / name).write_bytes(files.read(place / name))
      self._copied = self._states()

  def copy(self, after: float = COPY_SECONDS) -> None:
    """Copies what has changed, if the last time was long enough ago.

    Raises:
      UserError: it cannot be written.
    """
    if (
      not files.in_bucket(self._place) or time.monotonic() < self._last + after
    ):
      return
    states = self._states()
    changed = [f for f, state in states.items() if self._copied.get(f) != state]
    with futures.ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
      for _ in pool.map(self._copy, changed):
        pass
    self._copied, self._last = states, time.monotonic()

  def close(self) -> None:
    """Copies the rest; if that fails the temporary folder stays.

    Raises:
      UserError: it fails.
    """
    self.copy(after=0)
    if files.in_bucket(self._place):
      shutil.rmtree(self.folder)
      self.folder = self._place

  def _copy(self, file: pathlib.Path) -> None:
    files.write(self._place / file.relative_to(self.folder), file.read_bytes())

  def _states(self) -> dict[pathlib.Path, tuple[int, int]]:
    """Something of every file that changes when it does."""
    found = [(f, f.stat()) for f in self.folder.rglob("*") if f.is_file()]
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in found}
