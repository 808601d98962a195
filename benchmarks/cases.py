"""The training steps that the benchmarks set side by side.

All are called as `function(*static, state, *rest) -> (state, ...)`, take S
batches in one call, and gather them from resident data.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import flops
import vqt_jax
from vqt_jax.features import store
from vqt_jax.models import methods
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config as vit_config_lib
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import optim
from vqt_jax.training import step as step_lib

NUM_CLASSES = 100
QUERY_COUNTS = (1, 10)
# Every reader and editor alone, and the combinations that have a recipe; if
# gradients train them.
METHODS = tuple(
  name
  for name in methods.NAMES + methods.PAIRS
  for reader in [readers.READERS[methods.parse(name).reader]]
  if not (reader.is_fixed or reader.members)
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A step to measure.

  Attributes:
    name: for people.
    function: made by `jax.jit`.
    static: its first arguments.
    build: makes the other arguments (traceable, so it serves for arrays and
      for their shapes).
    expected: operations of a call, from the sizes alone; None: not counted.
    reading: what of them is not the frozen forward pass; None if that is
      trained.
  """

  name: str
  function: Callable[..., Any]
  static: tuple[Any, ...]
  build: Callable[[], tuple[Any, ...]]
  expected: int | None = None
  reading: int | None = None

  def arrays(self) -> tuple[Any, ...]:
    """All arguments, random."""
    return *self.static, *jax.jit(self.build)()

  def seconds(self, arrays: list[Any]) -> float:
    """Time of a call, waited for.

    Args:
      arrays: of `arrays`; the state that is donated gives way to the new one.
    """
    start = time.perf_counter()
    out = jax.block_until_ready(self.function(*arrays))
    taken = time.perf_counter() - start
    arrays[len(self.static)] = out[0]
    return taken

  def shapes(self, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, ...]:
    """All arguments as shapes; on a mesh, placed as `features.store` does."""
    dynamic = jax.eval_shape(self.build)
    if mesh is not None:
      dynamic = jax.tree_util.tree_map_with_path(
        functools.partial(_place, mesh), dynamic
      )
    return *self.static, *dynamic


def _place(mesh, path, leaf):
  spec = {"tokens": P(None, None, "data"), "image": P(None, "data")}
  name, shape = getattr(path[-1], "key", None), leaf.shape
  if name == "tokens":
    sizes = math.prod(shape[2:]), mesh.shape["data"]
    shape = (*shape[:2], *store.sharded_shape(*sizes))
  sharding = NamedSharding(mesh, spec.get(name, P()))
  if name in spec:
    sharding = mesh_lib.row_major(sharding, len(shape))
  return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def vit_config(
  variant: str, image_size: int, dtype: str
) -> vit_config_lib.ViTConfig:
  """A variant by name, for square images."""
  sizes = vit_config_lib.decode_variant(variant)
  return vit_config_lib.ViTConfig(
    **sizes, image_size=(image_size, image_size), dtype=dtype
  )


def all_steps(
  config: vit_config_lib.ViTConfig, batch_size: int, **options: int
) -> list[Case]:
  """Linear probe, VQT live, VQT from the store, full fine-tuning."""
  tuners = [
    vqt_jax.make_tuner("vqt", config, NUM_CLASSES, num_queries=count)
    for count in QUERY_COUNTS
  ]
  linear = vqt_jax.make_tuner("linear", config, NUM_CLASSES)
  make = functools.partial(train, batch_size=batch_size, **options)
  return [
    make(linear),
    *(make(tuner) for tuner in tuners),
    *(make(tuner, stored=True) for tuner in tuners),
    finetune(config, NUM_CLASSES, batch_size, **options),
  ]


def all_methods(
  config: vit_config_lib.ViTConfig, batch_size: int, **options: int
) -> list[Case]:
  """A live step of each method, and of editors with `remat` as well."""
  steps = []
  for method in METHODS:
    tuner = vqt_jax.make_tuner(method, config, NUM_CLASSES)
    for remat in (False, True)[: 1 + bool(tuner.editor)]:
      case = train(tuner, batch_size, remat=remat, **options)
      name = method + (", remat" if remat else "")
      steps.append(dataclasses.replace(case, name=name))
  return steps


def name_of(tuner: tuner_lib.Tuner) -> str:
  if tuner.editor:
    return tuner.method
  if not tuner.reads_blocks:
    return "linear probe"
  if not tuner.has_queries:
    return "Head2Toe"
  return f"VQT, T={tuner.num_queries}"


def train(
  tuner: tuner_lib.Tuner,
  batch_size: int,
  *,
  stored: bool = False,
  rows: int = 0,
  runs: int = 1,
  steps: int = 1,
  remat: bool = False,
) -> Case:
  """The package's own training steps.

  Args:
    tuner: the method.
    batch_size: images B in a step.
    stored: from the feature store, or through the backbone.
    rows: resident examples; 0: as many as a call takes.
    runs: R trained side by side.
    steps: S in a call.
    remat: whether the blocks are computed again for an editor's gradient.
  """
  config = tuner.config
  recipe = step_lib.StaticSettings("adam", query_dropout=True, remat=remat)

  def build():
    params = _params(config, config.dtype)
    seeds = jnp.arange(runs, dtype=jnp.uint32)
    state = step_lib.init(tuner, recipe, params, seeds)
    frozen = tuner_lib.partition(params, tuner.shapes())[1]
    settings = step_lib.Settings(
      lr=jnp.full(runs, 0.1),
      weight_decay=jnp.full(runs, 1e-4),
      query_dropout=jnp.full(runs, 0.1),
      normalize=jnp.ones(runs, bool),
    )
    order, mask, factor = _batches(batch_size, steps)
    data = _data(tuner, rows or order.size, stored)
    return state, frozen, settings, data, order, mask, factor

  images = batch_size * steps
  # The stream is shared by all runs.
  stream = 0 if stored else images * flops.stream(config)
  reading = images * runs * flops.reading_step(tuner)
  return Case(
    name_of(tuner) + (", stored" if stored else ""),
    step_lib.train_steps,
    (tuner, recipe),
    build,
    stream + reading,
    reading,
  )


def finetune(
  config: vit_config_lib.ViTConfig,
  num_classes: int,
  batch_size: int,
  *,
  rows: int = 0,
  steps: int = 1,
) -> Case:
  """What VQT is compared with: the gradient of every leaf, and Adam."""

  def build():
    probe = vqt_jax.make_tuner("linear", config, num_classes)
    params = _params(config, "float32")
    trained = {**probe.init(jax.random.key(0)), "backbone": params}
    state = trained, optim.optimizer("adam", 0.1, 0.0).init(trained)
    order, mask, _ = _batches(batch_size, steps)
    data = _data(probe, rows or order.size, stored=False)
    return state, data, order, mask

  return Case(
    "full fine-tuning",
    _finetune_steps,
    (config,),
    build,
    batch_size * steps * flops.finetune_step(config, num_classes),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _finetune_steps(config, state, data, order, mask):
  """Trains every leaf of {"backbone", "tuner", "head"} for S steps."""
  probe = vqt_jax.make_tuner("linear", config, NUM_CLASSES)
  update = optim.optimizer("adam", 1e-4, 1e-4).update

  def objective(trained, batch):
    images = batch["image"].reshape(-1, *config.image_size, 3)
    stream = vit.ViT(config).apply({"params": trained["backbone"]}, images)
    logits = probe(trained, None, stream.final).logits
    logs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logs, batch["label"][:, None], axis=1)
    return -jnp.mean(picked[:, 0] * batch["mask"])

  def body(state, inputs):
    trained, opt_state = state
    index, mask = inputs
    batch = _spread({**step_lib.take(data, index), "mask": mask})
    loss, grads = jax.value_and_grad(objective)(trained, batch)
    updates, opt_state = update(grads, opt_state, trained)
    trained = jax.tree.map(jnp.add, trained, updates)
    return (trained, opt_state), loss

  state, losses = jax.lax.scan(body, state, (order, mask))
  return state, losses


def _spread(batch):
  """Examples over the mesh's `data`, if one is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return batch
  return jax.lax.with_sharding_constraint(batch, P("data"))


def _params(config, dtype):
  """Random weights, matrices in `dtype`, as of `sharding.place_backbone`."""
  params = vit.init_params(config, jax.random.key(1))

  def cast(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    keep = re.search(r"(LayerNorm_\d|encoder_norm)/", name)
    return leaf if keep else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def _batches(batch_size, steps):
  order = jnp.arange(steps * batch_size, dtype=jnp.int32)
  order = order.reshape(steps, batch_size)
  return order, jnp.ones(order.shape), jnp.ones(steps)


def _data(tuner, rows, stored):
  config, key = tuner.config, jax.random.key(2)
  label = jnp.arange(rows, dtype=jnp.int32) % tuner.num_classes
  if not stored:
    height, width = config.image_size
    shape = (rows, height, 3 * width)
    image = jax.random.uniform(key, shape, config.dtype, minval=-1)
    return {"image": image, "label": label}
  data = {"final": jax.random.normal(key, (rows, config.width)), "label": label}
  if tuner.reads_blocks:
    count = config.num_tokens // tuner.window
    shape = (config.depth, rows, count, config.width)
    data["tokens"] = jax.random.normal(key, shape, config.dtype)
  return data
