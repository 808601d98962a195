"""Picture of what the queries of a finished run attend to."""

from __future__ import annotations

from collections.abc import Sequence
import os
import textwrap

import numpy as np

from vqt_jax import data
from vqt_jax import results
from vqt_jax.models import scaling
from vqt_jax.reports import figures
from vqt_jax.reports import style
from vqt_jax.runtime import files
from vqt_jax.tuned import model as model_lib

LEGEND = (
  "Colours: attention on a patch, mean over heads and queries; 1 is an even"
  " spread over the patches."
)
_LABEL = 18  # Characters in a line of a label.


def attention(
  images: np.ndarray,
  maps: np.ndarray,
  labels: Sequence[str],
  path: str | os.PathLike,
  title: str = "Where the queries look",
  legend: str = "",
  most_blocks: int = 12,
) -> None:
  """Draw a row per image: the image, and attention maps of blocks.

  Args:
    images: (n, height, width, 3), 0..1.
    maps: (n, L, rows, columns) attention on the patches, not negative.
    labels: n captions of the rows.
    path: of the picture (PNG).
    title: of the picture.
    legend: what the captions are.
    most_blocks: maps in a row; deeper models show evenly spaced blocks.
  """
  depth = maps.shape[1]
  blocks = np.unique(
    np.linspace(0, depth - 1, min(depth, most_blocks)).round().astype(int)
  )
  colours, scale = shade(maps)
  columns = 1 + len(blocks)
  height = 1.15 * len(images) + 1.5
  figure = style.figure_of(max(1.15 * columns + 1.6, 8), height)
  axes = figure.subplots(len(images), columns, squeeze=False)
  extent = (0, images.shape[2], images.shape[1], 0)
  axes[0, 0].set_title("image", fontsize=9)
  for row, (image, label) in enumerate(zip(images, labels)):
    axes[row, 0].imshow(image, extent=extent)
    grey = np.repeat(0.7 * image.mean(axis=-1, keepdims=True), 3, axis=-1)
    axes[row, 0].set_ylabel(
      textwrap.fill(label, _LABEL).replace("$", r"\$"),
      rotation=0,
      ha="right",
      va="center",
      color=style.INK,
    )
    for column, block in enumerate(blocks, start=1):
      ax = axes[row, column]
      ax.imshow(grey, extent=extent)
      ax.imshow(colours[row, block], extent=extent)
      if row == 0:
        ax.set_title(f"block {block + 1}", fontsize=9)
  for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
  bar = figure.colorbar(scale, ax=axes, shrink=0.6, aspect=30, pad=0.01)
  bar.set_label("attention / even spread")
  bar.outline.set_visible(False)
  below = "\n".join(filter(None, (LEGEND, legend)))
  style.write_title(figure, f"{title}\n\n", below, 1 - 0.36 / height)
  style.save(figure, path)


def shade(
  maps: np.ndarray,
) -> tuple[np.ndarray, figures.matplotlib.cm.ScalarMappable]:
  """Colour attention relative to an even spread, on one scale for all maps.

  Args:
    maps: (n, L, rows, columns).

  Returns:
    Colours (n, L, rows, columns, RGBA) in 0..1, more transparent where
    attention is low; and the scale.
  """
  even = maps.sum(axis=(2, 3), keepdims=True) / maps[0, 0].size
  ratio = maps / np.maximum(even, 1e-12)
  top = max(float(np.quantile(ratio, 0.995)), 1.5)
  scale = figures.matplotlib.cm.ScalarMappable(
    figures.matplotlib.colors.Normalize(0, top), "inferno"
  )
  colours = scale.to_rgba(ratio.reshape(-1, maps.shape[-1]))
  colours = colours.reshape(*maps.shape, 4)
  colours[..., 3] = np.clip(ratio / top, 0, 1) ** 0.5
  return colours, scale


IMAGES = 8  # In the picture.


def draw(workdir: files.Path, path: files.Path) -> None:
  """Draw where the queries of a VQT run's first seed look, on test images."""
  config = files.read_json(workdir / "config.json")
  model = model_lib.load(workdir)
  seed = model.info["seeds"][0]
  model = model.of_seed(seed)
  task = results.find_task(config)
  batch = next(
    data.batches(
      task,
      "test",
      batch_size=IMAGES,
      image_size=model.backbone.config.image_size,
      value_range=model.backbone.value_range,
      resize=config["resize"],
    )
  )
  real = batch["mask"] > 0
  images, true = batch["image"][real], batch["label"][real]
  names = style.legible(model.classes)
  labels = [
    names[a] if a == b else f"{names[a]}, said {names[b]}"
    for a, b in zip(true, model.logits(images)[0].argmax(axis=-1))
  ]
  attention(
    scaling.unscale(images, model.backbone.value_range),
    model.attention_maps(images),
    labels,
    path,
    f"Where the queries look: {task.name}, seed {seed}",
    "Rows: the class of a test image, and what was said if that is another.",
  )
