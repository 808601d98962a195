"""A run from config to results: the protocol's stages, then the test."""

from collections.abc import Callable
import contextlib
import dataclasses
import math
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax import backbone as backbone_lib
from vqt_jax import checkpoints
from vqt_jax import config as config_lib
from vqt_jax import console as console_lib
from vqt_jax import data
from vqt_jax import files
from vqt_jax import memory
from vqt_jax import parallel
from vqt_jax import results as results_lib
from vqt_jax import tuner as tuner_lib
from vqt_jax.train import checkpoint
from vqt_jax.train import examples as examples_lib
from vqt_jax.train import forecast as forecast_lib
from vqt_jax.train import outcome
from vqt_jax.train import protocol
from vqt_jax.train import stages as stages_lib
from vqt_jax.train import step as step_lib


def train(
  config: ml_collections.ConfigDict,
  workdir: files.PathLike,
  console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Trains and tests one method on one task; what `main.py` calls.

  Interrupted (SIGTERM, or killed outright), the same call goes on where the
  last checkpoint was and ends with the same bits. A finished run is not redone.

  Args:
    config: made from `config.default_config()`.
    workdir: a folder, or `gs://BUCKET/FOLDER`; gets `config.json`,
      `metrics.jsonl`, `results.json`, TensorBoard events, `checkpoints/`,
      `tuned/` and `report.png`.
    console: what a person sees; None: stderr, of the first process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend.
    Stopped: asked to stop by a signal; everything is saved.
  """
  config = config_lib.resolve(config)
  console = console or console_lib.of_process()
  workdir = files.path(workdir)
  with contextlib.ExitStack() as opened:
    with parallel.together():
      if parallel.is_first():
        opened.enter_context(results_lib.open_workdir(config, workdir))
      finished = files.exists(workdir / outcome.RESULTS)
    if not parallel.any_process(finished):
      return _train(config, workdir, console)
    with parallel.together():
      results = outcome.read(workdir)
    console.note("this run is finished already; it is not done again")
    outcome.show(console, workdir, results)
    return results


def _train(config, workdir, console) -> dict[str, Any]:
  with checkpoint.StopSignal() as stop:
    started, peak = time.monotonic(), memory.Peak()
    with stop.at_once(), parallel.together():
      job = _prepare(config, workdir, console)
    with jax.set_mesh(job.mesh):
      saver = checkpoint.Checkpointer(
        workdir / "checkpoints", config.checkpoint_seconds
      )
      metrics = results_lib.MetricsWriter(workdir)
      try:
        examples = examples_lib.Examples(
          config,
          console,
          job.task,
          job.backbone,
          job.tuner,
          job.params,
          job.mesh,
        )
        examples.check_classes()
        planned = protocol.planned(config, job.tuner)
        with parallel.together():
          forecast = forecast_lib.Forecast(job, examples, planned)
        stages = stages_lib.Stages(
          job, examples, saver, metrics, stop, peak, forecast
        )
        found, candidates = protocol.candidates(job, stages, examples)
        test = _test(job, stages, examples, candidates)
      finally:
        saver.close()
        metrics.close()
    with parallel.together():
      seconds = time.monotonic() - started
      return outcome.write(job, found, candidates, test, seconds, peak)


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


def _prepare(config, workdir, console) -> Job:
  task = data.make_task(
    config.task, **{name: config[name] for name in config_lib.TASK_FIELDS}
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
    **config_lib.of_tuner(config),
  )
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model)
  parallel.check_heads(mesh, backbone.config.num_heads)
  job = Job(
    config=config,
    workdir=workdir,
    console=console,
    mesh=mesh,
    backbone=backbone,
    task=task,
    tuner=tuner,
    params=parallel.place_backbone(
      backbone.params, mesh, backbone.config.dtype
    ),
  )
  console.header(_describe(job))
  return job


def _test(job, stages, examples, candidates) -> dict[str, Any]:
  """All seeds of all candidates over the test set, in one pass."""
  started = time.monotonic()
  accuracy = stages.evaluate(
    "test",
    None,
    [
      (
        each.tuner,
        step_lib.Ready(
          each.variables, np.array([r.normalize for r in each.runs])
        ),
      )
      for each in candidates
    ],
    "test",
  )
  return {
    "accuracy": accuracy,
    "images": examples.count("test"),
    "seconds": time.monotonic() - started,
  }


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


def _count(tree: Any) -> int:
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
    own = _count(trained["tuner"]["editor"])
    shapes = f"{tuner.editor} {own:,}, {shapes}"
  return [
    f"{tuner.method} on {job.task.name}{group}   ViT-{c.variant}"
    f" {job.backbone.source}, {size} px, inputs {job.backbone.value_range},"
    f" {c.dtype}   {job.mesh.size} x {jax.devices()[0].device_kind}",
    f"frozen {_count(job.backbone.params):,}   trained"
    f" {_count(trained):,}: {shapes}",
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
