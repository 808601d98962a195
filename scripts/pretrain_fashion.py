"""Pre-trains the small ViT that ships with vqt_jax, on Fashion-MNIST.

    python -m scripts.pretrain_fashion --data_dir ~/tensorflow_datasets

Run it from the root of the repository, with the dataset prepared by TFDS. The
result is a Big Vision npz. It is written after every epoch, so a run that is
stopped early leaves a usable file. Accuracies are those of
`vqt_jax.models.vit.ViT` in float32. The recipe is told in
`vqt_jax/assets/README.md`.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scripts import cpu_vit
from vqt_jax import checkpoints
from vqt_jax.models import vit
from vqt_jax.models import vit_config

CONFIG = vit_config.ViTConfig(
  width=128,
  depth=6,
  mlp_dim=512,
  num_heads=4,
  patch_size=(4, 4),
  image_size=(28, 28),
  pool_type="tok",
  num_classes=10,
)
NUM_PATCHES = math.prod(CONFIG.grid)


@dataclasses.dataclass(frozen=True)
class Phase:
  """Some epochs with one schedule, from fresh moments. Times in epochs."""

  epochs: int
  schedule: int  # the cosine would reach zero here
  warmup: float
  peak_lr: float
  kept_patches: int


@dataclasses.dataclass(frozen=True)
class StaticSettings:
  """How to train. Angles in radians, shifts in pixels."""

  phases: tuple[Phase, ...] = (
    Phase(11, schedule=12, warmup=1.0, peak_lr=1e-3, kept_patches=16),
    Phase(2, schedule=2, warmup=0.1, peak_lr=5e-4, kept_patches=NUM_PATCHES),
  )
  seed: int = 0
  batch_size: int = 128
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  rotation: float = math.pi / 9  # at most, either way
  log_zoom: float = 0.25
  shift: float = 3.0
  contrast: float = 0.3


def load(data_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Fashion-MNIST as (n, 28, 28) uint8 images and (n,) int32 labels."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  tf.config.set_visible_devices([], "GPU")
  data = tfds.load(
    "fashion_mnist", split=split, data_dir=data_dir or None, batch_size=-1
  )
  images = np.asarray(data["image"])[..., 0]
  return images, np.asarray(data["label"]).astype(np.int32)


def augment(
  recipe: StaticSettings, key: jax.Array, images: jax.Array
) -> jax.Array:
  """Random flip, rotation, zoom, shift and contrast.

  Args:
    recipe: their strengths.
    key: randomness.
    images: (B, height, width), uint8.

  Returns:
    (B, height, width), float32 in -1..1, -1 outside the image.
  """
  count, height, width = images.shape
  u = jax.random.uniform(key, (6, count, 1, 1), minval=-1.0)
  angle, zoom = recipe.rotation * u[0], jnp.exp(recipe.log_zoom * u[1])
  cos, sin = jnp.cos(angle) * zoom, jnp.sin(angle) * zoom
  y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
  y, x = y - (height - 1) / 2, x - (width - 1) / 2
  rows = cos * y + sin * x
  columns = jnp.sign(u[2]) * (cos * x - sin * y)
  rows += (height - 1) / 2 + recipe.shift * u[3]
  columns += (width - 1) / 2 + recipe.shift * u[4]

  pixels = images.astype(jnp.float32) / 127.5 - 1.0
  sample = functools.partial(
    jax.scipy.ndimage.map_coordinates, order=1, mode="constant", cval=-1.0
  )
  pixels = jax.vmap(lambda image, r, c: sample(image, [r, c]))(
    pixels, rows, columns
  )
  contrast = 1.0 - recipe.contrast * jnp.maximum(u[5], 0.0)
  return (pixels + 1.0) * contrast - 1.0


def make_optimizer(
  recipe: StaticSettings, phase: Phase, steps_per_epoch: int
) -> optax.GradientTransformation:
  """AdamW, linear warm-up, cosine to zero; decay on kernels only."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    phase.peak_lr,
    round(phase.warmup * steps_per_epoch),
    phase.schedule * steps_per_epoch,
  )
  is_kernel = functools.partial(
    jax.tree_util.tree_map_with_path,
    lambda path, _: getattr(path[-1], "key", None) == "kernel",
  )
  adamw = optax.adamw(
    schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=is_kernel
  )
  return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), adamw)


def choose_patches(key: jax.Array, count: int, kept: int) -> jax.Array:
  """Indices (count, kept) of the patches that each image shows."""
  if kept == NUM_PATCHES:
    return jnp.tile(jnp.arange(NUM_PATCHES), (count, 1))
  noise = jax.random.uniform(key, (count, NUM_PATCHES))
  return jnp.argsort(noise, axis=1)[:, :kept]


def make_train_steps(
  recipe: StaticSettings, phase: Phase, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
  """Compiles many steps into one call.

  Returns:
    A function of the state (params, moments), images (n, 28, 28) uint8, labels
    (n,), order (steps, B) of example indices and a key; it returns the new
    state, the mean loss and the training accuracy.
  """

  def loss_of(params, x, y, kept):
    logits = cpu_vit.logits(CONFIG, params, x, kept)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (logits.argmax(-1) == y).mean()

  def train_steps(state, images, labels, order, key):
    def step(state, step_input):
      (params, moments), (index, key) = state, step_input
      augment_key, patch_key = jax.random.split(key)
      x, y = augment(recipe, augment_key, images[index]), labels[index]
      kept = choose_patches(patch_key, len(y), phase.kept_patches)
      value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
      (loss, hits), grads = value_and_grad(params, x, y, kept)
      updates, moments = optimizer.update(grads, moments, params)
      return (optax.apply_updates(params, updates), moments), (loss, hits)

    keys = jax.random.split(key, len(order))
    state, (loss, hits) = jax.lax.scan(step, state, (order, keys))
    return state, loss.mean(), hits.mean()

  return jax.jit(train_steps, donate_argnums=0)


def accuracy(params: Any, images: np.ndarray, labels: np.ndarray) -> float:
  """Share of right answers of `vit.ViT` in float32, on uint8 images."""

  @jax.jit
  def predict(x):
    x = jnp.repeat(x[..., None].astype(jnp.float32) / 127.5 - 1.0, 3, axis=-1)
    return vit.ViT(CONFIG).apply({"params": params}, x).logits.argmax(-1)

  parts = [predict(images[i : i + 500]) for i in range(0, len(images), 500)]
  return float((np.concatenate(parts) == labels).mean())


def run_phase(
  recipe: StaticSettings, phase: Phase, first_epoch: int, params: Any, data: Any
) -> Iterator[tuple[dict[str, Any], Any]]:
  """Yields a record and the parameters after every epoch.

  Args:
    recipe: seed, batch size, augmentation.
    phase: what of the recipe to run.
    first_epoch: number of its first epoch in the whole run; makes the keys.
    params: of the `vit.ViT`.
    data: uint8 images (n, 28, 28) and labels (n,).
  """
  steps = len(data[1]) // recipe.batch_size
  optimizer = make_optimizer(recipe, phase, steps)
  train_steps = make_train_steps(recipe, phase, optimizer)
  params = cpu_vit.unstacked(params)
  state = (params, optimizer.init(params))
  _, order_key, step_key = jax.random.split(jax.random.key(recipe.seed), 3)
  for epoch in range(first_epoch, first_epoch + phase.epochs):
    order = jax.random.permutation(
      jax.random.fold_in(order_key, epoch), len(data[1])
    )[: steps * recipe.batch_size].reshape(steps, -1)
    key = jax.random.fold_in(step_key, epoch)
    state, loss, hits = train_steps(state, *data, order, key)
    record = {
      "epoch": epoch + 1,
      "patches": phase.kept_patches,
      "loss": round(float(loss), 4),
      "train_accuracy": round(float(hits), 4),
    }
    yield record, jax.device_get(cpu_vit.stacked(state[0]))


def train(recipe: StaticSettings, data_dir: str, out: str) -> None:
  """Runs the recipe; prints a JSON line and writes `out` every epoch."""
  start, cpu = time.time(), time.process_time()
  data = tuple(map(jnp.asarray, load(data_dir, "train")))
  test_set = load(data_dir, "test")
  init_key, _, _ = jax.random.split(jax.random.key(recipe.seed), 3)
  params, epoch = vit.init_params(CONFIG, init_key), 0
  for phase in recipe.phases:
    for record, trained in run_phase(recipe, phase, epoch, params, data):
      params = trained
      checkpoints.save_npz(out, params)
      record["test_accuracy"] = accuracy(params, *test_set)
      record["minutes"] = round((time.time() - start) / 60, 1)
      record["cpu_minutes"] = round((time.process_time() - cpu) / 60, 1)
      print(json.dumps(record), flush=True)
    epoch += phase.epochs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", default="", help="folder of TFDS")
  parser.add_argument("--out", default="vqt_jax/assets/fashion_vit.npz")
  parser.add_argument("--seed", type=int, default=StaticSettings.seed)
  args = parser.parse_args()
  train(StaticSettings(seed=args.seed), args.data_dir, args.out)


if __name__ == "__main__":
  main()
