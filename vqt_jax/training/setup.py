"""Looks up what a config names and places it on the devices."""

from collections.abc import Callable, Sequence
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
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit_config as vit_config_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import mesh as mesh_lib


@dataclasses.dataclass
class RunContext:
  """Everything that a config names, looked up and placed on the devices."""

  config: ml_collections.ConfigDict
  workdir: files.Path
  console: console_lib.Console
  mesh: jax.sharding.Mesh
  backbone: backbone_lib.Backbone
  task: data.Task
  tuner: tuner_lib.Tuner
  params: Any  # Frozen weights, on the devices.


def find_task(config: ml_collections.ConfigDict) -> data.Task:
  """Return the task of a config; raise a `UserError` if there is none."""
  options = {name: config[name] for name in fields.TASK_FIELDS}
  return data.make_task(config.task, **options)


def backbone_options(
  config: ml_collections.ConfigDict, platform: str
) -> dict[str, Any]:
  """Return the options of a backbone that decide its shapes and dtypes.

  Args:
    config: resolved.
    platform: "cpu", "gpu" or "tpu"; decides the dtype if the config does not.
  """
  return {
    "variant": config.variant,
    "image_size": checkpoints.size_from_fields(
      config.image_size, config.image_width
    ),
    "pool_type": config.pool_type,
    "gelu": config.gelu,
    "dtype": config.dtype or ("float32" if platform == "cpu" else "bfloat16"),
    "trained_size": checkpoints.size_from_fields(
      config.trained_size, config.trained_width
    ),
  }


def find_tuner(
  config: ml_collections.ConfigDict,
  vit_config: vit_config_lib.ViTConfig,
  task: data.Task,
) -> tuner_lib.Tuner:
  """Return the tuner of a config.

  Raises:
    UserError: patches do not cover the images, or options of the method do not
      fit the backbone.
  """
  size = checkpoints.size_from_fields(config.image_size, config.image_width)
  checkpoints.check_image_size(vit_config.patch_size, size)
  return tuner_lib.make_tuner(
    config.method,
    vit_config,
    task.num_classes,
    **fields.tuner_options(config),
  )


def find_mesh(
  config: ml_collections.ConfigDict,
  vit_config: vit_config_lib.ViTConfig,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Return the mesh of a config over devices (None: all of all processes)."""
  mesh = mesh_lib.make_mesh(model=config.mesh.model, devices=devices)
  sharding_lib.check_heads(mesh, vit_config.num_heads)
  return mesh


def prepare(config, workdir, console) -> RunContext:
  task = find_task(config)
  data.check_prepared(task)
  if warning := data.size_warning(task):
    console.note(warning)

  options = backbone_options(config, jax.default_backend())
  with contextlib.ExitStack() as download:
    backbone = checkpoints.load_backbone(
      config.init,
      value_range=config.value_range,
      **options,
      progress=_download_line(console, download),
    )
  tuner = find_tuner(config, backbone.config, task)
  mesh = find_mesh(config, backbone.config)
  context = RunContext(
    config=config,
    workdir=workdir,
    console=console,
    mesh=mesh,
    backbone=backbone,
    task=task,
    tuner=tuner,
    params=sharding_lib.place_backbone(
      backbone.params, mesh, backbone.config.dtype
    ),
  )
  console.header(_describe(context))
  return context


def _download_line(
  console: console_lib.Console, until: contextlib.ExitStack
) -> Callable[[int, int | None], None]:
  """Return a callback that shows a download, if there is one."""
  lines = []

  def progress(done: int, total: int | None) -> None:
    if not lines:
      size = (total or done) // 2**20
      lines.append(
        until.enter_context(console.progress("backbone", size, "MiB"))
      )
    lines[0].update(done // 2**20)

  return progress


def count_parameters(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _describe(context: RunContext) -> list[str]:
  """Describe the run in two lines, and assumed settings in a third."""
  c, tuner = context.backbone.config, context.tuner
  size = "x".join(map(str, dict.fromkeys(c.image_size)))
  group = " (vtab-1k)" if context.task.group else ""
  trained = tuner.shapes()
  shapes = f"head {tuner.num_features:,} x {tuner.num_classes}"
  if tuner.has_queries:
    shapes = f"queries {c.depth} x {tuner.num_queries} x {c.width}, {shapes}"
  elif tuner.reader.window:
    count = c.num_tokens // tuner.window
    shapes += f" (of {c.depth} blocks {count} x {tuner.window} tokens each)"
  if tuner.editor:
    own = count_parameters(trained["tuner"]["editor"])
    shapes = f"{tuner.editor} {own:,}, {shapes}"
  return [
    f"{tuner.method} on {context.task.name}{group}   ViT-{c.variant}"
    f" {context.backbone.source}, {size} px, inputs"
    f" {context.backbone.value_range}, {c.dtype}  "
    f" {context.mesh.size} x {jax.devices()[0].device_kind}",
    f"frozen {count_parameters(context.backbone.params):,}   trained"
    f" {count_parameters(trained):,}: {shapes}",
    *_assumed(context.backbone),
  ]


def _assumed(backbone: backbone_lib.Backbone) -> list[str]:
  """Name settings that neither file nor config tells, with their flags."""
  settings = {
    "value_range": f"inputs {backbone.value_range}",
    "gelu": f"{backbone.config.gelu} GELU",
  }
  each = [f"{settings[x]} (--config.{x})" for x in backbone.assumed]
  if not each:
    return []
  return [f"assumed, as the file does not tell: {', '.join(each)}"]
