"""What the queries of a finished run attend to, as a picture."""

import numpy as np

from vqt_jax import config as config_lib
from vqt_jax import data
from vqt_jax import files
from vqt_jax import plots
from vqt_jax import results as results_lib
from vqt_jax import tuned as tuned_lib
from vqt_jax.backbone import VALUE_RANGES

IMAGES = 8  # In the picture.


def draw(workdir: files.Path, path: files.Path) -> None:
  """Where the queries of a VQT run's first seed look, on test images.

  Attention is averaged over heads and queries; the class token is left out.
  """
  results = results_lib.read_json(workdir / "results.json")
  config = results_lib.read_json(workdir / "config.json")
  seed = next(iter(results["test_accuracy"]["per_seed"]))
  tuned = tuned_lib.load(workdir / "tuned" / f"seed_{seed}")
  task = data.make_task(
    config["task"], **{k: config[k] for k in config_lib.TASK_FIELDS}
  )
  c = tuned.backbone.config
  batch = next(
    data.batches(
      task,
      "test",
      batch_size=IMAGES,
      image_size=c.image_size,
      value_range=tuned.backbone.value_range,
      resize=config["resize"],
    )
  )
  weights = tuned.attention(batch["image"]).mean(axis=(2, 3))
  if c.has_class_token:
    weights = weights[..., 1:]
  maps = np.moveaxis(weights, 0, 1).reshape(len(weights[0]), -1, *c.grid)
  predicted = np.argmax(tuned(batch["image"]).logits, axis=-1)
  mean, std = VALUE_RANGES[tuned.backbone.value_range]
  images = np.clip(batch["image"] * np.array(std) + np.array(mean), 0, 1)
  labels = [f"{a}, said {b}" for a, b in zip(batch["label"], predicted)]
  plots.attention(images, maps, labels, path)
