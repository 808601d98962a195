"""Bundles: what training ships of a run, as a folder that explains itself.

  model.safetensors  queries, weights of the editor (with its copies of backbone
                     leaves, if it trains these) and the head, leaves (R, ...)
                     of R seeds; if features were selected, the head's rows of
                     these and their numbers
  bundle.json        all that is needed to use them, and the results
  README.md          the same in words

Nothing of the frozen backbone is in it but its name and hash, and no path of
the machine that trained it.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax import version
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import files
from vqt_jax.runtime.files import PathLike
from vqt_jax.tuned import card

FORMAT = 1
# Fields of `bundle.json` that `write` fills in.
WRITTEN = ("format", "program", "tuner", "backbone", "weights_sha256")
# Fields of `bundle.json` -> types.
_KINDS = {
  "task": str,
  "classes": list[str],
  "seeds": list[int],
  "preprocessing": dict[str, Any],
  "tuner": dict[str, Any],
  "backbone": dict[str, Any],
  "results": dict[str, Any],
  "weights_sha256": str,
}
WEIGHTS, INFO, CARD = "model.safetensors", "bundle.json", "README.md"
# Files of one seed, as versions before 0.3 wrote them, in `tuned/seed_SEED`.
_OLD_WEIGHTS, _OLD_INFO = "variables.safetensors", "info.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
  """Contents of a bundle.

  Attributes:
    variables: {"tuner", "head"}, leaves (R, ...) of R seeds; of selected
      features the head's rows, (R, rows, C), and their numbers
      `head/features`, (R, rows).
    info: contents of `bundle.json`.
  """

  variables: dict[str, Any]
  info: dict[str, Any]


def write(
  directory: PathLike,
  source: str,
  backbone: backbone_lib.Backbone,
  tuner: tuner_lib.Tuner,
  variables: Mapping[str, Any],
  info: Mapping[str, Any],
  feature_mask: np.ndarray | None = None,
) -> int:
  """Write a bundle.

  Args:
    directory: appears at once, and replaces an older bundle.
    source: of the backbone, as `load_backbone` takes it.
    backbone: its settings are written, not its weights.
    tuner: likewise.
    variables: {"tuner", "head"}, leaves (R, ...).
    info: further contents of `bundle.json`: "task", "classes", "preprocessing",
      "seeds", "results".
    feature_mask: (R, F), 0 for features that are not used: the head's rows of
      these are not written. None: all are used.

  Returns:
    Bytes of the weights.

  Raises:
    UserError: it cannot be written, or holds other files.
  """
  variables = {name: dict(variables[name]) for name in ("tuner", "head")}
  if feature_mask is not None:
    rows = np.stack([np.flatnonzero(mask) for mask in feature_mask])
    kernel = np.asarray(variables["head"]["kernel"])
    kernel = np.take_along_axis(kernel, rows[..., None], axis=1)
    variables["head"] |= {"kernel": kernel, "features": rows.astype(np.int32)}
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  arrays = {k: np.ascontiguousarray(v) for k, v in flat.items()}
  weights = safetensors.numpy.save(arrays)
  c, path = backbone.config, checkpoints.local_path(source)
  info = {
    "format": FORMAT,
    "program": f"vqt_jax {version.__version__}",
    "tuner": {
      name: value
      for name, value in dataclasses.asdict(tuner).items()
      if name not in ("config", "num_classes")
    },
    "backbone": {
      "source": files.path(path).name
      if path
      else checkpoints.without_secrets(source),
      **({"revision": backbone.revision} if backbone.revision else {}),
      "sha256": backbone.identity,
      "variant": c.variant,
      "num_heads": c.num_heads,
      "trained_size": backbone.trained_size,
      "pool_type": c.pool_type,
      "gelu": c.gelu,
      "dtype": c.dtype,
    },
    "weights_sha256": hashlib.sha256(weights).hexdigest(),
    **info,
  }
  contents = {
    WEIGHTS: weights,
    CARD: card.model_card(info).encode(),
    INFO: files.json_bytes(info),
  }
  files.write_folder(files.path(directory), contents)
  return len(weights)


def find(place: PathLike) -> files.Path:
  """Return the folder of a bundle: `place`, or `tuned/` in a workdir.

  Of a bundle at an address that `checkpoints.is_address` knows, its copy.

  Raises:
    UserError: there is none.
  """
  if checkpoints.is_address(os.fspath(place)):
    return checkpoints.fetch_folder(os.fspath(place), (INFO, WEIGHTS))
  place = files.path(place)
  if folder := _find(place):
    return folder
  reason = f"it has no {INFO}, and no tuned/"
  if files.exists(place / "config.json"):
    reason = "its run is not finished, or is one of several in folders there"
  elif not files.exists(place):
    reason = "there is no such folder"
  raise errors.UserError(
    f"{place} holds no tuned model: {reason}. Name the workdir of a finished"
    " run, or a bundle (its tuned/)."
  )


def is_model(place: PathLike) -> bool:
  """Return whether `find` finds a bundle there, or would at an address."""
  if checkpoints.is_address(os.fspath(place)):
    return True
  try:
    return _find(files.path(place)) is not None
  except errors.UserError:
    return False


def _find(place: files.Path) -> files.Path | None:
  for folder in (place, place / "tuned"):
    if files.exists(folder / INFO) or _old_seeds(folder):
      return folder
  return None


def read(directory: PathLike) -> Bundle:
  """Read a bundle, or folders of earlier versions.

  Raises:
    UserError: a file is missing or damaged, or of a later format.
  """
  directory = files.path(directory)
  if not files.exists(directory / INFO):
    return _read_old(_old_seeds(directory))
  info = files.read_json(directory / INFO)
  with files.explain_damage(directory / INFO):
    if info["format"] > FORMAT:
      raise errors.UserError(
        f"{directory} has format {info['format']}, written by"
        f" {info.get('program')}; this version reads formats up to {FORMAT}."
        " Install a newer vqt_jax."
      )
    for name, kind in _KINDS.items():
      if not files.is_of(info[name], kind):
        raise ValueError(f"{name}: expected {kind}")
  content = _read_file(directory / WEIGHTS)
  if hashlib.sha256(content).hexdigest() != info["weights_sha256"]:
    raise errors.UserError(
      f"{directory / WEIGHTS} is damaged, or of another bundle: its SHA-256 is"
      f" not the one in {INFO}. Copy the whole folder again."
    )
  return Bundle(_parse(content, directory / WEIGHTS), info)


def _read_file(path: files.Path) -> bytes:
  try:
    return files.read(path)
  except FileNotFoundError as e:
    raise errors.UserError(f"There is no {path}.") from e


def _parse(content: bytes, path: files.Path) -> dict[str, Any]:
  """Parse weights into a nested dict."""
  with files.explain_damage(path):
    flat = safetensors.numpy.load(content)
    checkpoints.check_floats(
      {n: x for n, x in flat.items() if n != "head/features"}, str(path)
    )
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _old_seeds(folder: files.Path) -> list[files.Path]:
  """Return folders of single seeds, as earlier versions wrote them.

  A folder of a seed itself, or those in it.
  """
  if files.exists(folder / _OLD_INFO):
    return [folder]
  names = [n for n in files.list_names(folder) if n.startswith("seed_")]
  inside = [folder / name for name in names]
  return [each for each in inside if files.exists(each / _OLD_INFO)]


def _read_old(folders: list[files.Path]) -> Bundle:
  """Read folders of single seeds as one bundle."""
  infos = [files.read_json(folder / _OLD_INFO) for folder in folders]
  trees = [
    _parse(_read_file(folder / _OLD_WEIGHTS), folder / _OLD_WEIGHTS)
    for folder in folders
  ]
  with files.explain_damage(folders[0] / _OLD_INFO):
    info, backbone = infos[0], infos[0]["backbone"]
    return Bundle(
      jax.tree.map(lambda *leaves: np.stack(leaves), *trees),
      {
        "format": 0,
        "task": info.get("task", ""),
        "classes": [str(i) for i in range(info["num_classes"])],
        "seeds": [int(each.get("seed", 0)) for each in infos],
        "preprocessing": {
          "image_size": backbone["image_size"],
          "value_range": backbone["value_range"],
          "resize": info.get("resize", "bilinear"),
        },
        "tuner": {
          name: info[name]
          for name in ("method", "num_queries", "normalize", "combine")
        }
        | {name: info[name] for name in ("target_size",) if name in info}
        | {"options": info.get("options", {})},
        "backbone": {
          **backbone,
          "source": pathlib.PurePath(backbone["source"]).name
          if checkpoints.find_name(backbone["source"]) is None
          else backbone["source"],
        },
        "results": {"chosen": info.get("chosen", {})},
      },
    )
