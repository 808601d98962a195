"""Families of ViTs of other libraries: names and settings, as tables.

A `Family` maps the tensors of a file, in PyTorch's layout, to Big Vision's
leaves. What differs between libraries besides names is a field of `ViTConfig`.
LayerScale (https://arxiv.org/abs/2103.17239) folds into the projection before
it, and biases that a file lacks are zeros.

All functions work on flat dicts. *Leaves* have Big Vision's names joined with
"/", one sub-tree per block; *tensors* have the names in the file.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import dataclasses
import math
import re
from typing import Any

import numpy as np

from vqt_jax.errors import UserError
from vqt_jax.models import backbone
from vqt_jax.models import scaling

Shapes = Mapping[str, tuple[int, ...]]
# File name -> content of the JSON files beside the weights.
Configs = Mapping[str, Mapping[str, Any]]
# Name in the library -> leaves of ours that it holds: a module, whose "weight"
# and "bias" are ours, or a tensor. Several lie one after another in it.
Table = Mapping[str, str | tuple[str, ...]]

BLOCK = "Transformer/encoderblock_"
_ATTENTION = "MultiHeadDotProductAttention_0"
QKV = tuple(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))
QUERY, KEY, VALUE = QKV
OUT = f"{_ATTENTION}/out"
NORM_0, NORM_1 = "LayerNorm_0", "LayerNorm_1"
DENSE_0, GATE, DENSE_1 = (
  f"MlpBlock_0/{name}" for name in ("Dense_0", "gate", "Dense_1")
)
# LayerScale: leaves that exist only until `fold_layer_scale`.
SCALE = "layer_scale"
OUT_SCALE, DENSE_1_SCALE = f"{OUT}/{SCALE}", f"{DENSE_1}/{SCALE}"
MAP = "MAPHead_0"
# Leaves that are a tensor of their own, whatever axes of 1 it has.
TOKENS = ("cls", "registers", "pos_embedding", f"{MAP}/probe")
# Patterns of what models of two towers hold besides the image tower.
OTHER_TOWER = (
  r"/(text|text_model|transformer|token_embedding|ln_final)\..*",
  r"/(text|visual)_projection(\..*)?",
  r"/(positional_embedding|logit_scale|logit_bias|attn_mask)",
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a ViT that its tensors do not show.

  They are from config files, or the defaults of the family.

  Attributes:
    fields: of `ViTConfig`. Sizes among them are compared with the tensors.
    value_range: as of `Backbone`.
    image_size: side, or (height, width), of the images it was trained on,
      pixels, or None.
    assumed: those of "gelu" and "value_range" that nothing tells.
    antialias: the library resizes positions with antialiasing.
    interleaved: numbers that rotary positions rotate together are neighbours,
      in place of half a head apart.
  """

  fields: Mapping[str, Any]
  value_range: str
  image_size: Any = None
  assumed: tuple[str, ...] = ()
  antialias: bool = False
  interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Outline:
  """Names and config files with which a backbone is written.

  Attributes:
    configs: file name -> content of the JSON files beside the weights.
    prefix: of the names of tensors.
    absent: patterns of relative names in the family's tables that such a model
      of the library does not have.
    unused: relative name -> shape of tensors that the library expects though
      nothing that is written here uses them; they are zeros.
    class_position: the class token has a row among the positions.
    bare_tokens: class token and positions have no leading axes of size 1.
    problems: what the library cannot compute, in the words "NAME does not ...".
  """

  configs: Mapping[str, Any]
  prefix: str = ""
  absent: tuple[str, ...] = ()
  unused: Shapes = dataclasses.field(default_factory=dict)
  class_position: bool = False
  bare_tokens: bool = False
  problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
  """ViTs whose files have the same names.

  Attributes:
    name: as messages have it.
    layout: library and kind of model, as `Backbone.layout` has it.
    patches: name of the tensor of the patch embedding; what a file has before
      it, such as "vision_model.", belongs to all names of the ViT.
    top: table of what lies outside of the blocks; "/" precedes whole names.
    blocks: what precedes a block's number, such as "encoder.layer.".
    block: table of what lies in a block.
    settings: (shapes by relative name, configs, source) -> settings.
    fits: (shapes by relative name) -> whether a file is of this family, if it
      has `patches`.
    left_out: patterns of tensors that are rightly not used; "/" precedes
      patterns of whole names.
    optional: pattern of biases that a file may lack.
    outline: (backbone, names of leaves that are zeros in all blocks, without
      those of the blocks before them) -> how it is written; None if a file of
      an image tower alone is of no use to the library.
  """

  name: str
  layout: str
  patches: str
  top: Table
  blocks: str
  block: Table
  settings: Callable[[Shapes, Configs, str], Settings]
  fits: Callable[[Shapes], bool] = lambda shapes: True
  left_out: tuple[str, ...] = ()
  optional: str = ""
  outline: Callable[[backbone.Backbone, Collection[str]], Outline] | None = None


def tensors(
  family: Family, prefix: str, depth: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
  """Yield the names that tensors may have, and the leaves that each holds."""
  for name, leaves in family.top.items():
    name = name[1:] if name.startswith("/") else prefix + name
    yield from _tensors(name, leaves, "")
  for i in range(depth):
    for name, leaves in family.block.items():
      name = f"{prefix}{family.blocks}{i}.{name}"
      yield from _tensors(name, leaves, f"{BLOCK}{i}/")


def _tensors(name, leaves, place):
  leaves = (leaves,) if isinstance(leaves, str) else leaves
  leaves = tuple(place + leaf for leaf in leaves)
  if leaves[0] in TOKENS or re.search(f"/(bias|{SCALE})$", leaves[0]):
    yield name, leaves
    return
  # PyTorch's own attention has `in_proj_weight` in place of a module.
  name += "" if name.endswith("_") else "."
  kind = "scale" if _is_norm(leaves[0]) else "kernel"
  yield f"{name}weight", tuple(f"{leaf}/{kind}" for leaf in leaves)
  yield f"{name}bias", tuple(f"{leaf}/bias" for leaf in leaves)


def _is_norm(module: str) -> bool:
  return "norm" in module.rpartition("/")[2].lower()


def tensor_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in PyTorch's layout of a leaf that has the given shape."""
  if leaf == "embedding/kernel":
    return shape[3], shape[2], shape[0], shape[1]
  if leaf.endswith("/kernel"):
    inputs = math.prod(shape[:-1]) if leaf.endswith("out/kernel") else shape[0]
    return math.prod(shape) // inputs, inputs
  return (math.prod(shape),)


def to_leaf(
  leaf: str, tensor: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Convert a tensor, or the part of one that is this leaf."""
  if leaf == "embedding/kernel":
    return tensor.transpose(2, 3, 1, 0)
  if leaf.endswith("/kernel"):
    return tensor.T.reshape(shape)
  return tensor.reshape(shape)


def to_tensor(leaf: str, array: np.ndarray) -> np.ndarray:
  """Undo `to_leaf`."""
  if leaf == "embedding/kernel":
    return array.transpose(3, 2, 0, 1)
  if leaf.endswith("/kernel"):
    out, inputs = tensor_shape(leaf, array.shape)
    return array.reshape(inputs, out).T
  return array if leaf in TOKENS else array.reshape(-1)


def fold_layer_scale(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Multiply the outputs of projections by the LayerScale behind them."""
  leaves = dict(leaves)
  for name in [n for n in leaves if n.endswith(f"/{SCALE}")]:
    scale, module = leaves.pop(name), name.removesuffix(f"/{SCALE}")
    for kind in ("kernel", "bias"):
      leaves[f"{module}/{kind}"] = leaves[f"{module}/{kind}"] * scale
  return leaves


def separate_pairs(
  leaves: Mapping[str, np.ndarray], head_dim: int
) -> dict[str, np.ndarray]:
  """Move neighbours (0, 1), (2, 3), ... of queries and keys half a head apart.

  Scores are sums over a head, so its order is free.
  """
  order = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)
  moved = re.compile(rf"{BLOCK}.*/(query|key)/(kernel|bias)")
  return {n: x[..., order] if moved.match(n) else x for n, x in leaves.items()}


# HF's and PyTorch's names of activations -> ours.
_ACTIVATIONS = {
  "gelu": "exact",
  "gelu_python": "exact",
  "gelu_pytorch_tanh": "tanh",
  "gelu_tanh": "tanh",
  "gelu_new": "tanh",
  "gelu_fast": "tanh",
  "quick_gelu": "quick",
  "quickgelu": "quick",
}


def find_gelu(name: str, source: str) -> str:
  """Return our name of an activation.

  Raises:
    UserError: the encoder does not have it.
  """
  if name not in _ACTIVATIONS:
    raise UserError(
      f"The activation of {source} is {name!r}; expected one of"
      f" {', '.join(_ACTIVATIONS)}."
    )
  return _ACTIVATIONS[name]


def name_scaling(mean: Any, std: Any, source: str) -> str:
  """Return the `value_range` of images with this mean and deviation.

  Args:
    mean: of images in 0..1, of each channel or of all.
    std: likewise.
    source: name in errors.
  """
  of_channels = lambda x: [x] * 3 if isinstance(x, (int, float)) else x
  try:
    name = scaling.name_scaling(of_channels(mean), of_channels(std))
    scaling.find_scaling(name)
    return name
  except (TypeError, ValueError, UserError) as error:
    raise UserError(
      f"The config of {source} gives images the mean {mean!r} and the"
      f" deviation {std!r}: expected three numbers each, and no deviation 0."
    ) from error
