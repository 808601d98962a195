"""What was trained, as one ships it, and how to use it.

Queries, an editor's weights (copies of the backbone leaves that trained, and of
no others) and the head.
"""

from collections.abc import Mapping
import dataclasses
import os
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
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import files
from vqt_jax.runtime.files import PathLike


def save_tuned(
  directory: PathLike, variables: Mapping[str, Any], info: Mapping[str, Any]
) -> int:
  """Writes what was trained, as a folder that appears at once.

  Args:
    directory: the folder; an older one of this kind is replaced.
    variables: nested dict of arrays.
    info: what one must know to use them; JSON-able.

  Returns:
    Bytes of its files.

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


def load_tuned(directory: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads what `save_tuned` wrote: (variables, info).

  Raises:
    UserError: it is missing or damaged.
  """
  directory = files.path(directory)
  info = files.read_json(directory / "info.json")
  path = directory / "variables.safetensors"
  try:
    flat = safetensors.numpy.load(files.read(path))
  except (OSError, safetensors.SafetensorError) as e:
    raise errors.UserError(f"Cannot read {path}: {e}.") from e
  return flax.traverse_util.unflatten_dict(flat, sep="/"), info


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
  """A backbone and what was trained on it; `apply` takes the first three.

  Attributes:
    backbone: the frozen ViT, loaded from where training loaded it.
    tuner: the method.
    variables: {"tuner", "head"}.
    info: contents of `info.json`.
  """

  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  variables: dict[str, Any]
  info: dict[str, Any]

  def __repr__(self) -> str:
    of = f"{self.tuner.method}, {self.tuner.num_classes} classes"
    return f"Tuned({of}, {self.backbone})"

  def __call__(self, images: jax.Array) -> tuner_lib.Output:
    """Images (B, height, width, 3), scaled as the backbone wants.

    Raises:
      UserError: as `Backbone.checked`.
    """
    return tuner_lib.apply(self.backbone, self.tuner, self.variables, images)

  def attention(self, images: jax.Array) -> np.ndarray:
    """What queries attend to: (L, B, H, T, N), sums to 1 over the tokens.

    Raises:
      UserError: the method has no queries, or as `Backbone.checked`.
    """
    if not self.tuner.has_queries:
      raise errors.UserError(f"{self.tuner.method} has no queries that look.")
    everything = {**self.variables, "backbone": self.backbone.params}
    images = self.backbone.checked(images)
    tokens = self.tuner.stream(everything, images).tokens
    queries = self.variables["tuner"]["queries"]
    return np.asarray(
      self.tuner.read(readers.attention_step, everything, queries, tokens)
    )

  def folded(self) -> "Tuned":
    """The same without its editor, on a backbone of its own.

    That backbone is a plain ViT: `save_npz` writes it for Big Vision.

    Raises:
      UserError: what the editor does is not the work of any plain ViT.
    """
    if not self.tuner.editor:
      return self
    variables = {**self.variables, "tuner": dict(self.variables["tuner"])}
    own = variables["tuner"].pop("editor")
    params = editors.folded(
      self.tuner.editor, self.tuner.options, self.backbone.params, own
    )
    reader, _ = tuner_lib.parse(self.tuner.method)
    return Tuned(
      dataclasses.replace(
        self.backbone, params=jax.tree.map(np.asarray, params)
      ),
      dataclasses.replace(self.tuner, method=reader),
      variables,
      {**self.info, "method": reader},
    )


def save(
  directory: str | os.PathLike[str],
  init: str,
  backbone: backbone_lib.Backbone,
  tuner: tuner_lib.Tuner,
  variables: dict[str, Any],
  info: dict[str, Any],
  kept: np.ndarray | None = None,
) -> int:
  """Writes a folder with safetensors and `info.json`, nothing of the backbone.

  Args:
    directory: appears at once; an older one of this kind is replaced at once,
      any other one a `UserError`.
    init: where the backbone came from, as `load_backbone` takes it.
    backbone: its settings are noted down.
    tuner: the same.
    variables: {"tuner", "head"}.
    info: what else one may want to know, json-able.
    kept: (F,), not 0 for the features in use, if not all are: the head's rows
      of others are not written.

  Returns:
    Bytes of its files.
  """
  c = backbone.config
  variables = {name: dict(variables[name]) for name in ("tuner", "head")}
  if kept is not None:
    rows = np.flatnonzero(kept).astype(np.int32)
    kernel = np.asarray(variables["head"]["kernel"])[rows]
    variables["head"] |= {"kernel": kernel, "features": rows}
  return save_tuned(
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


def load(directory: str | os.PathLike[str], source: str | None = None) -> Tuned:
  """Reads what `save` wrote, and loads its backbone again.

  Args:
    directory: a folder, or `gs://BUCKET/FOLDER`.
    source: where the backbone is now, as `load_backbone` takes it; None: where
      training loaded it, from whatever folder.

  Raises:
    UserError: a file is missing or damaged or holds NaN, or the backbone is
      gone, or has other weights by now.
  """
  variables, info = load_tuned(directory)
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  checkpoints.check_finite(flat, f"{directory}/variables.safetensors")
  variables = {"tuner": {}, **variables}  # An empty one leaves no trace.
  try:
    given = dict(info["backbone"])
    given.pop("variant")
    trained_on = given.pop("sha256", None)
    backbone = _load_backbone(given, directory, source)
    options = ("method", "num_classes", "num_queries", "normalize", "combine")
    later = [name for name in ("target_size",) if name in info]
    tuner = tuner_lib.make_tuner(
      backbone=backbone,
      options=editors.Options(**info.get("options", {})),
      **{name: info[name] for name in (*options, *later)},
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
  wanted = tuner.shapes()
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  if shapes(variables) != shapes(wanted):
    raise errors.UserError(
      f"{directory} does not fit {tuner.method} on {info['backbone']}:"
      f" expected {shapes(wanted)}, found {shapes(variables)}."
    )
  return Tuned(backbone, tuner, variables, info)


def _load_backbone(
  given: dict[str, Any],
  directory: str | os.PathLike[str],
  source: str | None,
) -> backbone_lib.Backbone:
  """The backbone from where it is now, or from where training loaded it.

  Of the latter the absolute path counts first (old files have none), so that
  the same words mean the same file in any folder.
  """
  path = given.pop("path", None)
  if source:
    return checkpoints.load_backbone(**given | {"source": source})
  if path and checkpoints.local_path(path):
    given["source"] = path
  try:
    return checkpoints.load_backbone(**given)
  except errors.UserError as e:
    raise errors.UserError(
      f"{directory} needs the backbone that it was trained on; if that is"
      f" elsewhere now, name it: load(directory, source=...). {e}"
    ) from e
