"""Predicting from files, against the frozen forward pass alone.

  python -m benchmarks.predicting [--variant=S/16] [--size=224] [--images=128]

Photographs of 640 x 480 pixels (JPEG) are decoded, made to fit and classified
as `vqt-jax predict` does it, in turn with the same number of passes of the
frozen backbone on images that are there already. Prints images a second of
both, and the median of their ratios.
"""

from collections.abc import Sequence
import pathlib
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np
import PIL.Image

from vqt_jax.checkpoints import architecture
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.tuned import inputs
from vqt_jax.tuned import model as model_lib

REPEATS = 3


def make_model(variant: str, size: int) -> model_lib.Model:
  """A model of one seed with weights that mean nothing."""
  sizes = architecture.decode_variant(variant)
  config = vit_config.ViTConfig(**sizes, image_size=(size, size))
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.01, np.float32), vit.param_shapes(config)
  )
  tuner = tuner_lib.make_tuner("vqt", config, 10)
  variables = jax.tree.map(lambda x: x[None], tuner.init(jax.random.key(0)))
  preprocessing = {
    "image_size": [size, size],
    "value_range": "-1..1",
    "fit": "squash",
  }
  info = {"preprocessing": preprocessing, "seeds": [0]}
  backbone = backbone_lib.Backbone(config, params)
  classes = tuple(map(str, range(10)))
  return model_lib.Model(backbone, tuner, variables, classes, info)


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  for name, default in (("size", 224), ("images", 128)):
    flags.DEFINE_integer(name, default, "", flag_values=values)
  flags.DEFINE_string("variant", "S/16", "", flag_values=values)
  values(argv)
  model = make_model(values.variant, values.size)
  models = model_lib.Models({"": model})
  params = jax.device_put(model.backbone.params)
  run_backbone = jax.jit(tuner_lib.run_backbone, static_argnums=(0, 1))
  batch = np.zeros((inputs.BATCH, values.size, values.size, 3), np.float32)
  with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    paths = [pathlib.Path(folder) / f"{i}.jpg" for i in range(values.images)]
    for path in paths:
      small = rng.integers(0, 255, (30, 40, 3), np.uint8)
      PIL.Image.fromarray(small).resize((640, 480)).save(path, quality=90)

    def predict() -> None:
      for _ in models.stream(paths):
        pass

    def forward() -> None:
      for _ in range(values.images // inputs.BATCH):
        stream = run_backbone(model.backbone.config, True, params, batch)
        jax.block_until_ready(stream.final)

    found = []
    for step in range(REPEATS + 1):  # The first one compiles.
      seconds = []
      for run in (forward, predict):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
      if step:
        found.append(seconds)
  alone, whole = values.images / np.median(found, axis=0)
  ratio = np.median([b / a for a, b in found])
  print(
    f"ViT-{values.variant}, {values.size} px: frozen pass {alone:.1f} images/s,"
    f" predict {whole:.1f} images/s, {ratio:.2f} times the seconds"
  )


if __name__ == "__main__":
  main(sys.argv)
