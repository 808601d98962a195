"""The workdir of a run, written so that a crash leaves it consistent.

  config.json     the resolved config, written first
  metrics.jsonl   a line per epoch and trial
  tensorboard/    the same as TensorBoard events
  results.json    the results, written when all else is there
  tuned/          what was trained, see `tuned.bundle`
  test_predictions.safetensors
                  labels and predicted classes of the test images
  report.html     a page of the results
  report.png      a picture of them

While a run lasts there is also `.vqt_jax.lock`, see `locks.lock_folder`.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.models import methods
from vqt_jax.runtime import files
from vqt_jax.runtime import locks
from vqt_jax.runtime.files import PathLike
from vqt_jax.training import metrics
from vqt_jax.training import stage

# Fields of every config; no other program has all of them.
_OF_CONFIGS = {"task", "init", "method", "lr", "seeds", "batch_size"}
# Names in a workdir that a run writes.
_CLAIMED = {
  "metrics.jsonl",
  "results.json",
  "report.html",
  "report.png",
  "checkpoints",
  "stages",
  "test_predictions.safetensors",
  "tuned",
}
_ROW = b'{"phase": '  # Start of metrics.jsonl.


@contextlib.contextmanager
def open_workdir(config: Any, workdir: PathLike) -> Iterator[bool]:
  """Create or reopen the workdir of a config, and lock it for this run.

  A workdir in which nothing was trained yet takes the new config, so that a
  mistake can be corrected after a first start that failed.

  Args:
    config: resolved.
    workdir: folder, created if it is missing, or `gs://` address.

  Yields:
    Whether a run of this config was begun there before.

  Raises:
    UserError: it cannot be written, holds a run of another config or files of
      another program, or another process is running there. Nothing in it is
      touched then.
  """
  workdir = files.path(workdir)
  now = config_dict.to_json(config)
  now["init"] = checkpoints.without_secrets(now["init"])
  _config_of(workdir)  # Not even a lock in the folder of another program.
  with locks.lock_folder(workdir):
    old, begun = _config_of(workdir), _begun(workdir)
    if begun:
      shown = old
      if isinstance(old["init"], str):  # Earlier versions stored all of it.
        shown = {**old, "init": checkpoints.without_secrets(old["init"])}
      _check_same_run(shown, now, workdir)
      if shown != old:
        files.write_json(workdir / "config.json", shown)
    else:
      files.write_json(workdir / "config.json", now)
    yield begun


def _config_of(workdir: files.Path) -> dict[str, Any] | None:
  """Read the config of a workdir; None: it is new.

  Raises:
    UserError: the workdir is not one of this program.
  """
  path = workdir / "config.json"
  other = "So no run can begin or be resumed there: choose another --workdir."
  if files.exists(path):
    try:
      config = files.read_json(path)
    except errors.UserError as e:
      raise errors.UserError(f"{e} {other}") from e
    if not isinstance(config, dict) or not _OF_CONFIGS <= config.keys():
      raise errors.UserError(f"{path} was not written by vqt_jax. {other}")
    if not _ROW.startswith(metrics.metrics_bytes(workdir)[: len(_ROW)]):
      raise errors.UserError(
        f"{workdir / 'metrics.jsonl'} was not written by vqt_jax. {other}"
      )
    return config
  for name in sorted(_CLAIMED.intersection(files.list_names(workdir))):
    place = workdir / name
    if files.list_names(place) or place.is_file():
      raise errors.UserError(
        f"{place} is there, but no config.json, so it was not written by"
        f" vqt_jax. {other}"
      )
  return None


def _begun(workdir: files.Path) -> bool:
  """Return whether anything was trained there or in a folder within."""
  if not files.exists(workdir / "config.json"):
    return False
  names = files.list_names(workdir)
  return _trained(workdir) or any(_trained(workdir / name) for name in names)


def _trained(workdir: files.Path) -> bool:
  return files.exists(workdir / "config.json") and bool(
    files.exists(workdir / "results.json")
    or metrics.metrics_bytes(workdir)
    or files.list_names(workdir / "checkpoints")
    # An exact head has no epochs, which the others would tell of.
    or any(
      name.endswith(stage.SUFFIX)
      for name in files.list_names(workdir / "stages")
    )
  )


def _check_same_run(
  old: dict[str, Any], now: dict[str, Any], workdir: files.Path
) -> None:
  method = methods.parse(now["method"]) if now["method"] else None
  changed = [
    f"{name} was {before!r}, is now {after!r}"
    for name, (before, after) in config_dict.differences(old, now).items()
    if not fields.may_change(name, method, now["solver"])
  ]
  if changed:
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise errors.UserError(
      f"{workdir} holds a run of another config: {'; '.join(changed[:3])}"
      f"{more}. Choose another --workdir, or give the old values to resume."
    )
