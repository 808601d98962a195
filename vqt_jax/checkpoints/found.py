"""A ViT in a file, before its weights are read."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from vqt_jax.models import vit_config

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Found:
  """A ViT in a file, of any layout.

  Attributes:
    config: architecture; its image size is one patch.
    shapes: name in the file -> shape, of the arrays that it needs.
    check: (config) -> None; raises a `UserError` if the file does not fit.
    convert: (config, name in the file -> float32 array) -> leaves by Big
      Vision's present names.
    position_rows: number of positions in the file; 0: it has none.
    find_positions: (rows, image_size, trained_size) -> how many rows come
      before those of patches, and the grid (rows, columns) of the patches.
    resize: (table (1, n, D), old grid, new grid) -> table (1, m, D).
    value_range: of its inputs, see `scaling.find_scaling`.
    image_size: (height, width) of the images it was trained on, pixels, if it
      has no positions that tell it; or None.
    assumed: those of "value_range" and "gelu" that nothing in the file tells.
    layout: as `Backbone` has it.
  """

  config: vit_config.ViTConfig
  shapes: Mapping[str, tuple[int, ...]]
  check: Callable[[vit_config.ViTConfig], None]
  convert: Callable[[vit_config.ViTConfig, Any], dict[str, np.ndarray]]
  position_rows: int
  find_positions: Callable[..., tuple[int, Pair]]
  resize: Callable[[np.ndarray, Pair, Pair], np.ndarray]
  value_range: str = "-1..1"
  image_size: Pair | None = None
  assumed: Sequence[str] = ("value_range", "gelu")
  layout: str = "big_vision"
