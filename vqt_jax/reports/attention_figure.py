"""Picture of what the queries of a finished run attend to."""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import Any

import numpy as np

from vqt_jax import data
from vqt_jax.config import fields
from vqt_jax.models.backbone import find_scaling
from vqt_jax.reports import figures
from vqt_jax.reports import style
from vqt_jax.runtime import files
from vqt_jax.tuned import model as model_lib


def attention(
  images: np.ndarray,
  maps: np.ndarray,
  labels: Sequence[str],
  path: str | os.PathLike,
  most_blocks: int = 12,
) -> None:
  """Draw a row per image: the image, and attention maps of blocks.

  Colour is attention relative to a uniform distribution over the patches, on
  one scale for all maps.

  Args:
    images: (n, height, width, 3), 0..1.
    maps: (n, L, rows, columns) attention on the patches, not negative.
    labels: n captions of the rows.
    path: of the picture (PNG).
    most_blocks: maps in a row; deeper models show evenly spaced blocks.
  """
  depth = maps.shape[1]
  blocks = np.unique(
    np.linspace(0, depth - 1, min(depth, most_blocks)).round().astype(int)
  )
  even = maps.sum(axis=(2, 3), keepdims=True) / maps[0, 0].size
  ratio = maps / np.maximum(even, 1e-12)
  top = max(float(np.quantile(ratio, 0.995)), 1.5)
  shades = figures.matplotlib.cm.ScalarMappable(
    figures.matplotlib.colors.Normalize(0, top), "inferno"
  )
  columns = 1 + len(blocks)
  figure = style.figure_of(1.15 * columns + 1.2, 1.15 * len(images) + 1.0)
  axes = figure.subplots(len(images), columns, squeeze=False)
  extent = (0, images.shape[2], images.shape[1], 0)
  for row, (image, label) in enumerate(zip(images, labels)):
    axes[row, 0].imshow(image, extent=extent)
    grey = np.repeat(0.7 * image.mean(axis=-1, keepdims=True), 3, axis=-1)
    axes[row, 0].set_ylabel(
      label, rotation=0, ha="right", va="center", color=style.INK
    )
    for column, block in enumerate(blocks, start=1):
      ax = axes[row, column]
      ax.imshow(grey, extent=extent)
      ax.imshow(_heat(shades, ratio[row, block]), extent=extent)
      if row == 0:
        ax.set_title(f"block {block + 1}", fontsize=9)
  for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
  bar = figure.colorbar(shades, ax=axes, shrink=0.6, aspect=30, pad=0.01)
  bar.set_label("attention / even spread")
  bar.outline.set_visible(False)
  style.save(figure, path)


def _heat(
  shades: figures.matplotlib.cm.ScalarMappable, values: np.ndarray
) -> Any:
  """Return colours (rows, columns, RGBA), more transparent for low values."""
  colours = shades.to_rgba(values)
  colours[..., 3] = np.clip(shades.norm(values), 0, 1) ** 0.5
  return colours


IMAGES = 8  # In the picture.


def draw(workdir: files.Path, path: files.Path) -> None:
  """Draw where the queries of a VQT run's first seed look, on test images.

  Attention is averaged over heads and queries; the class token is left out.
  """
  config = files.read_json(workdir / "config.json")
  model = model_lib.load(workdir)
  model = model.of_seed(model.info["seeds"][0])
  task = data.make_task(
    config["task"],
    **{k: config[k] for k in fields.TASK_FIELDS if k in config},
  )
  if config.get("skip_bad"):
    task = data.leave_out(task, data.find_faults(task))
  c = model.backbone.config
  batch = next(
    data.batches(
      task,
      "test",
      batch_size=IMAGES,
      image_size=c.image_size,
      value_range=model.backbone.value_range,
      resize=config["resize"],
    )
  )
  weights = model.attention(batch["image"])[0].mean(axis=(2, 3))
  weights = weights[..., c.num_prefix_tokens :]
  maps = np.moveaxis(weights, 0, 1).reshape(len(weights[0]), -1, *c.grid)
  predicted = model.logits(batch["image"])[0].argmax(axis=-1)
  mean, std = find_scaling(model.backbone.value_range)
  images = np.clip(batch["image"] * np.array(std) + np.array(mean), 0, 1)
  labels = [f"{a}, said {b}" for a, b in zip(batch["label"], predicted)]
  attention(images, maps, labels, path)
