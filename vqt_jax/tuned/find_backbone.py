"""Finds the backbone that a bundle was trained on."""

from collections.abc import Iterator, Mapping
import pathlib
from typing import Any

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.runtime import files

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"


def find(
  folder: files.Path, info: Mapping[str, Any], given: Any
) -> backbone_lib.Backbone:
  """Load the backbone of a bundle, and compare its hash.

  Args:
    folder: the bundle.
    info: contents of its `bundle.json`.
    given: a `Backbone`, or its source; None: it is looked for.

  Raises:
    UserError: it is not found, has other weights, or is of another
      architecture.
  """
  recorded, preprocessing = info["backbone"], info["preprocessing"]
  if isinstance(given, backbone_lib.Backbone):
    return _checked(given, folder, info)
  settings = {
    name: recorded[name]
    for name in ("trained_size", "pool_type", "gelu", "dtype")
    if name in recorded
  }
  settings |= {
    name: preprocessing[name] for name in ("image_size", "value_range")
  }
  if given is not None:
    found = checkpoints.load_backbone(given, **settings)
    return _checked(found, folder, info)
  problems = []
  for source in _places(folder, recorded["source"]):
    try:
      found = checkpoints.load_backbone(source, **settings)
      return _checked(found, folder, info)
    except errors.UserError as e:
      problems.append(str(e))
  looked = f" {problems[-1]}" if problems else ""
  raise errors.UserError(
    f"{folder} needs the backbone that it was trained on, ViT-"
    f"{recorded['variant']} {recorded['source']!r}, which is not at hand."
    f"{looked} Name it: vqt_jax.load(path, backbone=...), or --backbone on a"
    " command line."
  )


def _places(folder: files.Path, source: str) -> Iterator[str]:
  """Yield sources that may be the backbone, likeliest first.

  An address is followed only if the run's own config has it: a bundle from
  elsewhere cannot make this machine fetch what it likes.
  """
  for parent in (folder.parent, folder.parent.parent):
    if files.exists(parent / "config.json"):
      init = files.read_json(parent / "config.json").get("init")
      if isinstance(init, str):
        yield init
  if checkpoints.find_name(source):
    yield source
  elif "://" not in source:
    for place in (folder, folder.parent, _ASSETS):
      path = str(files.below(place, source))
      if checkpoints.local_path(path):
        yield path


def _checked(
  backbone: backbone_lib.Backbone, folder: files.Path, info: Mapping[str, Any]
) -> backbone_lib.Backbone:
  """Return a backbone if it is the one that a bundle was trained on."""
  expected = info["backbone"].get("sha256")
  if expected not in (None, backbone.identity):
    raise errors.UserError(
      f"{folder} was trained on other weights than {backbone.source} has. Name"
      " those it was trained on: vqt_jax.load(path, backbone=...), or"
      " --backbone on a command line."
    )
  size = tuple(info["preprocessing"]["image_size"])
  if backbone.config.image_size != size:
    raise errors.UserError(
      f"{folder} was trained on images of {size}, and {backbone} is for others:"
      f" expected load_backbone(..., image_size={size})."
    )
  return backbone
