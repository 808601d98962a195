"""Models of several tasks on one backbone: in one pass, against one alone.

  python -m benchmarks.several_tasks [--tasks=19] [--variant=B/16] [--size=224]

Prints the time of a batch for one task and for all of them, in turn, and their
ratio; with one query per block and one seed each.
"""

from collections.abc import Sequence
import sys
import time

from absl import flags
import jax
import numpy as np

from vqt_jax.checkpoints import architecture
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.tuned import model

REPEATS = 5


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  for name, default in (("tasks", 19), ("size", 224), ("batch", 16)):
    flags.DEFINE_integer(name, default, "", flag_values=values)
  flags.DEFINE_string("variant", "B/16", "", flag_values=values)
  values(argv)
  sizes = architecture.decode_variant(values.variant)
  config = vit_config.ViTConfig(**sizes, image_size=(values.size,) * 2)
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.01, np.float32), vit.param_shapes(config)
  )
  params = jax.device_put(params)
  tuners = [
    tuner_lib.make_tuner("vqt", config, 2 + i) for i in range(values.tasks)
  ]
  variables = [
    jax.tree.map(lambda x: x[None], tuner.init(jax.random.key(i)))
    for i, tuner in enumerate(tuners)
  ]
  images = np.zeros((values.batch, *config.image_size, 3), np.float32)

  def seconds(count: int) -> float:
    args = tuple(tuners[:count]), tuple(variables[:count]), params, images
    jax.block_until_ready(model.classify(*args))
    start = time.perf_counter()
    jax.block_until_ready(model.classify(*args))
    return time.perf_counter() - start

  found = np.array(
    [[seconds(1), seconds(values.tasks)] for _ in range(REPEATS)]
  )
  one, every = np.median(found, axis=0)
  ratio = np.median(found[:, 1] / found[:, 0])
  print(
    f"ViT-{values.variant}, {values.size} px, {values.batch} images: 1 task"
    f" {one:.3f} s, {values.tasks} tasks {every:.3f} s, ratio {ratio:.2f}"
  )


if __name__ == "__main__":
  main(sys.argv)
