"""`load_backbone`: from a name, path or address to a frozen ViT."""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib

import numpy as np

from vqt_jax.checkpoints import architecture
from vqt_jax.checkpoints import big_vision
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import download
from vqt_jax.checkpoints import families
from vqt_jax.checkpoints import found as found_lib
from vqt_jax.checkpoints import hub
from vqt_jax.checkpoints import names
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.checkpoints import public
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.errors import UserError
from vqt_jax.errors import check_keywords
from vqt_jax.models import scaling
from vqt_jax.models import vit_config
from vqt_jax.models.backbone import Backbone
from vqt_jax.runtime import files
from vqt_jax.runtime import memory
from vqt_jax.runtime import units

_CHOICES = {
  "pool_type": ("tok", "gap", "map", "0", "mae"),
  "gelu": ("tanh", "exact", "quick"),
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
  num_heads: int | None = None,
  progress: download.Progress | None = None,
) -> Backbone:
  """Load a Vision Transformer.

  It is of Big Vision or vision_transformer, or of transformers, timm or
  OpenCLIP (`families.FAMILIES`). Width, depth, MLP, patch, pooling, positions,
  representation layer and head are read from the file. Nothing is ever
  unpickled.

  Args:
    source: path of an npz file, a file of safetensors, a folder that holds one
      (or several and their index), or a tensorstore folder (`checkpoint.bv`
      means its last step); an https:// or gs:// address of a file or
      tensorstore folder; a model of the Hugging Face hub,
      hf://OWNER/NAME[@REVISION], also without hf:// if no such path exists; or
      a name in `PUBLIC`. `PLACE:img` takes the sub-tree `img` of what is there.
    variant: Big Vision's name, e.g. "B/16" or "B"; only checked.
    image_size: side, or (height, width), of the images it is to run on, pixels;
      the positions are resized to fit. Default: what it was trained on.
    value_range: how its inputs are scaled, see `scaling.find_scaling`.
      Default: as published, "-1..1" for Big Vision's files.
    pool_type: "tok", "gap", "map", "0" or "mae", as in `vit.ViTConfig`.
      Default: as published, or what the leaves serve.
    gelu: "tanh", "exact" or "quick". Default: as published, "tanh" for Big
      Vision's files.
    dtype: of the matrix products; the parameters stay float32.
    cache_dir: where downloads are kept. Default: $VQT_JAX_CACHE, or
      ~/.cache/vqt_jax; for models of the hub, its own cache.
    trained_size: side, or (height, width), of the images it was trained on,
      pixels; needed only if its positions do not form a square and
      `image_size` is another size.
    num_heads: of the attention; needed only if neither the file nor a config
      beside it tells it.
    progress: called with (bytes so far, bytes in all or None) of a download.

  Returns:
    The backbone; its parameters are float32 NumPy arrays.

  Raises:
    UserError: there is no such checkpoint, it is damaged or not a ViT that is
      known, it is not of this variant, leaves are missing, unused or of another
      shape, or one holds NaN or infinity; or an argument makes no sense.
  """
  name, known, place, subtree = _parse_source(source, variant)
  given = {"value_range": value_range, "pool_type": pool_type, "gelu": gelu}
  given = {
    field: value or getattr(known, field, "") for field, value in given.items()
  }
  _check_choices(pool_type=pool_type, gelu=gelu, dtype=dtype)
  if value_range:
    scaling.find_scaling(value_range)
  image_size = _as_pair(image_size, "image_size")
  trained_size = _as_pair(trained_size, "trained_size")
  if known:
    variant = variant or known.variant
    trained_size = trained_size or positions_lib.as_pair(known.image_size)
  path = _fetch(place, name, cache_dir, progress)
  found = _inspect(path, subtree, variant, name, num_heads)
  image_size = image_size or trained_size or found.image_size
  config = dataclasses.replace(
    found.config,
    pool_type=given["pool_type"] or found.config.pool_type,
    gelu=given["gelu"] or found.config.gelu,
    dtype=dtype,
  )
  found.check(config)
  leaves = found.convert(config, _read(path, found, name))
  if config.posemb == "learn":
    leaves, trained_size = _fit_positions(
      leaves, found, config, image_size, trained_size
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
    value_range=given["value_range"] or found.value_range,
    source=name,
    trained_size=trained_size if config.posemb == "learn" else None,
    assumed=tuple(f for f in found.assumed if not given[f]),
    revision=path.parent.name if hub.is_address(place) else "",
    layout=found.layout,
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
  num_heads: int | None = None,
) -> vit_config.ViTConfig:
  """Return the architecture that `load_backbone` would find, without weights.

  It is read from the header of a file, or known from a public name or from the
  variant alone. A pre-trained head is known from a header only.

  Raises:
    UserError: as `load_backbone`, or nothing tells the architecture.
  """
  name, known, place, subtree = _parse_source(source, variant)
  image_size = positions_lib.as_pair(image_size)
  path = None
  if hub.is_address(place):
    path = _fetch(place, name)
  elif "://" not in place:
    path = containers.find(files.path(place))
  if path:
    found = _inspect(path, subtree, variant, name, num_heads)
    config = found.config
    if found.position_rows:
      trained_size = _as_pair(trained_size, "trained_size")
      found.find_positions(found.position_rows, image_size, trained_size)
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
    raise _not_found(place)
  return dataclasses.replace(
    config,
    image_size=image_size,
    pool_type=pool_type or (known.pool_type if known else config.pool_type),
    gelu=gelu or (known.gelu if known else config.gelu),
    dtype=dtype,
  )


def _parse_source(
  source: str | os.PathLike[str], variant: str | None
) -> tuple[str, public.PublicViT | None, str, str]:
  """Look up a source, and refuse before any download what cannot be loaded.

  Returns:
    Its name; the public checkpoint that it names, if it is not a file; path or
    address; sub-tree in what is there.
  """
  if not isinstance(source, (str, os.PathLike)):
    raise UserError(
      f"source must be a path, an address or a public name, not {source!r}."
    )
  source, known, scheme = os.fspath(source), None, ""
  if "://" not in source and not containers.find(files.path(source)):
    known = public.PUBLIC.get(public.find_name(source))
    bare, _ = containers.split_subtree(source)
    if not known and hub.is_name(bare) and not os.path.exists(bare):
      scheme = "hf://"
  name = download.without_secrets(source)
  if known and known.refused:
    raise UserError(f"{name} is {known.refused}; choose another checkpoint.")
  if known and variant:
    sizes = architecture.decode_variant(known.variant)
    architecture.check_variant(sizes, variant, name)
  place, subtree = containers.split_subtree(known.address if known else source)
  return name, known, scheme + place, subtree


def _fetch(
  place: str,
  name: str,
  cache_dir: str | os.PathLike[str] | None = None,
  progress: download.Progress | None = None,
) -> pathlib.Path:
  """Return the local file or folder of a source; download it if need be.

  Raises:
    UserError: there is none, or it cannot be fetched.
  """
  if hub.is_address(place):
    try:
      return hub.fetch(place, cache_dir, progress)
    except hub.NotFetched as error:
      if "://" in name:
        raise
      raise UserError(f"{_not_found(name)} {error}") from error
  if "://" in place:
    return containers.find(download.fetch(place, cache_dir, progress))
  if not (path := containers.find(files.path(place))):
    raise _not_found(place)
  return path


def _as_pair(
  size: int | Sequence[int] | None, name: str
) -> tuple[int, int] | None:
  return None if size is None else positions_lib.as_pair(size, name)


def _check_choices(**settings: str | None) -> None:
  for field, value in settings.items():
    if value and value not in _CHOICES[field]:
      raise UserError(
        f"{field} must be one of {', '.join(_CHOICES[field])}, not {value!r}."
      )


def _not_found(place: str) -> UserError:
  close = public.nearest_names(place)
  return UserError(
    f"{place} is neither a file or folder nor the name of a public"
    " checkpoint."
    + (f" Did you mean {' or '.join(close)}?" if close else " Check the path.")
  )


def _inspect(
  path: pathlib.Path,
  subtree: str,
  variant: str | None,
  source: str,
  num_heads: int | None,
) -> found_lib.Found:
  """Find out which ViT a file holds, from names and shapes.

  Args:
    path: as `containers.find` returns it.
    subtree: "", or place of the model in the file.
    variant: that it should be, or None.
    source: name of the file in errors.
    num_heads: that it should have, or None.
  """
  if path.is_dir() or not safetensors_files.is_one(path):
    found = big_vision.inspect(path, subtree, variant, source)
  elif subtree:
    raise UserError(
      f"{source}: only Big Vision's files have sub-trees; leave out :{subtree},"
      " the image tower of safetensors is found by itself."
    )
  else:
    found = families.inspect(path, source, num_heads)
    if variant:
      sizes = dataclasses.asdict(found.config)
      architecture.check_variant(sizes, variant, source)
  heads = found.config.num_heads
  if num_heads not in (None, heads):
    raise UserError(
      f"{source} has {heads} attention heads, not num_heads={num_heads}."
    )
  return found


def _read(
  path: pathlib.Path, found: found_lib.Found, source: str
) -> dict[str, np.ndarray]:
  """Read arrays as float32, by their names in the file."""
  needed = 4 * sum(map(math.prod, found.shapes.values()))
  if needed > memory.host_memory():
    raise UserError(
      f"{source} holds {units.format_bytes(needed)} of weights, more than this"
      " machine has memory."
    )
  stored = containers.read_leaves(path, found.shapes)
  architecture.check_floats(stored, source)
  arrays = {name: names.as_float32(array) for name, array in stored.items()}
  architecture.check_finite(arrays, source)
  return arrays


def _fit_positions(
  leaves: dict[str, np.ndarray],
  found: found_lib.Found,
  config: vit_config.ViTConfig,
  image_size: positions_lib.Pair | None,
  trained_size: positions_lib.Pair | None,
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
  """Add the positions of class token and registers, and resize the others.

  Returns:
    The leaves, and the image size (height, width) that they were trained on.
  """
  table, leaves = leaves["pos_embedding"], dict(leaves)
  patch = config.patch_size
  first, old = found.find_positions(table.shape[1], image_size, trained_size)
  start = 0
  for name in ("cls", "registers"):
    if name in leaves and first > start:
      end = start + leaves[name].shape[1]
      leaves[name] = leaves[name] + table[:, start:end]
      start = end
  new = positions_lib.to_grid(image_size, patch) if image_size else old
  leaves["pos_embedding"] = found.resize(table[:, first:], old, new)
  return leaves, (old[0] * patch[0], old[1] * patch[1])
