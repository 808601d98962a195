"""Finds the backbone that a bundle was trained on."""

from collections.abc import Iterator, Mapping
import contextlib
import pathlib
from typing import Any

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.runtime import files

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"


_ADVICE = (
  "Name the one that it was trained on: vqt_jax.load(path, backbone=...), or"
  " --backbone on a command line."
)


def find(
  folder: files.Path, info: Mapping[str, Any], given: Any, fetched: bool
) -> backbone_lib.Backbone:
  """Load the backbone of a bundle, and compare its hash.

  Args:
    folder: the bundle.
    info: contents of its `bundle.json`.
    given: a `Backbone`, or its source; None: it is looked for.
    fetched: the folder is a copy, and what is around it is no run.

  Raises:
    UserError: it is not found, has other weights, or is set up otherwise.
  """
  recorded, preprocessing = info["backbone"], info["preprocessing"]
  settings = {
    name: recorded[name]
    for name in ("trained_size", "num_heads", "pool_type", "gelu", "dtype")
    if name in recorded
  }
  settings |= {
    name: preprocessing[name] for name in ("image_size", "value_range")
  }
  if given is not None:
    found = given
    if not isinstance(given, backbone_lib.Backbone):
      found = checkpoints.load_backbone(given, **settings)
    if problem := _difference(found, recorded, settings):
      raise errors.UserError(f"{folder} was trained on {problem}. {_ADVICE}")
    return found
  problems = []
  revision = recorded.get("revision")
  for source in _places(folder, recorded["source"], revision, fetched):
    try:
      found = checkpoints.load_backbone(source, **settings)
    except errors.UserError as e:
      problems.append(str(e))
      continue
    problem = _difference(found, recorded, settings)
    if not problem:
      return found
    problems.append(f"It was trained on {problem}.")
  name = recorded["source"]
  if revision:
    name = f"{name.partition('@')[0]}@{revision}"
  raise errors.UserError(
    " ".join(
      [
        f"{folder} needs the backbone that it was trained on, ViT-"
        f"{recorded['variant']} {name!r}, which is not at hand.",
        *problems[-1:],
        _ADVICE,
      ]
    )
  )


def _places(
  folder: files.Path, source: str, revision: str | None, fetched: bool
) -> Iterator[str]:
  """Yield sources that may be the backbone, likeliest first.

  An address is followed only if the run's own config has it: a bundle from
  elsewhere cannot make this machine fetch what it likes. Models of the hub are
  looked for in the cache.
  """
  if revision and (cached := checkpoints.find_cached(source, revision)):
    yield str(cached)
  for parent in () if fetched else (folder.parent, folder.parent.parent):
    with contextlib.suppress(errors.UserError):  # Of another program.
      config = files.read_json(parent / "config.json")
      if isinstance(config, dict) and isinstance(config.get("init"), str):
        yield config["init"]
  if checkpoints.find_name(source):
    yield source
  elif "://" not in source:
    for place in (folder, folder.parent, _ASSETS):
      path = str(files.below(place, source))
      if checkpoints.local_path(path):
        yield path


def _difference(
  backbone: backbone_lib.Backbone,
  recorded: Mapping[str, Any],
  settings: Mapping[str, Any],
) -> str | None:
  """Return how a backbone differs from the recorded one, if it does."""
  if recorded.get("sha256") not in (None, backbone.identity):
    return f"other weights than {backbone.source or 'these'} has"
  c = backbone.config
  found = {
    "image_size": list(c.image_size),
    "value_range": backbone.value_range,
    "pool_type": c.pool_type,
    "gelu": c.gelu,
    "dtype": c.dtype,
  }
  for name, value in found.items():
    if name in settings and settings[name] not in (value, tuple(c.image_size)):
      return f"{name} {settings[name]}, and {backbone!r} has {value}"
  return None
