"""`save_backbone`: a ViT in the layouts of other programs."""

from collections.abc import Mapping
import dataclasses
import os
import re
from typing import Any

import numpy as np
import safetensors.numpy

from vqt_jax import errors
from vqt_jax.checkpoints import families
from vqt_jax.checkpoints import found as found_lib
from vqt_jax.checkpoints import names as names_lib
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.checkpoints.families import family as family_lib
from vqt_jax.models import vit
from vqt_jax.models.backbone import Backbone
from vqt_jax.runtime import files

# Library, as `Backbone.layout` begins -> its name.
_LIBRARIES = {"hf": "transformers", "timm": "timm", "big_vision": "Big Vision"}


def save_backbone(
  path: str | os.PathLike[str], backbone: Backbone, layout: str = ""
) -> None:
  """Write a backbone as files that another library loads.

  Positions are written at the backbone's image size. LayerScale, which was
  multiplied into the weights, is written as ones. The pre-trained head is left
  out where the library's model has no place for one.

  Args:
    path: of the folder, as `save_pretrained` leaves it: `model.safetensors`
      (float32), `config.json` and, for transformers,
      `preprocessor_config.json`. It appears at once, when it is complete. For
      "big_vision", of the npz file.
    backbone: whatever layout it came from.
    layout: "hf" (transformers), "timm", "big_vision" (see `save_npz`), or by
      default that of the library it came from.

  Raises:
    UserError: no ViT of the library computes what this one does, or the files
      cannot be written, or others are there already.
  """
  if layout and layout not in _LIBRARIES:
    raise errors.unknown_name("layout", layout, _LIBRARIES)
  library = layout or backbone.layout.partition("-")[0]
  if library == "big_vision":
    save_npz(path, backbone)
    return
  if library not in _LIBRARIES:
    raise errors.UserError(
      f"{backbone.source} is an image tower of {library}, whose files hold a"
      " text tower too, which is not here: pass layout='hf' or layout='timm'."
    )
  positions_lib.check_image_size(
    backbone.config.patch_size, backbone.config.image_size
  )
  tensors, configs, problems = _convert(backbone, library)
  if problems:
    raise errors.UserError(
      f"No ViT of {_LIBRARIES[library]} computes what this one does:"
      f" {'; '.join(problems)}.{_name_others(backbone, library)}"
    )
  weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  contents = {name: files.json_bytes(x) for name, x in configs.items()}
  files.write_folder(
    files.path(path), {safetensors_files.WEIGHTS[0]: weights, **contents}
  )


def save_npz(path: str | os.PathLike[str], backbone: Backbone | Any) -> None:
  """Write a backbone's parameters as Big Vision writes them.

  One sub-tree per block, no prefix: the layout that Big Vision,
  vision_transformer and third-party converters all read. Leaves keep their
  dtype (bfloat16 becomes two-byte void, as in Big Vision); `load_backbone`
  returns the same bits. Settings that the format lacks (gelu, value range, a
  non-square grid, "mae" and "0" as pooling) must be given again when loading.

  Args:
    path: of the file, which appears at once, when it is complete.
    backbone: a `Backbone`, or its `params`.

  Raises:
    UserError: Big Vision has no such ViT, or the file cannot be written.
  """
  params = backbone.params if isinstance(backbone, Backbone) else backbone
  leaves = {n: np.asarray(a) for n, a in names_lib.flatten(params).items()}
  if problems := _npz_problems(backbone, leaves):
    advice = " Give save_backbone the Backbone, and layout='hf' or 'timm'."
    if isinstance(backbone, Backbone):
      advice = _name_others(backbone, "big_vision")
    raise errors.UserError(
      f"Big Vision's ViTs have no {', no '.join(problems)}.{advice}"
    )
  arrays = dict(sorted(names_lib.unstack_blocks(leaves).items()))
  with files.replacing(files.path(path)) as file:
    np.savez(file, **arrays)


def _npz_problems(
  backbone: Backbone | Any, leaves: Mapping[str, np.ndarray]
) -> list[str]:
  """Name the parts of a backbone, or of parameters, that Big Vision lacks."""
  lacking = {
    "registers": "registers" in leaves,
    "LayerNorm before the blocks": "pre_norm/scale" in leaves,
    "gated MLPs": any(name.endswith("/gate/kernel") for name in leaves),
  }
  if isinstance(backbone, Backbone):
    c = backbone.config
    own = dataclasses.replace(c, class_token=None)
    epsilon = c.layer_norm_epsilon
    lacking |= {
      "rotary positions": c.posemb == "rope",
      f"epsilon of {epsilon} in LayerNorms": epsilon != 1e-6,
      f"class token where pool_type is {c.pool_type!r}": (
        c.has_class_token and not own.has_class_token
      ),
      f"pool_type {c.pool_type!r} without a class token": (
        own.has_class_token and not c.has_class_token
      ),
    }
  return [name for name, is_so in lacking.items() if is_so]


def _name_others(backbone: Backbone, library: str) -> str:
  """Name the layouts other than a library's that can express a backbone."""
  npz = _npz_problems(backbone, names_lib.flatten(backbone.params))
  able = [
    repr(name)
    for name in _LIBRARIES
    if name != library
    and not (npz if name == "big_vision" else _convert(backbone, name)[2])
  ]
  if not able:
    return " No other layout has it either."
  return f" save_backbone can write it with layout={' or '.join(able)}."


_Files = tuple[dict[str, np.ndarray], Mapping[str, Any], list[str]]


def _convert(backbone: Backbone, library: str) -> _Files:
  """Convert a backbone to files of a library.

  Of its families the one that the backbone came from is taken, else the first
  that computes the same, else the one that comes nearest.

  Returns:
    Tensors by name, contents of the JSON files by name, and what the family
    cannot compute, in words.
  """
  known = [f for f in families.FAMILIES if f.layout.startswith(f"{library}-")]
  known.sort(key=lambda family: family.layout != backbone.layout)
  best = None
  for family in known:
    found = _convert_to(family, backbone)
    if best is None or len(found[2]) < len(best[2]):
      best = found
    if not found[2]:
      break
  return best


def _convert_to(family: family_lib.Family, backbone: Backbone) -> _Files:
  """Convert a backbone to files of one family; see `_convert`."""
  config = backbone.config
  stacked = {
    name: np.asarray(leaf, np.float32)
    for name, leaf in names_lib.flatten(backbone.params).items()
  }
  zeros = {
    name.removeprefix(names_lib.STACKED)
    for name, leaf in stacked.items()
    if not leaf.any()
  }
  outline = family.outline(backbone, zeros)
  leaves = names_lib.unstack_blocks(stacked)
  if config.posemb == "sincos2d":
    leaves["pos_embedding"] = vit.posemb_sincos_2d(config.grid, config.width)
  if outline.class_position and "pos_embedding" in leaves:
    # The class token's own position is in it already.
    leaves["pos_embedding"] = np.pad(
      leaves["pos_embedding"], ((0, 0), (1, 0), (0, 0))
    )
  problems = [f"does not {each}" for each in outline.problems]
  tensors, written = {}, set()
  for name, held in family_lib.tensors(family, outline.prefix, config.depth):
    relative = name.removeprefix(outline.prefix)
    in_block = re.sub(rf"{re.escape(family.blocks)}\d+\.", "", relative)
    if any(re.fullmatch(each, in_block) for each in outline.absent):
      continue
    if held[0].endswith(f"/{family_lib.SCALE}"):
      tensors[name] = np.ones(config.width, np.float32)
    elif set(held) <= leaves.keys():
      parts = [family_lib.to_tensor(leaf, leaves[leaf]) for leaf in held]
      tensors[name] = np.ascontiguousarray(np.concatenate(parts))
      written.update(held)
      if outline.bare_tokens and held[0] in ("cls", "pos_embedding"):
        tensors[name] = tensors[name].reshape(
          (-1,) if held[0] == "cls" else (-1, config.width)
        )
    elif not name.endswith("bias"):
      problems.append(f"needs {in_block}")
  for name, shape in outline.unused.items():
    tensors[outline.prefix + name] = np.zeros(shape, np.float32)
  lost = set()
  for leaf in leaves.keys() - written:
    kind = re.sub(rf"{family_lib.BLOCK}\d+/", "", leaf)
    is_zero_bias = kind in zeros and re.fullmatch(family.optional, leaf)
    if not is_zero_bias and not kind.startswith("head/"):
      lost.add(kind)
  problems += [f"has no place for {kind}" for kind in sorted(lost)]
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  configs = {n: files.to_json_types(x) for n, x in outline.configs.items()}
  try:
    found = families.recognise(shapes, configs, family.name)
    problems = _differences(backbone, found) + problems
  except errors.UserError:
    if not problems:
      raise
  if problems:
    problems[0] = f"{family.name} {problems[0]}"
  return tensors, outline.configs, problems


def _differences(backbone: Backbone, found: found_lib.Found) -> list[str]:
  """List how a backbone that was written differs from what is read."""
  config, read = backbone.config, found.config
  same = {"image_size": read.image_size, "dtype": read.dtype}
  same["class_token"] = config.has_class_token
  if config.posemb != "rope":
    same |= {"posemb": "learn", "rope_theta": read.rope_theta}
  if config.gated_mlp:
    same["gelu"] = read.gelu
  if not read.num_classes:  # It is left out.
    same["num_classes"] = None
  wanted = dataclasses.replace(config, **same)
  return [
    f"has {field.name} {getattr(read, field.name)!r}, not"
    f" {getattr(wanted, field.name)!r}"
    for field in dataclasses.fields(read)
    if getattr(read, field.name) != getattr(wanted, field.name)
  ]
