"""Checkpoints of the training state, with Orbax."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import glob
import os
import re
import sys
import threading
import time
from typing import Any, TypeVar

from etils import epath
from etils import epy
import jax

from vqt_jax import errors
from vqt_jax.runtime import files
from vqt_jax.runtime import processes

# A save that takes longer has failed, on another process.
SAVE_SECONDS = 120

with epy.lazy_imports():  # Slow to import.
  import orbax.checkpoint as ocp

T = TypeVar("T")

# Names in the folder of a save.
_OF_SAVE = {"state", "progress", "_CHECKPOINT_METADATA", "commit_success.txt"}


class _Literal(type(epath.Path("/"))):  # It has no public name.
  """A local path whose own name is not a pattern when its content is globbed.

  `epath.Path` would read brackets in the path of a workdir as a pattern.
  """

  _uri_scheme = None  # A path that begins with /gs is no bucket.

  def glob(self, pattern: str) -> Iterator["_Literal"]:
    for name in glob.iglob(pattern, root_dir=self):
      yield self / name


class Checkpointer:
  """Saves state and progress asynchronously; the last complete save counts.

  A save holds every array of the training state (random keys included) and a
  JSON-able `progress`.

  Every method may raise a `UserError` if files cannot be read or written, also
  those of an earlier save that was still under way.
  """

  def __init__(self, directory: files.PathLike, every_seconds: float):
    self._directory = files.absolute(files.path(directory))
    self._every = every_seconds
    self._last = time.monotonic()
    _mute_late_ends()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
    )
    place = self._directory
    if not files.in_bucket(place):
      place = _Literal(place)
    with self._writing():
      files.make_folder(self._directory)
      self._manager = ocp.CheckpointManager(place, options=options)
    for number in self._manager.all_steps():
      save = self._directory / str(number)
      names = files.list_names(save)
      # Orbax would delete it. (Of ours parts are missing if a process was
      # killed while Orbax deleted it; there are later ones then.)
      if "progress" not in names and not _OF_SAVE.issuperset(names):
        raise errors.UserError(
          f"{save} is not a training checkpoint of vqt_jax. Move it elsewhere,"
          " or choose another --workdir."
        )

  def due(self) -> bool:
    """Return whether it is time for a save, on this process."""
    return time.monotonic() - self._last >= self._every

  def save(self, state: Any, progress: dict[str, Any]) -> None:
    """Start a save of replicated arrays, which may be donated at once."""
    number = (self._manager.latest_step() or 0) + 1
    with self._writing():
      self._manager.save(
        number,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_flatten(_one_replica(state))),
          progress=ocp.args.JsonSave(progress),
        ),
      )
    self._last = time.monotonic()

  def progress(self, parse: Callable[..., T]) -> T | None:
    """Return the progress of the last complete save, or None.

    Args:
      parse: called with what was saved as keyword arguments.
    """
    if self._manager.latest_step() is None:
      return None
    with self._reading():
      return parse(**self._restore(progress=ocp.args.JsonRestore()).progress)

  def restore(self, like: Any) -> Any:
    """Restore the state of the last complete save, placed as `like` is."""
    flat = _flatten(like)
    shape = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding
    )
    args = ocp.args.StandardRestore(jax.tree.map(shape, flat))
    with self._reading():
      return _unflatten(like, self._restore(state=args).state)

  def close(self) -> None:
    """Wait until the last save is complete on disk."""
    try:
      with self._writing():
        self._manager.close()
    finally:  # Threads of a failed save may still raise.
      for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
          _stop_waiting(thread)
          threading.Thread.join(thread)  # Orbax's own `join` raises.

  def _restore(self, **items: Any) -> Any:
    number = self._manager.latest_step()
    return self._manager.restore(number, args=ocp.args.Composite(**items))

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:  # Orbax's layers raise all kinds.
      advice = "Delete that folder to resume from the save before it."
      if files.in_bucket(self._directory):
        advice = files.bucket_advice(e) or advice
      raise errors.UserError(
        f"Cannot read {self._directory / str(self._manager.latest_step())}:"
        f" {files.first_line(e)} {advice}"
      ) from e

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turn file system errors, from all layers of Orbax, into `UserError`."""
    with files.explain_write_errors(self._directory):
      try:
        yield
      except TimeoutError as e:
        if not processes.is_connected():
          raise
        raise errors.UserError(
          "Another process of this run could not save; see its message."
        ) from e
      except Exception as e:
        failure = _failure(e)
        if not failure or files.in_bucket(self._directory):
          raise
        raise failure from e


def _stop_waiting(thread: threading.Thread) -> None:
  """Have a thread of a failed save end that waits for what will not come.

  If one part of a save cannot make its folder, Orbax has those of the others
  wait for it for 5 minutes.
  """
  if signals := getattr(thread, "_receive_signals", None):
    module = sys.modules[type(thread).__module__]
    module.set_signals(signals, operation_id=thread._operation_id)


@functools.cache
def _mute_late_ends() -> None:
  """Hide tracebacks of reads and writes that end after another one failed.

  When one of many fails, Orbax closes the event loop of all; TensorStore then
  prints a traceback for each of the others, at any time until the exit.
  """
  show = sys.unraisablehook

  def show_others(args):
    if str(args.exc_value) != "Event loop is closed":
      show(args)

  sys.unraisablehook = show_others


def _failure(error: BaseException | None) -> OSError | None:
  """Find the `OSError` behind an exception, if there is one."""
  while error:
    if isinstance(error, OSError):
      return error
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
      return OSError(int(code[1]), os.strerror(int(code[1])))
    error = error.__cause__ or error.__context__
  return None


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _one_replica(state: Any) -> Any:
  """Return the first device's replica, if all devices are of this process.

  Of each array Orbax would take a part from each device, by programs that it
  compiles.
  """
  if jax.process_count() > 1:
    return state
  return jax.tree.map(lambda x: x.addressable_data(0), state)


def _flatten(state: Any) -> dict[str, jax.Array]:
  """Return leaves by path; random keys as their data."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (
      jax.random.key_data(leaf) if _is_key(leaf) else leaf
    )
    for path, leaf in leaves
  }


def _unflatten(like: Any, flat: dict[str, jax.Array]) -> Any:
  def pick(path, leaf):
    saved = flat[jax.tree_util.keystr(path, simple=True, separator=".")]
    return jax.random.wrap_key_data(saved) if _is_key(leaf) else saved

  return jax.tree_util.tree_map_with_path(pick, like)
