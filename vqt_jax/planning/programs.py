"""The programs that a run compiles, with shapes for arguments.

They are the functions that `training.run` calls. With shapes and shardings in
place of arrays they compile for devices that are not there.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vqt_jax.features import batches
from vqt_jax.features import examples
from vqt_jax.features import images
from vqt_jax.features import storage
from vqt_jax.features import store
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.planning import tpus
from vqt_jax.runtime import ahead
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import exact
from vqt_jax.training import protocol
from vqt_jax.training import ridge
from vqt_jax.training import selected_ridge
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial_memory

Shapes = Any  # A tree of `jax.ShapeDtypeStruct` with shardings.


@dataclasses.dataclass(frozen=True)
class PlanContext:
  """Everything that a config names, on devices that need not be there.

  Attributes:
    config: resolved.
    tuner: the method, on the backbone.
    chip: of each device.
    mesh: of the devices.
    counts: split -> number of images.
    loaded_splits: split -> split that is loaded for it.
    storage: of training images or their features, see `storage.choose`.
    reason: for `storage`.
    available: bytes of device memory that they may take.
  """

  config: ml_collections.ConfigDict
  tuner: tuner_lib.Tuner
  chip: tpus.Chip
  mesh: jax.sharding.Mesh
  counts: dict[str, int]
  loaded_splits: dict[str, str]
  storage: str
  reason: str
  available: int

  @property
  def layout(self) -> store.Layout:
    return store.make_layout(self.config, self.tuner, self.mesh)

  def on_device(self, split: str) -> store.Layout:
    """Return the layout of a split's features where they are used."""
    if self.storage != "device":
      return self.layout
    count = self.counts[self.loaded_splits[split]]
    return store.device_layout(self.layout, self.tuner, count, self.available)

  @property
  def stored(self) -> bool:
    return self.storage in storage.FEATURE_STORAGE

  @property
  def selects(self) -> bool:
    """True if new heads are trained on some of the features."""
    return self.config.keep_fraction != (1.0,)

  @property
  def eval_batch_size(self) -> int:
    return examples.eval_batch_size(self.config, self.mesh)

  def params(self) -> Shapes:
    """Return shapes of the frozen weights."""
    c = self.tuner.config
    return sharding_lib.backbone_shapes(vit.param_shapes(c), self.mesh, c.dtype)

  def replicated(self, tree: Any) -> Shapes:
    """Return shapes of arrays that are replicated over the devices."""
    place = mesh_lib.replicated_sharding(self.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )

  def trials_at_once(self, tuner: tuner_lib.Tuner) -> int:
    return trial_memory.trials_at_once(
      tuner,
      self.config.batch_size,
      self.mesh,
      self.config.remat,
      self.chip.memory,
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """A function with the shapes of its arguments, and what surrounds a call.

  Attributes:
    name: on the terminal.
    function: made by `jax.jit`.
    args: static arguments, then shapes.
    images: in a step, over all devices.
    trials: side by side.
    steps: in a call.
    in_all: steps of the whole protocol.
    weights: shapes of the frozen weights.
    data: shapes of the data on the devices at that time.
    trained: shapes of parameters, moments and the like of the trials.
    results: number of its results that are there at the same time.
  """

  name: str
  function: Callable[..., Any]
  args: tuple[Any, ...]
  images: int
  trials: int
  steps: int
  in_all: int
  weights: Shapes
  data: Shapes
  trained: Shapes = ()
  results: int = 1


def all_programs(context: PlanContext) -> list[Program]:
  """Return extraction (if features are stored), training stages, and test.

  Judging on val is left out: it takes less than an epoch of the search. Feature
  selection counts as two more trainings of the seeds, of which it is a part;
  the choice of a fraction as three more searches, which it is at most. Folds
  of a mixture count as one more training each.
  """
  if context.tuner.members:
    return _of_members(context)
  if context.config.solver == "exact":
    heads = [reading(context)]
    if context.tuner.reads_blocks:
      heads.append(solving(context))
    first = [extraction(context)] if context.stored else []
    return [*first, *heads, test(context)]
  stages = _stages(context)
  times = [1, 1 + 2 * context.selects][-len(stages) :]
  times[0] += 3 * (len(context.config.keep_fraction) > 1)
  found = [training(context, stage) for stage in stages]
  found = [
    dataclasses.replace(each, in_all=each.in_all * more)
    for each, more in zip(found, times)
  ]
  if context.stored:
    found.insert(0, extraction(context))
  return [*found, test(context)]


def _of_members(context: PlanContext) -> list[Program]:
  """Return extraction, what each member of a mixture adds, and the test."""
  found = [extraction(context)] if context.stored else []
  for member in context.tuner.members:
    alone = dataclasses.replace(context, tuner=member)
    if member.reader.is_fixed:
      found += [reading(alone), solving(alone)]
      continue
    *search, seeds = _stages(alone)
    fold = dataclasses.replace(seeds, label="folds", trials=seeds.trials[:1])
    folds = training(alone, fold)
    folds = dataclasses.replace(folds, in_all=exact.FOLDS * folds.in_all)
    trained = [training(alone, each) for each in search]
    found += [*trained, folds, training(alone, seeds)]
  return [*found, test(context)]


def search(context: PlanContext) -> Program:
  """Return the program of the first stage."""
  return training(context, first_stage(context))


def first_stage(context: PlanContext) -> stage_lib.Stage:
  """Return the search, or the seeds if there is nothing to search."""
  return _stages(context)[0]


def _stages(context: PlanContext) -> list[stage_lib.Stage]:
  tuner = context.tuner.learner
  first = protocol.search_stage(context.config, tuner)
  seeds = protocol.seeds_stage(tuner, first.trials[0], context.config.seeds)
  return [first, seeds] if len(first.trials) > 1 else [seeds]


def extraction(context: PlanContext) -> Program:
  """Return the backbone over all images whose features are stored."""
  size, c = context.eval_batch_size, context.tuner.config
  images = jax.ShapeDtypeStruct(
    (size, *c.image_size, 3),
    jnp.float32,
    sharding=mesh_lib.batch_sharding(context.mesh),
  )
  params = context.params()
  loaded = {context.loaded_splits[x] for x in ("train", "val", "trainval")}
  return Program(
    name="extraction",
    function=store.extractor(context.layout),
    args=(params, images),
    images=size,
    trials=1,
    steps=1,
    in_all=sum(-(-context.counts[x] // size) for x in loaded),
    weights=params,
    data=_resident(context, "trainval"),
    results=2,  # One is computed while another is used.
  )


def training(context: PlanContext, stage: stage_lib.Stage) -> Program:
  """Return an epoch of a stage, in one call or one call per step."""
  trials = stage.trials[: context.trials_at_once(stage.tuner)]
  packs = -(-len(stage.trials) // len(trials))
  stage = dataclasses.replace(stage, trials=trials)
  static = stages_lib.static_settings(context.config, stage)
  params = context.params()
  seeds = jnp.zeros(len(trials), jnp.uint32)
  init = functools.partial(step_lib.init, stage.tuner, static)
  state = context.replicated(jax.eval_shape(init, params, seeds))
  frozen = tuner_lib.partition(params, stage.tuner.shapes())[1]
  count = context.counts[stage.split]
  index, mask = batches.batch_order(
    np.arange(count), context.config.batch_size, context.mesh.shape["data"]
  )
  in_epoch, on_device = len(index), _resident(context, stage.split)
  one_step = on_device is None
  if one_step:  # A call a step.
    index, mask = index[:1], mask[:1]
    data = _batch(context, index.shape[1])
    on_device = [data] * (ahead.PREFETCH + 1)
  else:
    data = on_device
  settings, factor, index, count = context.replicated(
    (stage.settings(), np.ones(len(index), np.float32), index, np.int32(0))
  )
  mask = _mask(context, mask, shared=context.storage == "stream")
  return Program(
    name=stage.label,
    function=step_lib.train_steps,
    args=(
      stage.tuner,
      static,
      state,
      frozen,
      settings,
      data,
      index,
      mask,
      factor,
      *([] if one_step else [count]),
    ),
    images=index.shape[1],
    trials=len(trials),
    steps=len(index),
    in_all=packs * in_epoch * context.config.epochs,
    weights=params,
    data=on_device,
    trained=state,
  )


def reading(context: PlanContext) -> Program:
  """Return a batch of the features from which a head is computed."""
  size, count = context.eval_batch_size, context.counts["trainval"]
  tuner, params = context.tuner, context.params()
  stage = protocol.exact_stage(context.config, tuner)
  on_device = _resident(context, "trainval")
  data = _batch(context, size) if on_device is None else on_device
  variables, normalize, order, mask = context.replicated(
    (
      tuner.shapes(),
      np.bool_(True),
      np.zeros(size, np.int32),
      np.zeros(size, np.float32),
    )
  )
  return Program(
    name=stage.label,
    function=step_lib.features_of,
    args=(tuner, variables, normalize, params, data, order, mask),
    images=size,
    trials=1,
    steps=1,
    in_all=len(stage.trials) * -(-count // size),
    weights=params,
    data=on_device if on_device is not None else [data] * 2,
    trained=variables,
  )


def solving(context: PlanContext) -> Program:
  """Return the solution of a head for one penalty, in closed form."""
  tuner, count = context.tuner, context.counts["trainval"]
  stage = protocol.exact_stage(context.config, tuner)
  penalties = len(ridge.PENALTIES + ridge.FINER)
  if stage.fractions:
    tried = len(stage.fractions) * len(selected_ridge.PENALTY_FACTORS)
    penalties += exact.FOLDS * (1 + tried)
    function, args = selected_ridge.largest_program(count, tuner.num_classes)
  else:
    function, args = ridge.largest_program(
      count, tuner.num_features, tuner.num_classes
    )
  return Program(
    name="penalty",
    function=function,
    args=context.replicated(args),
    images=count,
    trials=1,
    steps=1,
    in_all=len(stage.trials) * penalties,
    weights=(),
    data=_resident(context, "trainval"),
  )


def test(context: PlanContext) -> Program:
  """Return all seeds over the test set, with and without selected features."""
  size, c = context.eval_batch_size, context.tuner.config
  trials = len(protocol.planned(context.config, context.tuner)[-1].trials)
  several = lambda x: jax.ShapeDtypeStruct((trials, *x.shape), x.dtype)
  ready = context.replicated(
    step_lib.TrainedTrials(
      jax.tree.map(several, context.tuner.shapes()),
      jax.ShapeDtypeStruct((trials,), bool),
    )
  )
  candidates = 1 + context.selects
  over = mesh_lib.batch_sharding(context.mesh)
  data = {
    "image": jax.ShapeDtypeStruct(
      (size, *c.image_size, 3), jnp.float32, sharding=over
    ),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=over),
  }
  index = context.replicated(np.zeros((1, size), np.int32))
  mask = _mask(context, np.zeros((1, size), np.float32), shared=True)
  params = context.params()
  return Program(
    name="test",
    function=step_lib.eval_steps,
    args=(
      (context.tuner,) * candidates,
      (ready,) * candidates,
      params,
      data,
      index,
      mask,
    ),
    images=size,
    trials=trials * candidates,
    steps=1,
    in_all=-(-context.counts["test"] // size),
    weights=params,
    data=[data, data, _resident(context, "trainval")],
    trained=(ready,) * candidates,
  )


def _resident(context: PlanContext, split: str) -> Shapes | None:
  """Return shapes of resident data of a split; None: it is sent by step."""
  c, count = context.tuner.config, context.counts[context.loaded_splits[split]]
  if context.storage == "device":
    size = context.eval_batch_size
    return store.store_shapes(
      context.on_device(split), -(-count // size) * size
    )
  if context.storage == "images":
    return images.image_shapes(count, c.image_size, context.mesh, c.dtype)
  return None


def _mask(context: PlanContext, mask: np.ndarray, shared: bool) -> Shapes:
  """Return the shape of a mask (S, B), replicated or sharded like images."""
  if not shared:
    return context.replicated(mask)
  over = mesh_lib.batch_sharding(context.mesh, 1)
  return jax.ShapeDtypeStruct(mask.shape, mask.dtype, sharding=over)


def _batch(context: PlanContext, size: int) -> Shapes:
  """Return shapes of the data that are sent to the devices for one step."""
  c, layout = context.tuner.config, context.layout
  if not context.stored:
    over = mesh_lib.batch_sharding(context.mesh)
    shape = (size, *c.image_size, 3)
    return {
      "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over),
      "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=over),
    }
  shape = lambda name, x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=layout.sharding(name)
  )
  on_device = store.store_shapes(layout, size)
  return {name: shape(name, x) for name, x in on_device.items()}
