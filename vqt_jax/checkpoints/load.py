"""`load_backbone`: from a name, path or address to a frozen ViT."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib

import jax
import numpy as np

from vqt_jax.checkpoints import architecture
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import download
from vqt_jax.checkpoints import names
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.checkpoints import public
from vqt_jax.errors import UserError
from vqt_jax.errors import check_keywords
from vqt_jax.models import vit_config
from vqt_jax.models.backbone import VALUE_RANGES
from vqt_jax.models.backbone import Backbone
from vqt_jax.runtime import files

_CHOICES = {
  "value_range": tuple(VALUE_RANGES),
  "pool_type": ("tok", "gap", "map", "0", "mae"),
  "gelu": ("tanh", "exact"),
  "dtype": ("float32", "bfloat16", "float16"),
}


@check_keywords
def load_backbone(
  source: str | os.PathLike[str],
  *,
  variant: str | None = None,
  image_size: int | Sequence[int] | None = None,
  value_range: str | None = None,
  pool_type: str | None = None,
  gelu: str | None = None,
  dtype: str = "float32",
  cache_dir: str | os.PathLike[str] | None = None,
  trained_size: int | Sequence[int] | None = None,
  progress: download.Progress | None = None,
) -> Backbone:
  """Loads a Vision Transformer of Big Vision or vision_transformer.

  Width, depth, heads, MLP, patch, pooling, positions, representation layer and
  head are read from the file. Nothing is ever unpickled.

  Args:
    source: path of an npz file or of a tensorstore folder (`checkpoint.bv`
      means its last step), an https:// or gs:// address of one, or a name in
      `PUBLIC`. `PLACE:img` takes the sub-tree `img` of what is there.
    variant: Big Vision's name, e.g. "B/16" or "B"; only checked.
    image_size: side, or (height, width), of the images it is to run on, pixels;
      the positions are resized to fit. Default: what it was trained on.
    value_range: key of `VALUE_RANGES`, how its inputs are scaled. Default: as
      published, "-1..1" for files.
    pool_type: "tok", "gap", "map", "0" or "mae", as in `vit.ViTConfig`.
      Default: as published, or what the leaves serve.
    gelu: "tanh" or "exact". Default: as published, "tanh" for files.
    dtype: of the matrix products; the parameters stay float32.
    cache_dir: where downloads are kept. Default: $VQT_JAX_CACHE, or
      ~/.cache/vqt_jax.
    trained_size: side, or (height, width), of the images it was trained on,
      pixels; needed only if its positions lie on no square grid and
      `image_size` is another size.
    progress: called with (bytes so far, bytes in all or None) of a download.

  Returns:
    The backbone; its parameters are float32 NumPy arrays.

  Raises:
    UserError: there is no such checkpoint, it is damaged or no plain ViT, it is
      not of this variant, leaves are missing, unused or of another shape, or
      one holds NaN or infinity; or an argument makes no sense.
  """
  name = _name(source)
  known = _published(name)
  given = {"value_range": value_range, "pool_type": pool_type, "gelu": gelu}
  given = {
    field: value or getattr(known, field, "") for field, value in given.items()
  }
  _check_choices({**given, "dtype": dtype})
  image_size = _as_pair(image_size, "image_size")
  trained_size = _as_pair(trained_size, "trained_size")
  if known:
    _check_published(name, known, variant)
    variant = variant or known.variant
    trained_size = trained_size or positions_lib.as_pair(known.image_size)
  image_size = image_size or trained_size

  place, subtree = containers.split_subtree(known.address if known else name)
  path = _local_path(place, cache_dir, progress)
  leaves, stored = _read(path, subtree, name)
  config = _infer_config(leaves, stored, variant, name)
  config = dataclasses.replace(
    config,
    pool_type=given["pool_type"] or config.pool_type,
    gelu=given["gelu"] or config.gelu,
    dtype=dtype,
  )
  architecture.check_leaves(_shapes(leaves), stored, config, name)
  architecture.check_finite(
    {stored[n]: leaf for n, leaf in leaves.items()}, name
  )
  if config.posemb == "learn":
    leaves, trained_size = _fit_positions(
      leaves, stored, config, image_size, trained_size
    )
    image_size = image_size or trained_size
  elif not image_size:
    raise UserError(
      f"{name} has no position embedding, so its positions are computed for"
      " the image size; pass image_size."
    )
  positions_lib.to_grid(image_size, config.patch_size)
  return Backbone(
    config=dataclasses.replace(config, image_size=image_size),
    params=names.nest(names.stack_blocks(leaves)),
    value_range=given["value_range"] or "-1..1",
    source=name,
    trained_size=trained_size if config.posemb == "learn" else None,
    assumed=tuple(f for f in ("value_range", "gelu") if not given[f]),
  )


def read_config(
  source: str | os.PathLike[str],
  *,
  image_size: int | Sequence[int],
  variant: str = "",
  pool_type: str = "",
  gelu: str = "",
  dtype: str = "float32",
  trained_size: int | Sequence[int] | None = None,
) -> vit_config.ViTConfig:
  """The architecture that `load_backbone` would find, without any weights.

  Told by the header of a file, by a public name, or by the variant alone. A
  pre-trained head is known from a header only.

  Raises:
    UserError: as `load_backbone`, or nothing tells the architecture.
  """
  name = _name(source)
  image_size = positions_lib.as_pair(image_size)
  known = _published(name)
  if known:
    _check_published(name, known, variant)
  place, subtree = containers.split_subtree(known.address if known else name)
  path = None
  if "://" not in place:
    path = containers.find(files.path(place))
  if path:
    shapes = containers.leaf_shapes(path)
    picked = names.select(shapes, subtree, name)
    stored = {new: picked[old] for new, old in names.rename(picked).items()}
    leaves = {
      new: jax.ShapeDtypeStruct(shapes[old], np.float32)
      for new, old in stored.items()
    }
    config = _infer_config(leaves, stored, variant, name)
    positions = leaves.get("pos_embedding")
    if positions and len(positions.shape) == 3:
      _find_positions(
        positions.shape[1],
        stored,
        config.patch_size,
        image_size,
        _as_pair(trained_size, "trained_size"),
      )
  elif known or variant:
    variant = known.variant if known else variant
    sizes = architecture.decode_variant(variant)
    if "patch_size" not in sizes:
      raise UserError(
        f"variant {variant!r}: expected a patch as well, e.g. {variant}/16."
      )
    config = vit_config.ViTConfig(**sizes, image_size=sizes["patch_size"])
  elif "://" in place:
    raise UserError(
      f"{name} is not here, so its architecture is not known. Give its"
      " variant, e.g. variant=B/16."
    )
  else:
    _local_path(place, None, None)  # Says so.
  return dataclasses.replace(
    config,
    image_size=image_size,
    pool_type=pool_type or (known.pool_type if known else config.pool_type),
    gelu=gelu or (known.gelu if known else config.gelu),
    dtype=dtype,
  )


def _name(source: str | os.PathLike[str]) -> str:
  if isinstance(source, (str, os.PathLike)):
    return os.fspath(source)
  raise UserError(
    f"source must be a path, an address or a public name, not {source!r}."
  )


def _as_pair(
  size: int | Sequence[int] | None, name: str
) -> tuple[int, int] | None:
  return None if size is None else positions_lib.as_pair(size, name)


def _published(name: str) -> public.PublicViT | None:
  """The public checkpoint of a name; what exists as a file is no name."""
  if "://" in name or containers.find(files.path(name)):
    return None
  key = public.find(name)
  return public.PUBLIC[key] if key else None


def _check_choices(settings: Mapping[str, str | None]) -> None:
  for field, value in settings.items():
    if value and value not in _CHOICES[field]:
      raise UserError(
        f"{field} must be one of {', '.join(_CHOICES[field])}, not {value!r}."
      )


def _check_published(
  name: str, known: public.PublicViT, variant: str | None
) -> None:
  """Refuses, before any download, what cannot come out well."""
  if known.refused:
    raise UserError(f"{name} is {known.refused}; choose another checkpoint.")
  if variant:
    sizes = architecture.decode_variant(known.variant)
    architecture.check_variant(sizes, variant, name)


def _local_path(
  place: str,
  cache_dir: str | os.PathLike[str] | None,
  progress: download.Progress | None,
) -> pathlib.Path:
  if "://" in place:
    return download.fetch(place, cache_dir, progress)
  if path := containers.find(files.path(place)):
    return path
  close = public.nearest(place)
  raise UserError(
    f"{place} is neither a file or folder nor the name of a public"
    " checkpoint."
    + (f" Did you mean {' or '.join(close)}?" if close else " Check the path.")
  )


def _read(
  path: pathlib.Path, subtree: str, source: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads the leaves of one model.

  Returns:
    Present-day name -> float32 array, and -> name in the file.
  """
  picked = names.select(containers.leaf_names(path), subtree, source)
  if reason := architecture.foreign(picked):
    raise UserError(f"{source} is no plain ViT but {reason}.")
  stored = {new: picked[old] for new, old in names.rename(picked).items()}
  arrays = containers.read_leaves(path, stored.values())
  leaves = {name: names.as_float32(arrays[old]) for name, old in stored.items()}
  wrong = [stored[name] for name, leaf in leaves.items() if leaf is None]
  if wrong:
    some = ", ".join(f"{name} ({arrays[name].dtype})" for name in wrong[:3])
    raise UserError(
      f"{source} is no ViT: {len(wrong)} of its leaves hold no floating-point"
      f" numbers, such as {some}."
    )
  return leaves, stored


def _infer_config(
  leaves: Mapping[str, np.ndarray],
  stored: Mapping[str, str],
  variant: str | None,
  source: str,
) -> vit_config.ViTConfig:
  """The architecture that a file tells; its image size is one patch."""
  shapes = _shapes(leaves)
  if reason := architecture.foreign_shapes(shapes):
    raise UserError(f"{source} is no plain ViT but {reason}.")
  sizes = architecture.architecture(shapes)
  if sizes is None:
    some = ", ".join(sorted(stored.values())[:4])
    raise UserError(
      f"{source} is no ViT checkpoint: expected leaves such as"
      f" embedding/kernel and Transformer/encoderblock_0/..., found {some}"
      f"{', ...' if len(stored) > 4 else ''}."
    )
  if variant:
    architecture.check_variant(sizes, variant, source)
  learned = "pos_embedding" in leaves or names.is_pre_linen(stored.values())
  if not learned and sizes["width"] % 4:
    raise UserError(
      f"{source} has no position embedding, and its width {sizes['width']} is"
      " not a multiple of 4, as computed (sincos2d) positions need."
    )
  sizes["patch_size"] = sizes["patch_size"] or (1, 1)  # It will be missed.
  return vit_config.ViTConfig(
    **sizes,
    image_size=sizes["patch_size"],
    pool_type=architecture.pooling(shapes),
    posemb="learn" if learned else "sincos2d",
  )


def _fit_positions(
  leaves: dict[str, np.ndarray],
  stored: Mapping[str, str],
  config: vit_config.ViTConfig,
  image_size: positions_lib.Pair | None,
  trained_size: positions_lib.Pair | None,
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
  """Folds a class row into the class token and resizes the rest.

  Returns:
    The leaves, and the image size (height, width) that they were trained on.
  """
  table, leaves = leaves["pos_embedding"], dict(leaves)
  patch = config.patch_size
  first, old = _find_positions(
    table.shape[1], stored, patch, image_size, trained_size
  )
  if first and "cls" in leaves:
    leaves["cls"] = leaves["cls"] + table[:, :1]
  new = positions_lib.to_grid(image_size, patch) if image_size else old
  leaves["pos_embedding"] = positions_lib.resize_positions(
    table[:, first:], old, new
  )
  return leaves, (old[0] * patch[0], old[1] * patch[1])


def _find_positions(
  rows: int,
  stored: Mapping[str, str],
  patch_size: positions_lib.Pair,
  image_size: positions_lib.Pair | None,
  trained_size: positions_lib.Pair | None,
) -> tuple[int, positions_lib.Pair]:
  """Number of rows of the class token (0 or 1), and the grid of the others."""
  wanted, trained = (
    positions_lib.to_grid(size, patch_size) if size else None
    for size in (image_size, trained_size)
  )
  first = positions_lib.has_class_row(
    rows, stored["pos_embedding"], "cls" in stored, trained or wanted
  )
  return int(first), positions_lib.find_grid(
    rows - first, patch_size, wanted, trained
  )


def _shapes(leaves: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
  return {name: leaf.shape for name, leaf in leaves.items()}
