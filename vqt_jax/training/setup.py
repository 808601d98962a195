"""Looks up what a config names and places it on the devices."""

from collections.abc import Callable
import contextlib
import dataclasses
import math
from typing import Any

import jax
import ml_collections

from vqt_jax import checkpoints
from vqt_jax import data
from vqt_jax.config import fields
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import mesh as mesh_lib


@dataclasses.dataclass
class Job:
  """What a run is made of, looked up and placed on the devices."""

  config: ml_collections.ConfigDict
  workdir: files.Path
  console: console_lib.Console
  mesh: jax.sharding.Mesh
  backbone: backbone_lib.Backbone
  task: data.Task
  tuner: tuner_lib.Tuner
  params: Any  # The backbone's, on the devices.


def prepare(config, workdir, console) -> Job:
  task = data.make_task(
    config.task, **{name: config[name] for name in fields.TASK_FIELDS}
  )
  data.check_prepared(task)
  if warning := data.size_warning(task):
    console.note(warning)

  on_cpu = jax.default_backend() == "cpu"
  image_size = checkpoints.size_of(config.image_size, config.image_width)
  with contextlib.ExitStack() as download:
    backbone = checkpoints.load_backbone(
      config.init,
      variant=config.variant,
      image_size=image_size,
      value_range=config.value_range,
      pool_type=config.pool_type,
      gelu=config.gelu,
      dtype=config.dtype or ("float32" if on_cpu else "bfloat16"),
      trained_size=checkpoints.size_of(
        config.trained_size, config.trained_width
      ),
      progress=_download_line(console, download),
    )
  checkpoints.check_image_size(backbone.config.patch_size, image_size)
  tuner = tuner_lib.make_tuner(
    config.method,
    backbone.config,
    task.num_classes,
    **fields.of_tuner(config),
  )
  mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.model)
  mesh_lib.check_heads(mesh, backbone.config.num_heads)
  job = Job(
    config=config,
    workdir=workdir,
    console=console,
    mesh=mesh,
    backbone=backbone,
    task=task,
    tuner=tuner,
    params=mesh_lib.place_backbone(
      backbone.params, mesh, backbone.config.dtype
    ),
  )
  console.header(_describe(job))
  return job


def _download_line(
  console: console_lib.Console, until: contextlib.ExitStack
) -> Callable[[int, int | None], None]:
  """A callback that shows a download, if there is one, as a phase."""
  lines = []

  def progress(done: int, total: int | None) -> None:
    if not lines:
      size = (total or done) // 2**20
      lines.append(until.enter_context(console.phase("backbone", size, "MiB")))
    lines[0].update(done // 2**20)

  return progress


def count_parameters(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _describe(job: Job) -> list[str]:
  """The resolved setting in two lines, and what of it is assumed in a third."""
  c, tuner = job.backbone.config, job.tuner
  size = "x".join(map(str, dict.fromkeys(c.image_size)))
  group = " (vtab-1k)" if job.task.group else ""
  trained = tuner.shapes()
  shapes = f"head {tuner.num_features:,} x {tuner.num_classes}"
  if tuner.has_queries:
    shapes = f"queries {c.depth} x {tuner.num_queries} x {c.width}, {shapes}"
  elif tuner.reads_blocks:
    count = c.num_tokens // tuner.window
    shapes += f" (of {c.depth} blocks {count} x {tuner.window} tokens each)"
  if tuner.editor:
    own = count_parameters(trained["tuner"]["editor"])
    shapes = f"{tuner.editor} {own:,}, {shapes}"
  return [
    f"{tuner.method} on {job.task.name}{group}   ViT-{c.variant}"
    f" {job.backbone.source}, {size} px, inputs {job.backbone.value_range},"
    f" {c.dtype}   {job.mesh.size} x {jax.devices()[0].device_kind}",
    f"frozen {count_parameters(job.backbone.params):,}   trained"
    f" {count_parameters(trained):,}: {shapes}",
    *_assumed(job.backbone),
  ]


def _assumed(backbone: backbone_lib.Backbone) -> list[str]:
  """A line of the settings that nothing told, and their flags."""
  settings = {
    "value_range": f"inputs {backbone.value_range}",
    "gelu": f"{backbone.config.gelu} GELU",
  }
  each = [f"{settings[x]} (--config.{x})" for x in backbone.assumed]
  if not each:
    return []
  return [f"assumed, as the file does not tell: {', '.join(each)}"]
