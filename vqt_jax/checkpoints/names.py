"""Conversion of all generations of Big Vision's parameter names to the present.

Here blocks are stacked over depth under `Transformer/encoderblock`, and
positions have no row for the class token. The letters A to J in the comments
are the generations, oldest first:

  A  vision_transformer before Linen: one counter over all classes of a block
  B  today's names
  C  positions under `Transformer/posembed_input`, class row first
  D  positions under `Transformer`
  E  positions at the top, class row first (see positions.py)
  F  positions at the top, grid rows only
  G  attention-pooling head inlined at the top
  H  attention-pooling head in `MAPHead_0`
  I  one sub-tree per block
  J  blocks stacked over depth

All functions work on flat dicts or lists of names joined with "/".
"""

from collections.abc import Iterable, Mapping
import re
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vqt_jax.errors import UserError

STACKED = "Transformer/encoderblock/"
_BLOCK = re.compile(r"Transformer/encoderblock_([0-9]{1,6})/(.+)")
_PRE_LINEN = {
  "LayerNorm_2": "LayerNorm_1",
  "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
  "MlpBlock_3": "MlpBlock_0",
}
_POSITIONS = (
  "Transformer/posembed_input/pos_embedding",
  "Transformer/pos_embedding",
)
_MAP_HEAD = (
  "probe",
  "LayerNorm_0",
  "MlpBlock_0",
  "MultiHeadDotProductAttention_0",
)


def select_model(
  names: Iterable[str], subtree: str, source: str
) -> dict[str, str]:
  """Select the parameters of one model in a whole checkpoint.

  Args:
    names: all names, e.g. `params/img/cls`, those of the optimiser included.
    subtree: "", or place of the model in the parameters, e.g. "img".
    source: name of the file in errors.

  Returns:
    Name relative to the model -> name in the checkpoint.

  Raises:
    UserError: there is no such subtree.
  """
  names = list(names)
  prefixes = ("params/", "opt/target/")
  found = (p for p in prefixes if any(n.startswith(p) for n in names))
  prefix = next(found, "")
  root = prefix + (subtree.strip("/") + "/" if subtree else "")
  picked = {n.removeprefix(root): n for n in names if n.startswith(root)}
  if not picked:
    inside = (n.removeprefix(prefix) for n in names if n.startswith(prefix))
    tops = {name.partition("/")[0] for name in inside}
    raise UserError(
      f"{source} has no parameters under {subtree!r}; at the top it has"
      f" {', '.join(sorted(tops)) or 'nothing'}."
    )
  return picked


def map_to_present(names: Iterable[str]) -> dict[str, str]:
  """Map present-day names of leaves to those of any generation.

  Args:
    names: relative to the model.

  Returns:
    Present name -> given name. A leaf whose present name is taken keeps its old
    one, so that it is reported as unused.
  """
  names = dict.fromkeys(names)
  inlined_map_head = "probe" in names
  renamed = {}
  for name in names:
    new = name
    if match := _BLOCK.fullmatch(name):  # A
      top, _, rest = match[2].partition("/")
      top = _PRE_LINEN.get(top, top)
      new = f"Transformer/encoderblock_{int(match[1])}/{top}/{rest}"
    elif name in _POSITIONS:  # C, D
      new = "pos_embedding"
    elif inlined_map_head and name.split("/")[0] in _MAP_HEAD:  # G
      new = f"MAPHead_0/{name}"
    taken = new != name and (new in names or new in renamed)
    renamed[name if taken else new] = name
  return renamed


def is_pre_linen(names: Iterable[str]) -> bool:
  """Return whether blocks have the oldest names (A)."""
  return any("/MlpBlock_3/" in name for name in names)


def holds_floats(array: np.ndarray) -> bool:
  """Return whether an array holds floats; bfloat16 may be two void bytes."""
  return jnp.issubdtype(array.dtype, np.floating) or array.dtype == "V2"


def as_float32(array: np.ndarray) -> np.ndarray:
  """Convert floats; NumPy reads stored bfloat16 as two bytes ("void")."""
  if array.dtype == "V2":
    array = array.view(ml_dtypes.bfloat16)
  return np.asarray(array, np.float32)


def is_stacked(names: Iterable[str]) -> bool:
  """Return whether blocks are stacked over depth (J), not one by one (I)."""
  return any(name.startswith(STACKED) for name in names)


def split_block(name: str) -> tuple[int | None, str]:
  """Return (block index, name in the block); (None, name) outside blocks."""
  match = _BLOCK.fullmatch(name)
  return (int(match[1]), match[2]) if match else (None, name)


def unstack_names(
  names: Iterable[str], depth: int
) -> dict[str, tuple[str, int | None]]:
  """Map per-block names (I) to those of a stacked tree (J).

  Returns:
    Per-block name -> (stacked name, block index; None outside the blocks).
  """
  unstacked = {}
  for name in names:
    if not name.startswith(STACKED):
      unstacked[name] = (name, None)
      continue
    rest = name.removeprefix(STACKED)
    for i in range(depth):
      unstacked[f"Transformer/encoderblock_{i}/{rest}"] = (name, i)
  return unstacked


def stack_blocks(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stack blocks on a new first axis (I to J); leave stacked ones alone."""
  stacked = {n: a for n, a in leaves.items() if split_block(n)[0] is None}
  blocks: dict[str, dict[int, np.ndarray]] = {}
  for name, array in leaves.items():
    index, rest = split_block(name)
    if index is not None:
      blocks.setdefault(rest, {})[index] = array
  for rest, arrays in blocks.items():
    stacked[STACKED + rest] = np.stack([arrays[i] for i in sorted(arrays)])
  return stacked


def unstack_blocks(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Undo `stack_blocks` (J to I)."""
  depths = {len(a) for n, a in leaves.items() if n.startswith(STACKED)}
  names = unstack_names(leaves, max(depths, default=0))
  return {
    name: leaves[stacked] if index is None else leaves[stacked][index]
    for name, (stacked, index) in names.items()
  }


def flatten(tree: Any) -> dict[str, Any]:
  """Flatten a nested dict; join its keys with "/"."""
  return flax.traverse_util.flatten_dict(tree, sep="/")


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nest a flat dict; sort its keys."""
  return flax.traverse_util.unflatten_dict(
    dict(sorted(leaves.items())), sep="/"
  )
