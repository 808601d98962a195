"""The architecture that a checkpoint's leaves show, and checks of these."""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import math
import re
from typing import Any

import numpy as np

from vqt_jax.checkpoints import names as names_lib
from vqt_jax.errors import UserError
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.runtime import files

Shapes = Mapping[str, tuple[int, ...]]

# Field -> (pattern of leaves, axis) whose sizes show its value: inside a block,
# and outside.
_BLOCK_SIZES = {
  "width": ((r"LayerNorm_\d/(scale|bias)", -1), (r".*/query/kernel", -3)),
  "mlp_dim": (
    (r"MlpBlock_0/Dense_0/(kernel|bias)", -1),
    (r"MlpBlock_0/Dense_1/kernel", -2),
  ),
  "num_heads": (
    (r".*_0/(query|key|value)/(kernel|bias)", -2),
    (r".*_0/out/kernel", -3),
  ),
}
_TOP_SIZES = {
  "width": (r"embedding/.*|cls|pos_embedding|Transformer/encoder_norm/.*", -1),
  "rep_size": (r"pre_logits/(kernel|bias)", -1),
  "num_classes": (r"head/(kernel|bias)", -1),
}
_MAX_LINES = 100


def describe_foreign(shapes: Shapes) -> str | None:
  """Name the kind of a checkpoint that is known not to be a plain ViT."""
  tops = {name.partition("/")[0] for name in shapes}
  if "conv_root" in tops or "gn_root" in tops:
    return "a hybrid (its patches come from a ResNet)"
  if any(top.startswith("MixerBlock") for top in tops):
    return "an MLP-Mixer"
  if "Embed_0" in tops:
    return "a text tower; the image tower of such files is under `:img`"
  if "img" in tops and "embedding" not in tops:
    return "a model of several towers; name the ViT in it with `:img`"
  positions = shapes.get("pos_embedding", ())
  if len(positions) == 3 and positions[0] != 1:
    return "a NaFlex ViT (variable grids)"
  return None


def infer_sizes(shapes: Shapes) -> dict[str, Any] | None:
  """Infer the sizes of a ViT from the shapes of its leaves.

  Every leaf that shows a size has a vote, so that a single missing or misshapen
  leaf is reported as such, and not all the others.

  Args:
    shapes: present-day name -> shape.

  Returns:
    width, depth, mlp_dim, num_heads, patch_size, rep_size and num_classes as in
    `vit.ViTConfig`; None if this is not a ViT. `patch_size` is None if its leaf
    is missing.
  """
  votes = collections.defaultdict(collections.Counter)
  # Kernels first: where a kernel and its bias disagree, the kernel is right.
  for name in sorted(shapes, key=lambda name: not name.endswith("kernel")):
    shape = shapes[name]
    index, rest = names_lib.split_block(name)
    if name.startswith(names_lib.STACKED):
      rest = name.removeprefix(names_lib.STACKED)
      votes["depth"].update(shape[:1])
    elif index is None:
      for field, (pattern, axis) in _TOP_SIZES.items():
        if re.fullmatch(pattern, name):
          votes[field].update(_size_along(shape, axis))
      continue
    for field, patterns in _BLOCK_SIZES.items():
      for pattern, axis in patterns:
        if re.fullmatch(pattern, rest):
          votes[field].update(_size_along(shape, axis))
  sizes = {
    field: votes[field].most_common(1)[0][0] for field in votes if votes[field]
  }
  if not names_lib.is_stacked(shapes):
    blocks = {names_lib.split_block(name)[0] for name in shapes} - {None}
    depth = max(blocks, default=-1) + 1
    # A number that is out of all proportion is no block's.
    sizes["depth"] = depth if depth <= len(shapes) else 0
  needed = ("width", "depth", "mlp_dim", "num_heads")
  if not all(sizes.get(field) for field in needed):
    return None
  if sizes["width"] % sizes["num_heads"]:
    return None
  kernel = shapes.get("embedding/kernel", ())
  has_patch = len(kernel) == 4 and math.prod(kernel)
  return {
    **{field: int(sizes[field]) for field in needed},
    "patch_size": (kernel[0], kernel[1]) if has_patch else None,
    "rep_size": sizes.get("rep_size"),
    "num_classes": sizes.get("num_classes"),
  }


def infer_pooling(shapes: Shapes) -> str:
  """Infer the pooling from the leaves that only one kind of it has."""
  if "cls" in shapes:
    return "tok"
  return "map" if any(n.startswith("MAPHead_0/") for n in shapes) else "gap"


def check_variant(sizes: Mapping[str, Any], variant: str, source: str) -> None:
  """Raise a `UserError` if a checkpoint is not of the given variant."""
  expected = decode_variant(variant)
  wrong = [
    f"{field} {_format_value(sizes[field])} instead of {_format_value(value)}"
    for field, value in expected.items()
    if sizes[field] not in (value, None)
  ]
  if wrong:
    raise UserError(
      f"{source} is not the variant {variant} asked for: it has"
      f" {', '.join(wrong)}. Leave the variant out (all sizes are read from"
      " the checkpoint), or name another checkpoint."
    )


def decode_variant(variant: str) -> dict[str, Any]:
  """Call `vit_config.decode_variant`; its error becomes a `UserError`."""
  if not isinstance(variant, str):
    raise UserError(f"variant must be text, e.g. 'B/16', not {variant!r}.")
  try:
    return vit_config.decode_variant(variant)
  except ValueError as error:
    raise UserError(str(error)) from error


def check_leaves(
  shapes: Shapes,
  stored: Mapping[str, str],
  config: vit_config.ViTConfig,
  source: str,
) -> None:
  """Compare a checkpoint with a model, leaf by leaf.

  Args:
    shapes: present-day name -> shape.
    stored: present-day name -> name in the file.
    config: the model; its image size does not matter.
    source: name of the file in errors.

  Raises:
    UserError: with all missing, surplus and misshapen leaves.
  """
  with files.explain_damage(source, "Its shapes are not those of a ViT."):
    expected = leaf_shapes(config, names_lib.is_stacked(shapes))
  missing = [
    f"missing: {name} {_format_shape(name, expected[name])}"
    for name in sorted(expected.keys() - shapes)
  ]
  surplus = [
    f"unused: {stored[name]} {shapes[name]}"
    for name in sorted(shapes.keys() - expected)
  ]
  misshapen = [
    f"wrong shape: {stored[name]} is {shapes[name]}, expected"
    f" {_format_shape(name, expected[name])}"
    for name in sorted(shapes.keys() & expected)
    if not _shape_fits(name, shapes[name], expected[name])
  ]
  raise_misfit(
    f"{source} does not fit the ViT that it seems to hold",
    config,
    ("Leaves", missing, surplus, misshapen),
  )


def raise_misfit(
  start: str,
  config: vit_config.ViTConfig,
  found: tuple[str, list[str], list[str], list[str]],
) -> None:
  """Raise a `UserError` that lists how a file differs from a model, if it does.

  Args:
    start: of the sentence.
    config: the model.
    found: what its arrays are called, and lines about those that are missing,
      unused and misshapen.
  """
  kind, missing, unused, misshapen = found
  problems = missing + unused + misshapen
  if len(problems) > _MAX_LINES:
    rest = len(problems) - _MAX_LINES
    problems[_MAX_LINES:] = [f"... and {rest} more"]
  if problems:
    raise UserError(
      f"{start} (width {config.width}, depth {config.depth}, pool_type"
      f" {config.pool_type!r}). {kind} missing: {len(missing)}, unused:"
      f" {len(unused)}, of another shape: {len(misshapen)}. Use an undamaged"
      " checkpoint of a plain ViT.\n  " + "\n  ".join(problems)
    )


def check_floats(leaves: Mapping[str, np.ndarray], source: str) -> None:
  """Raise a `UserError` if a leaf does not hold floating-point numbers.

  Args:
    leaves: name in the file -> numbers.
    source: name of the file in the error.
  """
  wrong = [n for n, x in leaves.items() if not names_lib.holds_floats(x)]
  if wrong:
    some = ", ".join(f"{name} ({leaves[name].dtype})" for name in wrong[:3])
    raise UserError(
      f"{source} holds no floating-point numbers in {len(wrong)} of its"
      f" {len(leaves)} leaves, such as {some}: these are not weights."
    )


def check_finite(leaves: Mapping[str, np.ndarray], source: str) -> None:
  """Raise a `UserError` if a leaf holds NaN or infinity.

  Args:
    leaves: name in the file -> numbers.
    source: name of the file in the error.
  """
  bad = {n: x for n, x in leaves.items() if not np.isfinite(x).all()}
  if not bad:
    return
  some = ", ".join(
    f"{name} ({x.size - np.isfinite(x).sum():,} of {x.size:,} numbers)"
    for name, x in list(bad.items())[:3]
  )
  more = f" and {len(bad) - 3} more leaves" if len(bad) > 3 else ""
  raise UserError(
    f"{source} holds NaN or infinity in {some}{more}. Likely its training"
    " diverged, or its numbers were too large for the float16 or bfloat16 that"
    " it was saved in: take another checkpoint, or convert it again in float32."
  )


def leaf_shapes(config: vit_config.ViTConfig, stacked: bool) -> Shapes:
  """Return name -> shape of a model's leaves; blocks stacked or one by one."""
  config = dataclasses.replace(config, image_size=config.patch_size)
  tree = vit.param_shapes(config)
  shapes = {name: x.shape for name, x in names_lib.flatten(tree).items()}
  if stacked:
    return shapes
  names = names_lib.unstack_names(shapes, config.depth)
  return {
    name: shapes[stacked_name] if index is None else shapes[stacked_name][1:]
    for name, (stacked_name, index) in names.items()
  }


def _format_shape(name: str, shape: tuple[int, ...]) -> str:
  return f"(1, N, {shape[-1]})" if name == "pos_embedding" else str(shape)


def _shape_fits(
  name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> bool:
  """Return whether a shape is right; positions may be of any number."""
  if name == "pos_embedding" and len(shape) == 3 and math.prod(shape):
    return (shape[0], shape[2]) == (expected[0], expected[2])
  return shape == expected


def _size_along(shape: tuple[int, ...], axis: int) -> Iterable[int]:
  return [shape[axis]] if len(shape) >= -axis else []


def _format_value(value: Any) -> str:
  return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
