"""Files that grow during a run, also in buckets, where objects cannot.

What cannot be read or written is a `UserError`.
"""

from concurrent import futures
import contextlib
import pathlib
import tempfile
import time

from vqt_jax.runtime import files

SYNC_SECONDS = 60
_UPLOADS_AT_ONCE = 16


class MirroredFolder:
  """A folder of growing files, which is copied to a bucket now and then.

  Attributes:
    folder: where the files are: the place itself, or a temporary folder if that
      is in a bucket.
  """

  def __init__(self, place: files.Path, *names: str):
    """Fetch those of the named files that exist."""
    self._place, self._last = place, time.monotonic()
    self.folder = place
    if files.in_bucket(place):
      with files.explain_temporary_errors():
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vqt_jax_"))
      for name in names:
        with contextlib.suppress(FileNotFoundError):
          content = files.read(place / name)
          with files.explain_temporary_errors():
            (self.folder / name).write_bytes(content)
      self._copied = self._states()

  def sync(self, after: float = SYNC_SECONDS) -> None:
    """Copy changed files to the bucket, `after` seconds after the last time."""
    if (
      not files.in_bucket(self._place) or time.monotonic() < self._last + after
    ):
      return
    states = self._states()
    changed = [f for f, state in states.items() if self._copied.get(f) != state]
    with futures.ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
      list(pool.map(self._copy, changed))  # Raises what they raised.
    self._copied, self._last = states, time.monotonic()

  def close(self) -> None:
    """Copy what is left; if that fails the temporary folder stays."""
    self.sync(after=0)
    if files.in_bucket(self._place):
      files.remove_folder(self.folder)
      self.folder = self._place

  def _copy(self, file: pathlib.Path) -> None:
    files.write(self._place / file.relative_to(self.folder), file.read_bytes())

  def _states(self) -> dict[pathlib.Path, tuple[int, int]]:
    """Size and time of change of every file."""
    found = [(f, f.stat()) for f in self.folder.rglob("*") if f.is_file()]
    return {file: (stat.st_size, stat.st_mtime_ns) for file, stat in found}
