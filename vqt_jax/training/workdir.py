"""What a run leaves in its workdir, written so that a crash leaves it whole.

  config.json     the resolved config, written first
  metrics.jsonl   a line per epoch and run
  tensorboard/    the same as TensorBoard events
  results.json    what came out
  tuned/          what was trained: variables.safetensors and info.json

While a run lasts there is also `.vqt_jax.lock`, see `files.alone_in`.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.models import methods
from vqt_jax.runtime import files
from vqt_jax.runtime import locks
from vqt_jax.runtime.files import PathLike
from vqt_jax.training import metrics

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
  now = config_dict.to_json(config)
  _config_of(workdir)  # Somebody else's does not even get a lock.
  with locks.alone_in(workdir):
    old, begun = _config_of(workdir), _begun(workdir)
    if begun:
      _check_same_run(old, now, workdir)
    else:
      files.write_json(workdir / "config.json", now)
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
      config = files.read_json(path)
    except errors.UserError as e:
      raise errors.UserError(f"{e} {other}") from e
    if not isinstance(config, dict) or not _OF_CONFIGS <= config.keys():
      raise errors.UserError(f"{path} is no config of this program. {other}")
    if not _ROW.startswith(metrics.metrics_bytes(workdir)[: len(_ROW)]):
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
    or metrics.metrics_bytes(workdir)
    or files.names(workdir / "checkpoints")
    or any(_begun(workdir / name) for name in files.names(workdir))
  )


def _check_same_run(
  old: dict[str, Any], now: dict[str, Any], workdir: files.Path
) -> None:
  method = methods.parse(now["method"]) if now["method"] else None
  changed = [
    f"{name} was {before!r}, is now {after!r}"
    for name, (before, after) in config_dict.differences(old, now).items()
    if not fields.may_change(name, method)
  ]
  if changed:
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    raise errors.UserError(
      f"{workdir} holds a run of another config: {'; '.join(changed[:3])}"
      f"{more}. Choose another --workdir, or give the old values to resume."
    )
