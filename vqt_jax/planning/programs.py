"""The programs that a run compiles, from shapes alone.

What `train.run` would call with arrays is here called with their shapes and
places, so that it can be compiled for devices that are not there.
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
from vqt_jax.features import memory_budget
from vqt_jax.features import store
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.planning import tpus
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import loop
from vqt_jax.training import protocol
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import step as step_lib

Shapes = Any  # A tree of `jax.ShapeDtypeStruct` with shardings.


@dataclasses.dataclass(frozen=True)
class Job:
  """What is planned.

  Attributes:
    config: of the run, resolved.
    tuner: the method, on the backbone.
    chip: of each device.
    mesh: of devices that need not be there.
    counts: split -> images.
    base: split -> the split that is loaded for it.
    place: where the training images' features, or they themselves, live; see
      `places.choose`.
    why: they live there.
    room: bytes that they may take in the devices' memory.
  """

  config: ml_collections.ConfigDict
  tuner: tuner_lib.Tuner
  chip: tpus.Chip
  mesh: jax.sharding.Mesh
  counts: dict[str, int]
  base: dict[str, str]
  place: str
  why: str
  room: int

  @property
  def layout(self) -> store.Layout:
    return store.layout_of(self.config, self.tuner, self.mesh)

  def held(self, split: str) -> store.Layout:
    """Of the features of a split where they are used."""
    if self.place != "device":
      return self.layout
    count = self.counts[self.base[split]]
    return store.held_layout(self.layout, self.tuner, count, self.room)

  @property
  def stored(self) -> bool:
    return self.place in memory_budget.FEATURES

  @property
  def selects(self) -> bool:
    """Whether new heads are trained on some of the features."""
    return self.config.keep_fraction != (1.0,)

  @property
  def eval_batch_size(self) -> int:
    shards = self.mesh.shape["data"]
    return -(-self.config.eval_batch_size // shards) * shards

  def params(self) -> Shapes:
    """The frozen weights."""
    c = self.tuner.config
    return mesh_lib.backbone_shapes(vit.param_shapes(c), self.mesh, c.dtype)

  def replicated(self, tree: Any) -> Shapes:
    """Shapes of arrays, or such shapes, on every device."""
    place = mesh_lib.replicated(self.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )

  def runs_at_once(self, tuner: tuner_lib.Tuner) -> int:
    return memory_budget.runs_at_once(
      tuner,
      self.config.batch_size,
      self.mesh,
      self.config.remat,
      self.chip.memory,
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """One of them.

  Attributes:
    name: for people.
    function: made by `jax.jit`.
    args: static ones, then shapes.
    images: in a step, over all devices.
    runs: side by side.
    steps: in a call.
    in_all: steps in the whole protocol.
    weights: the frozen ones.
    data: what lies on the devices meanwhile.
    trained: parameters, moments and the like of the runs.
    results: how many of its results are there at the same time.
  """

  name: str
  function: Callable[..., Any]
  args: tuple[Any, ...]
  images: int
  runs: int
  steps: int
  in_all: int
  weights: Shapes
  data: Shapes
  trained: Shapes = ()
  results: int = 1


def all_programs(job: Job) -> list[Program]:
  """Extraction (if features are kept), training of both phases, test.

  Val is left out (it takes less than an epoch of the search). Feature selection
  is taken for two more trainings of the seeds, of which it is a part, and the
  choice of a fraction for three more searches, which it is at most.
  """
  stages = _stages(job)
  times = [1, 1 + 2 * job.selects][-len(stages) :]
  times[0] += 3 * (len(job.config.keep_fraction) > 1)
  found = [training(job, stage) for stage in stages]
  found = [
    dataclasses.replace(each, in_all=each.in_all * more)
    for each, more in zip(found, times)
  ]
  if job.stored:
    found.insert(0, extraction(job))
  return [*found, test(job)]


def search(job: Job) -> Program:
  """Training in its first phase, which most runs share."""
  return training(job, first_stage(job))


def first_stage(job: Job) -> stage_lib.Stage:
  """The search, or the seeds if there is nothing to search."""
  return _stages(job)[0]


def _stages(job: Job) -> list[stage_lib.Stage]:
  first = protocol.search_stage(job.config, job.tuner)
  seeds = protocol.seeds_stage(job.tuner, first.runs[0], job.config.seeds)
  return [first, seeds] if len(first.runs) > 1 else [seeds]


def extraction(job: Job) -> Program:
  """The backbone over all images whose features are kept."""
  size, c = job.eval_batch_size, job.tuner.config
  images = jax.ShapeDtypeStruct(
    (size, *c.image_size, 3),
    jnp.float32,
    sharding=mesh_lib.batch_sharding(job.mesh),
  )
  params = job.params()
  bases = {job.base[split] for split in ("train", "val", "trainval")}
  return Program(
    name="extraction",
    function=store.runner(job.layout),
    args=(params, images),
    images=size,
    runs=1,
    steps=1,
    in_all=sum(-(-job.counts[base] // size) for base in bases),
    weights=params,
    data=_resident(job, "trainval"),
    results=2,  # One is computed while another is used.
  )


def training(job: Job, stage: stage_lib.Stage) -> Program:
  """An epoch of a stage, in one call or a call a step."""
  runs = stage.runs[: job.runs_at_once(stage.tuner)]
  stage, packs = (
    dataclasses.replace(stage, runs=runs),
    (-(-len(stage.runs) // len(runs))),
  )
  recipe, params = stages_lib.recipe_of(job.config, stage), job.params()
  seeds = jnp.zeros(len(runs), jnp.uint32)
  init = functools.partial(step_lib.init, stage.tuner, recipe)
  state = job.replicated(jax.eval_shape(init, params, seeds))
  frozen = tuner_lib.partition(params, stage.tuner.shapes())[1]
  phase = loop.Phase(
    stage.name,
    runs,
    None,
    job.config.epochs,
    job.config.warmup_epochs,
    per_step=False,
    least=0,
  )
  count = job.counts[stage.split]
  index, mask = store.order(
    np.arange(count), job.config.batch_size, job.mesh.shape["data"]
  )
  in_epoch, held = len(index), _resident(job, stage.split)
  if held is None:  # A call a step.
    index, mask = index[:1], mask[:1]
    data = _batch(job, index.shape[1])
    held = [data] * (batches.AHEAD + 1)
  else:
    data = held
  settings, factor, index = job.replicated(
    (phase.settings, np.ones(len(index), np.float32), index)
  )
  mask = _mask(job, mask, shared=job.place == "stream")
  return Program(
    name=stage.label,
    function=step_lib.train_steps,
    args=(
      stage.tuner,
      recipe,
      state,
      frozen,
      settings,
      data,
      index,
      mask,
      factor,
    ),
    images=index.shape[1],
    runs=len(runs),
    steps=len(index),
    in_all=packs * in_epoch * job.config.epochs,
    weights=params,
    data=held,
    trained=state,
  )


def test(job: Job) -> Program:
  """All seeds over the test images, with and without selected features."""
  size, c = job.eval_batch_size, job.tuner.config
  runs = len(job.config.seeds)
  several = lambda x: jax.ShapeDtypeStruct((runs, *x.shape), x.dtype)
  ready = job.replicated(
    step_lib.Ready(
      jax.tree.map(several, job.tuner.shapes()),
      jax.ShapeDtypeStruct((runs,), bool),
    )
  )
  candidates = 1 + job.selects
  over = mesh_lib.batch_sharding(job.mesh)
  data = {
    "image": jax.ShapeDtypeStruct(
      (size, *c.image_size, 3), jnp.float32, sharding=over
    ),
    "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=over),
  }
  index = job.replicated(np.zeros((1, size), np.int32))
  mask = _mask(job, np.zeros((1, size), np.float32), shared=True)
  params = job.params()
  return Program(
    name="test",
    function=step_lib.eval_steps,
    args=(
      (job.tuner,) * candidates,
      (ready,) * candidates,
      params,
      data,
      index,
      mask,
    ),
    images=size,
    runs=runs * candidates,
    steps=1,
    in_all=-(-job.counts["test"] // size),
    weights=params,
    data=[data, data, _resident(job, "trainval")],
    trained=(ready,) * candidates,
  )


def _resident(job: Job, split: str) -> Shapes | None:
  """What of a split lies on the devices as long as it is used."""
  c, count = job.tuner.config, job.counts[job.base[split]]
  if job.place == "device":
    size = job.eval_batch_size
    return store.held_shapes(job.held(split), -(-count // size) * size)
  if job.place == "images":
    return store.resident_shapes(count, c.image_size, job.mesh, c.dtype)
  return None


def _mask(job: Job, mask: np.ndarray, shared: bool) -> Shapes:
  """Of steps (S, B), which comes from the host, or shared out with images."""
  if not shared:
    return job.replicated(mask)
  over = mesh_lib.batch_sharding(job.mesh, 1)
  return jax.ShapeDtypeStruct(mask.shape, mask.dtype, sharding=over)


def _batch(job: Job, size: int) -> Shapes:
  """What is sent to the devices for one step."""
  c, layout = job.tuner.config, job.layout
  if not job.stored:
    over = mesh_lib.batch_sharding(job.mesh)
    shape = (size, *c.image_size, 3)
    return {
      "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over),
      "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=over),
    }
  shape = lambda name, x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=layout.sharding(name)
  )
  held = store.held_shapes(layout, size)
  return {name: shape(name, x) for name, x in held.items()}
