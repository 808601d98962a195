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
from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.config import resolve
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit_config as vit_config_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import mesh as mesh_lib

_MOST_CLASSES = 30  # are shown.


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
    "num_heads": config.num_heads or None,
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


def prepare(config, workdir, console, task=None) -> RunContext:
  task = check_data(config, task or find_task(config), console)
  options = backbone_options(config, jax.default_backend())
  with contextlib.ExitStack() as download:
    backbone = checkpoints.load_backbone(
      config.init,
      value_range=config.value_range,
      **options,
      progress=_late_line(console, download, "backbone", "MiB", 2**20),
    )
  config = resolve.fill_epochs(config, data.num_examples(task, "trainval"))
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


def check_data(
  config: ml_collections.ConfigDict,
  task: data.Task,
  console: console_lib.Console,
) -> data.Task:
  """Look at a task's data before any training, and tell what is there.

  Returns:
    The task, without images that cannot be used if `config.skip_bad`.

  Raises:
    UserError: something is missing, or images cannot be used.
  """
  data.check_prepared(task)
  for note in data.notes(task):
    console.note(note)
  with contextlib.ExitStack() as until:
    progress = _late_line(console, until, "check", "image")
    faults = data.find_faults(task, progress)
  for name, reason in faults.items():
    console.note(f"{name}: {reason}", "bad")
  if faults and not config.skip_bad:
    first = "; ".join(f"{name}: {faults[name]}" for name in list(faults)[:3])
    raise errors.UserError(
      f"Images of {task.name} that cannot be used: {len(faults)}, all listed"
      f" above ({first}{'; ...' * (len(faults) > 3)}). Mend or remove them, or"
      " go on without them: --config.skip_bad=true"
    )
  if faults:
    task = data.leave_out(task, faults)
    console.note(f"left out: {len(faults)}", "bad")
  if isinstance(task, data.FileTask):
    _show_classes(console, task)
  return task


def _show_classes(console: console_lib.Console, task: data.FileTask) -> None:
  """Show how many images of each class are in each split."""
  counts = task.counts()
  rows = [
    [name, *(int(count[i]) for count in counts.values())]
    for i, name in enumerate(task.class_names)
  ]
  totals = [int(count.sum()) for count in counts.values()]
  if len(rows) > _MOST_CLASSES:
    left = len(rows) - _MOST_CLASSES
    rest = [int(x[_MOST_CLASSES:].sum()) for x in counts.values()]
    rows = [*rows[:_MOST_CLASSES], [f"{left} more", *rest]]
  console.table([f"images of {task.name}", *counts], [*rows, ["all", *totals]])


def _late_line(
  console: console_lib.Console,
  until: contextlib.ExitStack,
  name: str,
  unit: str,
  scale: int = 1,
) -> Callable[[int, int | None], None]:
  """Return a callback that shows a progress line from its first call on.

  Args:
    console: shows it.
    until: the line ends when this is closed.
    name: label of the line.
    unit: what is counted.
    scale: the callback's numbers are divided by this.
  """
  lines = []

  def progress(done: int, total: int | None) -> None:
    if not lines:
      line = console.progress(name, (total or done) // scale, unit)
      lines.append(until.enter_context(line))
    lines[0].update(done // scale)

  return progress


def count_parameters(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _describe(context: RunContext) -> list[str]:
  """Describe the run in two lines, and assumed settings in a third."""
  c, tuner = context.backbone.config, context.tuner
  size = "x".join(map(str, dict.fromkeys(c.image_size)))
  group = " (vtab-1k)" if context.task.group else ""
  trained = tuner.shapes()
  if tuner.reader.is_fixed:
    trained["tuner"] = {}
  shapes = f"head {tuner.num_features:,} x {tuner.num_classes}"
  if tuner.has_queries:
    shapes = f"queries {c.depth} x {tuner.num_queries} x {c.width}, {shapes}"
  elif tuner.reader.is_fixed:
    shapes += f" (read by {tuner.num_queries} random queries per block)"
  elif tuner.members:
    names = [each.method for each in tuner.members]
    shapes = f"{' and '.join(names)}, whose answers are mixed"
  elif tuner.reader.init:
    own = count_parameters(trained["tuner"])
    shapes = f"{context.config.method} {own:,}, {shapes}"
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
