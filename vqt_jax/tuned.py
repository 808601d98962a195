"""Trained weights as a folder, and their use.

A folder holds two files and nothing of the frozen backbone:

  variables.safetensors  queries, weights of the editor (with its copies of
                         backbone leaves, if it trains these), and the head; if
                         features were selected, the head's rows of these and
                         their numbers
  info.json              the tuner's options, the backbone's source, settings
                         and digest, and the results of training
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import editors
from vqt_jax.models import methods
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import files
from vqt_jax.runtime.files import PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
  """A backbone and weights trained on it; `apply` takes the first three.

  Attributes:
    backbone: the frozen ViT.
    tuner: the method.
    variables: {"tuner", "head"}.
    info: contents of `info.json`.
  """

  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  variables: dict[str, Any]
  info: dict[str, Any]

  def __repr__(self) -> str:
    tuner = f"{self.tuner.method}, {self.tuner.num_classes} classes"
    return f"Tuned({tuner}, {self.backbone})"

  def __call__(self, images: jax.Array) -> tuner_lib.Output:
    """Classify images (B, height, width, 3), scaled as the backbone expects.

    Raises:
      UserError: the images do not fit, see `Backbone.checked`.
    """
    return tuner_lib.apply(self.backbone, self.tuner, self.variables, images)

  def attention(self, images: jax.Array) -> np.ndarray:
    """Attention weights of the queries, (L, B, H, T, N), sum to 1 over tokens.

    Raises:
      UserError: the method has no queries, or the images do not fit, see
        `Backbone.checked`.
    """
    if not self.tuner.has_queries:
      raise errors.UserError(
        f"{self.tuner.method} has no queries, so there is no attention of"
        " queries to return."
      )
    variables = {**self.variables, "backbone": self.backbone.params}
    images = self.backbone.checked(images)
    tokens = self.tuner.stream(variables, images).tokens
    queries = self.variables["tuner"]["queries"]
    return np.asarray(
      self.tuner.read(readers.attention_step, variables, queries, tokens)
    )

  def folded(self) -> "Tuned":
    """Fold the editor into the backbone, which is a plain ViT then.

    `save_npz` writes that backbone for Big Vision.

    Raises:
      UserError: no plain ViT computes what the editor does.
    """
    if not self.tuner.editor:
      return self
    variables = {**self.variables, "tuner": dict(self.variables["tuner"])}
    weights = variables["tuner"].pop("editor")
    params = editors.fold(
      self.tuner.editor, self.tuner.options, self.backbone.params, weights
    )
    params = jax.tree.map(np.asarray, params)
    reader = methods.parse(self.tuner.method).reader
    return Tuned(
      dataclasses.replace(self.backbone, params=params),
      dataclasses.replace(self.tuner, method=reader),
      variables,
      {**self.info, "method": reader},
    )


def save(
  directory: PathLike,
  init: str,
  backbone: backbone_lib.Backbone,
  tuner: tuner_lib.Tuner,
  variables: Mapping[str, Any],
  info: Mapping[str, Any],
  feature_mask: np.ndarray | None = None,
) -> int:
  """Write a folder that `load` reads.

  Args:
    directory: appears at once, and replaces an older one of this kind.
    init: source of the backbone, as `load_backbone` takes it.
    backbone: its settings are written, not its weights.
    tuner: likewise.
    variables: {"tuner", "head"}.
    info: further contents of `info.json`.
    feature_mask: (F,), 0 for features that are not used: the head's rows of
      these are not written. None: all are used.

  Returns:
    Bytes of its files.

  Raises:
    UserError: it cannot be written, or holds other files.
  """
  c = backbone.config
  variables = {name: dict(variables[name]) for name in ("tuner", "head")}
  if feature_mask is not None:
    rows = np.flatnonzero(feature_mask).astype(np.int32)
    kernel = np.asarray(variables["head"]["kernel"])[rows]
    variables["head"] |= {"kernel": kernel, "features": rows}
  return write(
    directory,
    variables,
    {
      "method": tuner.method,
      "num_classes": tuner.num_classes,
      "num_queries": tuner.num_queries,
      "normalize": tuner.normalize,
      "combine": tuner.combine,
      "target_size": tuner.target_size,
      "options": dataclasses.asdict(tuner.options),
      "backbone": {
        "source": init,
        "path": checkpoints.local_path(init),
        "variant": c.variant,
        "image_size": list(c.image_size),
        "trained_size": backbone.trained_size,
        "pool_type": c.pool_type,
        "gelu": c.gelu,
        "value_range": backbone.value_range,
        "sha256": backbone.identity,
      },
      **info,
    },
  )


def load(directory: PathLike, source: str | None = None) -> Tuned:
  """Read a folder that `save` wrote, and load its backbone.

  Args:
    directory: a folder, or `gs://BUCKET/FOLDER`.
    source: the backbone, as `load_backbone` takes it; None: the file or name
      that training loaded it from.

  Raises:
    UserError: a file is missing or damaged or holds NaN, or the backbone is
      gone, or has other weights now.
  """
  with files.explain_damage(directory):
    return _load(directory, source)


def _load(directory: PathLike, source: str | None) -> Tuned:
  variables, info = read(directory)
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  checkpoints.check_finite(flat, f"{directory}/variables.safetensors")
  variables = {"tuner": {}, **variables}  # Empty dicts are not written.
  try:
    settings = dict(info["backbone"])
    settings.pop("variant")
    trained_on = settings.pop("sha256", None)
    backbone = _load_backbone(settings, directory, source)
    names = ["method", "num_classes", "num_queries", "normalize", "combine"]
    names += ["target_size"] * ("target_size" in info)  # Not in old files.
    tuner = tuner_lib.make_tuner(
      backbone=backbone,
      options=editors.Options(**info.get("options", {})),
      **{name: info[name] for name in names},
    )
  except (KeyError, TypeError) as e:
    raise errors.UserError(
      f"{directory}/info.json does not describe a tuned model: {e!r}. Was it"
      " written by this program?"
    ) from e
  if trained_on not in (None, backbone.identity):
    raise errors.UserError(
      f"{directory} was trained on other weights than {backbone.source} has"
      " now. Name those it was trained on: load(directory, source=...)."
    )
  features = variables["head"].pop("features", None)
  if features is not None:
    rows = variables["head"]["kernel"]
    kernel = np.zeros((tuner.num_features, *rows.shape[1:]), rows.dtype)
    if len(rows) == len(features) and features.max() < len(kernel):
      kernel[features] = rows
    variables["head"]["kernel"] = kernel
  expected, found = (
    jax.tree.map(np.shape, tree) for tree in (tuner.shapes(), variables)
  )
  if found != expected:
    raise errors.UserError(
      f"{directory} does not fit {tuner.method} on {info['backbone']}:"
      f" expected {expected}, found {found}."
    )
  return Tuned(backbone, tuner, variables, info)


def _load_backbone(
  settings: dict[str, Any], directory: PathLike, source: str | None
) -> backbone_lib.Backbone:
  """Load the backbone from `source`, or from where training loaded it.

  Of the latter the absolute path comes first (old files have none): the name in
  the config may be relative to another folder.
  """
  path = settings.pop("path", None)
  if source:
    return checkpoints.load_backbone(**settings | {"source": source})
  if path and checkpoints.local_path(path):
    settings["source"] = path
  try:
    return checkpoints.load_backbone(**settings)
  except errors.UserError as e:
    raise errors.UserError(
      f"{directory} needs the backbone that it was trained on; if that is"
      f" elsewhere now, name it: load(directory, source=...). {e}"
    ) from e


def write(
  directory: PathLike, variables: Mapping[str, Any], info: Mapping[str, Any]
) -> int:
  """Write the two files of a folder, which appears at once.

  Args:
    directory: the folder; an older one of this kind is replaced.
    variables: nested dict of arrays.
    info: JSON-able.

  Returns:
    Bytes of the files.

  Raises:
    UserError: it cannot be written, or holds other files.
  """
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  arrays = {k: np.ascontiguousarray(v) for k, v in flat.items()}
  contents = {
    "variables.safetensors": safetensors.numpy.save(arrays),
    "info.json": files.json_bytes(info),
  }
  files.write_folder(files.path(directory), contents)
  return sum(map(len, contents.values()))


def read(directory: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Read the two files of a folder: (variables, info).

  Raises:
    UserError: one is missing or damaged.
  """
  directory = files.path(directory)
  info = files.read_json(directory / "info.json")
  path = directory / "variables.safetensors"
  try:
    flat = safetensors.numpy.load(files.read(path))
  except (OSError, safetensors.SafetensorError) as e:
    raise errors.UserError(f"Cannot read {path}: {e}.") from e
  return flax.traverse_util.unflatten_dict(flat, sep="/"), info
