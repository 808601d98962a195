"""ViTs of Big Vision and vision_transformer, all generations of their files."""

import pathlib

from vqt_jax.checkpoints import architecture
from vqt_jax.checkpoints import containers
from vqt_jax.checkpoints import found as found_lib
from vqt_jax.checkpoints import names
from vqt_jax.checkpoints import positions as positions_lib
from vqt_jax.errors import UserError
from vqt_jax.models import vit_config


def inspect(
  path: pathlib.Path, subtree: str, variant: str | None, source: str
) -> found_lib.Found:
  """Infer the architecture from the shapes of the leaves.

  Args:
    path: as `containers.find` returns it.
    subtree: "", or place of the model in the file, e.g. "img".
    variant: that it should be, or None.
    source: name of the file in errors.

  Raises:
    UserError: it is damaged, no plain ViT, or not of this variant.
  """
  picked = names.select_model(containers.leaf_names(path), subtree, source)
  present = names.map_to_present(picked)
  stored = {new: picked[old] for new, old in present.items()}
  stored_shapes = containers.leaf_shapes(path, stored.values())
  shapes = {new: stored_shapes[old] for new, old in stored.items()}
  if reason := architecture.describe_foreign(shapes):
    raise UserError(f"{source} is not a plain ViT but {reason}.")
  sizes = architecture.infer_sizes(shapes)
  if sizes is None:
    some = ", ".join(sorted(stored.values())[:4])
    raise UserError(
      f"{source} is not a ViT checkpoint: expected leaves such as"
      f" embedding/kernel and Transformer/encoderblock_0/..., found {some}"
      f"{', ...' if len(stored) > 4 else ''}."
    )
  if variant:
    architecture.check_variant(sizes, variant, source)
  learned = "pos_embedding" in shapes or names.is_pre_linen(stored.values())
  if not learned and sizes["width"] % 4:
    raise UserError(
      f"{source} has no position embedding, and its width {sizes['width']} is"
      " not a multiple of 4, as computed (sincos2d) positions need."
    )
  # A patch that is not known is reported as a missing leaf.
  sizes["patch_size"] = sizes["patch_size"] or (1, 1)
  config = vit_config.ViTConfig(
    **sizes,
    image_size=sizes["patch_size"],
    pool_type=architecture.infer_pooling(shapes),
    posemb="learn" if learned else "sincos2d",
  )
  positions = shapes.get("pos_embedding", ())

  def find_positions(rows, image_size, trained_size):
    wanted, trained = (
      positions_lib.to_grid(size, config.patch_size) if size else None
      for size in (image_size, trained_size)
    )
    first = positions_lib.has_class_row(
      rows, stored["pos_embedding"], "cls" in stored, trained or wanted
    )
    grid = positions_lib.find_grid(
      rows - first, config.patch_size, wanted, trained
    )
    return int(first), grid

  return found_lib.Found(
    config=config,
    shapes=stored_shapes,
    check=lambda config: architecture.check_leaves(
      shapes, stored, config, source
    ),
    convert=lambda config, arrays: {
      name: arrays[old] for name, old in stored.items()
    },
    position_rows=positions[1] if len(positions) == 3 else 0,
    find_positions=find_positions,
    resize=positions_lib.resize_positions,
  )
