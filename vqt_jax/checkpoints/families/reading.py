"""Find out which ViT a file of another library holds, and convert it."""

from collections.abc import Mapping
import dataclasses
import functools
import math
import pathlib
import re
from typing import Any

import numpy as np

from vqt_jax.checkpoints import architecture
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import found as found_lib
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.checkpoints.families import family as family_lib
from vqt_jax.checkpoints.families.known import FAMILIES
from vqt_jax.errors import UserError
from vqt_jax.models import vit_config
from vqt_jax.runtime import files

# Pattern of names of tensors -> what such a file holds. These have the names of
# a family as well.
_RELATED = {
  r"(.*\.)?(distillation_token|dist_token)": "a DeiT with distillation",
  r".*relative_position.*": "a Swin, BEiT or other ViT of relative positions",
}
_OTHERS = {
  r".*(downsample_layers|dwconv|conv_dw).*": "a ConvNeXt or other convnet",
  r"(.*\.)?layer1\.0\.conv1\.weight": "a ResNet",
  r"(.*\.)?stages\.0\..*": "a network of several stages",
  r".*\.(rel_pos_h|decomposed_rel_pos).*": "a SAM or MViT",
  r".*(word_embeddings|embed_tokens|wte|token_embedding)\.weight": (
    "a text model"
  ),
}


@dataclasses.dataclass(frozen=True)
class _Match:
  """A file, and the family that its names are of.

  Attributes:
    family: its family.
    prefix: of the names of this ViT in the file.
    shapes: name in the file -> shape, of all tensors.
    tensors: name in the file -> leaves that it holds.
    source: name of the file in errors.
  """

  family: family_lib.Family
  prefix: str
  shapes: family_lib.Shapes
  tensors: Mapping[str, tuple[str, ...]]
  source: str


def inspect(
  path: pathlib.Path, source: str, num_heads: int | None = None
) -> found_lib.Found:
  """Find out which ViT a file of safetensors holds.

  Args:
    path: as `containers.find` returns it.
    source: name of the file in errors.
    num_heads: if nothing else tells it.

  Raises:
    UserError: it is damaged or of no family; the config beside it is of another
      model; or nothing tells the number of heads.
  """
  shapes = containers.leaf_shapes(path, containers.leaf_names(path))
  return recognise(shapes, safetensors_files.configs(path), source, num_heads)


def recognise(
  shapes: family_lib.Shapes,
  configs: family_lib.Configs,
  source: str,
  num_heads: int | None = None,
) -> found_lib.Found:
  """Find out which ViT has tensors of these names and shapes; see `inspect`.

  Args:
    shapes: name -> shape.
    configs: file name -> content of the JSON files beside the weights.
    source: name of the file in errors.
    num_heads: if nothing else tells it.
  """
  family, prefix = _find_family(shapes, source)
  own = {
    name.removeprefix(prefix): shape
    for name, shape in shapes.items()
    if name.startswith(prefix)
  }
  with files.explain_damage(f"what {', '.join(configs)} of {source} says"):
    settings = family.settings(own, configs, source)
  depth = _depth(family, own)
  tensors, taken = {}, set()
  for name, leaves in family_lib.tensors(family, prefix, depth):
    if name in shapes and not taken.intersection(leaves):
      tensors[name] = leaves
      taken.update(leaves)
  match = _Match(family, prefix, shapes, tensors, source)
  config = _make_config(match, settings, depth, num_heads)
  size = settings.image_size
  if size is not None:
    size = positions_lib.as_pair(size, f"{source}: image_size")
  by_leaves = {leaves: shapes[name] for name, leaves in tensors.items()}
  positions = by_leaves.get(("pos_embedding",), (0, 0))
  return found_lib.Found(
    config=config,
    shapes={name: shapes[name] for name in tensors},
    check=functools.partial(_check, match),
    convert=functools.partial(_convert, match, settings.interleaved),
    position_rows=math.prod(positions[:-1]),
    find_positions=functools.partial(_find_positions, config, size),
    resize=functools.partial(
      positions_lib.resize_bicubic, antialias=settings.antialias
    ),
    value_range=settings.value_range,
    image_size=size if config.posemb == "rope" else None,
    assumed=settings.assumed,
    layout=family.layout,
  )


def _make_config(
  match: _Match,
  settings: family_lib.Settings,
  depth: int,
  num_heads: int | None,
) -> vit_config.ViTConfig:
  """Put together what tensors and settings tell; see `inspect`."""
  seen, source = _sizes(match, depth), match.source
  if not (depth and seen["width"] and seen["mlp_dim"]):
    raise UserError(
      f"{source} has the names of {match.family.name}, but no patch embedding"
      " (width, 3, height, width) or no blocks: take an undamaged file."
    )
  _check_settings(settings, seen, source)
  heads = settings.fields.get("num_heads", num_heads)
  if heads is None:
    raise UserError(
      f"Nothing in or beside {source} tells its number of attention heads:"
      " give num_heads (--config.num_heads), or put the config of its library"
      " beside it (config.json, open_clip_config.json)."
    )
  if type(heads) is not int or heads < 1 or seen["width"] % heads:
    raise UserError(
      f"{source} has width {seen['width']}, which {heads!r} attention heads do"
      " not divide."
    )
  fields = {**settings.fields, **seen, "num_heads": heads}
  if "pool_type" not in fields:
    fields["pool_type"] = "tok" if seen["class_token"] else "gap"
    if (f"{family_lib.MAP}/probe",) in match.tensors.values():
      fields["pool_type"] = "map"
  if fields.get("posemb") == "rope" and (seen["width"] // heads) % 4:
    raise UserError(
      f"{source} has attention heads of {seen['width'] // heads} numbers, which"
      " rotary positions cannot divide by 4."
    )
  return vit_config.ViTConfig(**fields, image_size=seen["patch_size"])


def _find_positions(
  config: vit_config.ViTConfig,
  size: positions_lib.Pair | None,
  rows: int,
  image_size: positions_lib.Pair | None,
  trained_size: positions_lib.Pair | None,
) -> tuple[int, positions_lib.Pair]:
  """Number of rows before those of patches, and the grid of the patches.

  Libraries differ in which of the tokens before the patches have positions: the
  grid decides, if it is known, and else which number leaves a square. The size
  in a config does not count if no grid of it fits: it may be that of another
  training.
  """
  wanted, trained, said = (
    positions_lib.to_grid(size, config.patch_size) if size else None
    for size in (image_size, trained_size, size)
  )
  some = config.has_class_token, config.num_prefix_tokens, 0
  firsts = [first for first in dict.fromkeys(map(int, some)) if first < rows]
  if not trained and said and rows - math.prod(said) in firsts:
    trained = said
  told = trained or wanted
  fitting = [n for n in firsts if told and math.prod(told) == rows - n]
  square = [n for n in firsts if math.isqrt(rows - n) ** 2 == rows - n]
  first = (fitting + square + firsts)[0]
  grid = positions_lib.find_grid(
    rows - first, config.patch_size, wanted, trained
  )
  return first, grid


def _check(match: _Match, config: vit_config.ViTConfig) -> None:
  """Compare a file with a model, tensor by tensor.

  Args:
    match: the file.
    config: the model; its image size does not matter.

  Raises:
    UserError: with all missing, unused and misshapen tensors.
  """
  if config.pool_type == "tok" and not config.has_class_token:
    raise UserError(
      f"{match.source} has no class token to pool by: set pool_type to gap (the"
      " mean over patches) or 0 (the first patch)."
    )
  expected = architecture.leaf_shapes(config, stacked=False)
  scales = {
    leaf: (config.width,)
    for leaves in match.tensors.values()
    for leaf in leaves
    if leaf.endswith(f"/{family_lib.SCALE}")
  }
  names = {}  # Leaf -> tensors that may hold it, the first being the usual one.
  for name, leaves in family_lib.tensors(
    match.family, match.prefix, config.depth
  ):
    for leaf in leaves:
      names.setdefault(leaf, name)
  held = {leaf for leaves in match.tensors.values() for leaf in leaves}
  lacking = {
    names.get(leaf, leaf)
    for leaf in expected.keys() - held - _zeros(match, expected).keys()
  }
  missing = [f"missing: {name}" for name in sorted(lacking)]
  unused = [
    f"unused: {name} {tuple(match.shapes[name])}"
    for name in sorted(match.shapes.keys() - match.tensors)
    if not _is_left_out(match, name)
  ]
  misshapen = []
  for name, leaves in match.tensors.items():
    shape = tuple(match.shapes[name])
    if not (expected | scales).keys() >= set(leaves):
      # Registers may be none, but have a tensor.
      if not leaves[0].startswith(family_lib.MAP) and math.prod(shape):
        unused.append(f"unused: {name} {shape}")
    elif problem := _problem(leaves, shape, expected | scales):
      misshapen.append(f"wrong shape: {name} is {shape}, expected {problem}")
  architecture.raise_misfit(
    f"{match.source} does not fit {match.family.name}",
    config,
    ("Tensors", missing, unused, misshapen),
  )


def _convert(
  match: _Match,
  interleaved: bool,
  config: vit_config.ViTConfig,
  arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Convert tensors to leaves, one sub-tree per block.

  Args:
    match: the file.
    interleaved: see `Settings`.
    config: the model, checked.
    arrays: name -> float32, of all in `match.tensors`.
  """
  expected = architecture.leaf_shapes(config, stacked=False)
  leaves = {
    leaf: np.zeros(shape, np.float32)
    for leaf, shape in _zeros(match, expected).items()
  }
  for name, held in match.tensors.items():
    for leaf, part in zip(held, np.split(arrays[name], len(held))):
      if leaf == "pos_embedding":
        leaves[leaf] = part.reshape(1, -1, config.width)
      elif leaf in expected or leaf.endswith(f"/{family_lib.SCALE}"):
        shape = expected.get(leaf, (config.width,))
        leaves[leaf] = family_lib.to_leaf(leaf, part, shape)
  leaves = family_lib.fold_layer_scale(leaves)
  if interleaved:
    leaves = family_lib.separate_pairs(leaves, config.head_dim)
  return leaves


def _find_family(
  shapes: family_lib.Shapes, source: str
) -> tuple[family_lib.Family, str]:
  """Return the family of a file, and the prefix of its ViT's names."""
  _refuse(_RELATED, shapes, source)
  for family in FAMILIES:
    for name, shape in shapes.items():
      prefix = name.removesuffix(family.patches)
      if prefix == name or prefix[-1:] not in ("", "."):
        continue
      if len(shape) == 2:
        raise UserError(
          f"{source} is a NaFlex ViT (variable grids), not a plain ViT."
        )
      own = {n.removeprefix(prefix): s for n, s in shapes.items()}
      if family.fits(own):
        return family, prefix
  _refuse(_OTHERS, shapes, source)
  some = ", ".join(sorted(shapes)[:4])
  kinds = dict.fromkeys(family.name for family in FAMILIES)
  raise UserError(
    f"{source} holds none of {', '.join(kinds)}; found tensors such as"
    f" {some or 'none'}."
  )


def _refuse(
  kinds: Mapping[str, str], shapes: family_lib.Shapes, source: str
) -> None:
  for pattern, kind in kinds.items():
    if any(re.fullmatch(pattern, name) for name in shapes):
      raise UserError(f"{source} is {kind}, not a plain ViT.")


def _depth(family: family_lib.Family, own: family_lib.Shapes) -> int:
  """Number of blocks; 0 if they are not numbered from 0 on."""
  pattern = re.compile(re.escape(family.blocks) + r"([0-9]{1,4})\.")
  numbers = {int(m[1]) for name in own if (m := pattern.match(name))}
  depth = max(numbers, default=-1) + 1
  return depth if depth <= len(own) else 0


def _sizes(match: _Match, depth: int) -> dict[str, Any]:
  """Sizes of `ViTConfig` that the shapes of tensors show; 0 if they do not."""
  held = {
    leaf: match.shapes[name]
    for name, leaves in match.tensors.items()
    for leaf in leaves
  }
  patches = held.get("embedding/kernel", ())
  has_patches = len(patches) == 4 and all(patches)
  second = f"/{family_lib.DENSE_1}/kernel"
  second = [s for n, s in held.items() if n.endswith(second) and len(s) == 2]
  registers, head = held.get("registers", (0, 0)), held.get("head/kernel", ())
  return {
    "width": patches[0] if has_patches else 0,
    "depth": depth,
    "mlp_dim": second[0][1] if second else 0,
    "patch_size": tuple(patches[2:]) if has_patches else (0, 0),
    "registers": registers[-2] if len(registers) > 1 else 0,
    "class_token": "cls" in held,
    "pre_norm": "pre_norm/scale" in held,
    "num_classes": head[0] if len(head) == 2 else None,
  }


def _check_settings(
  settings: family_lib.Settings, seen: Mapping[str, Any], source: str
) -> None:
  """Compare what a config says with the tensors, and its types."""
  pair = lambda x: tuple(x) if isinstance(x, (list, tuple)) else (x, x)
  for field in ("layer_norm_epsilon", "rope_theta"):
    value = settings.fields.get(field, 1.0)
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise UserError(
        f"The config of {source} says {field} {value!r}; expected a positive"
        " number."
      )
  wrong = []
  for field in ("width", "depth", "mlp_dim", "registers", "patch_size"):
    said = settings.fields.get(field, seen[field])
    said = pair(said) if field == "patch_size" else said
    if said != seen[field]:
      wrong.append(f"{field} {said} where its tensors have {seen[field]}")
  if wrong:
    raise UserError(
      f"The config beside {source} is of another model: it says"
      f" {', '.join(wrong)}. Put the config of these weights there."
    )


def _zeros(
  match: _Match, expected: family_lib.Shapes
) -> dict[str, tuple[int, ...]]:
  """Leaves, with their shapes, that are zeros as the file lacks them.

  That is biases which the family may lack, in all blocks.
  """
  held = {leaf for leaves in match.tensors.values() for leaf in leaves}
  kind = lambda leaf: re.sub(f"^{family_lib.BLOCK}[0-9]+", "", leaf)
  kinds = set(map(kind, held))
  return {
    leaf: shape
    for leaf, shape in expected.items()
    if kind(leaf) not in kinds and re.fullmatch(match.family.optional, leaf)
  }


def _is_left_out(match: _Match, name: str) -> bool:
  relative = name.removeprefix(match.prefix)
  return any(
    re.fullmatch(pattern[1:], name)
    if pattern.startswith("/")
    else name.startswith(match.prefix) and re.fullmatch(pattern, relative)
    for pattern in match.family.left_out
  )


def _problem(
  leaves: tuple[str, ...], shape: tuple[int, ...], expected: family_lib.Shapes
) -> str | None:
  """Return the shape that a tensor should have, if it has another."""
  if leaves[0] in family_lib.TOKENS:
    count, width = expected[leaves[0]][1:]
    rows, free = math.prod(shape[:-1]), leaves[0] == "pos_embedding"
    fits = shape[-1:] == (width,) and (rows == count or (free and rows))
    return None if fits else f"({'N' if free else count}, {width})"
  wanted = [family_lib.tensor_shape(leaf, expected[leaf]) for leaf in leaves]
  total = (sum(each[0] for each in wanted), *wanted[0][1:])
  return None if shape == total else str(total)
