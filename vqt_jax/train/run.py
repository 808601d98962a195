"""A run from config to results: search settings, train seeds, test."""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import itertools
import math
import pathlib
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
from vqt_jax import parallel
from vqt_jax import results as results_lib
from vqt_jax import tuner as tuner_lib
from vqt_jax.train import checkpoint
from vqt_jax.train import examples as examples_lib
from vqt_jax.train import loop
from vqt_jax.train import outcome
from vqt_jax.train import step as step_lib


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    console: console_lib.Console | None = None,
) -> dict[str, Any]:
  """Trains and tests one method on one task; what `main.py` calls.

  Interrupted (SIGTERM, or killed outright), the same call goes on where the
  last checkpoint was and ends with the same bits. A finished run is not redone.

  Args:
    config: made from `config.default_config()`.
    workdir: gets `config.json`, `metrics.jsonl`, `results.json`, TensorBoard
      events, `checkpoints/`, `tuned/` and `report.png`.
    console: what a person sees; None: stderr, of the first process.

  Returns:
    The contents of `results.json`.

  Raises:
    UserError: something the user can mend.
    Stopped: asked to stop by a signal; everything is saved.
  """
  config = config_lib.resolve(config)
  if not console:
    screen = None if parallel.is_first() else io.StringIO()
    console = console_lib.Console(screen)
  workdir = pathlib.Path(workdir)
  with parallel.together():
    if parallel.is_first():
      results_lib.open_workdir(config, workdir)
  if (workdir / outcome.RESULTS).exists():
    results = results_lib.read_json(workdir / outcome.RESULTS)
    console.note("this run is finished already; it is not done again")
    outcome.show(console, workdir, results)
    return results

  with checkpoint.StopSignal() as stop:
    started = time.monotonic()
    with stop.at_once(), parallel.together():
      job = _prepare(config, workdir, console)
    with jax.set_mesh(job.mesh):
      saver = checkpoint.Checkpointer(
          workdir / "checkpoints", config.checkpoint_seconds
      )
      metrics = results_lib.MetricsWriter(workdir)
      try:
        phases = _Phases(job, saver, metrics, stop)
        search = phases.search()
        final = phases.seeds(search)
        test = phases.test()
      finally:
        saver.close()
        metrics.close()
    with parallel.together():
      seconds = time.monotonic() - started
      return outcome.write(job, search, final, test, seconds)


@dataclasses.dataclass
class Job:
  """What a run is made of, looked up and placed on the devices."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  console: console_lib.Console
  mesh: jax.sharding.Mesh
  backbone: backbone_lib.Backbone
  task: data.Task
  tuner: tuner_lib.Tuner
  recipe: step_lib.Recipe
  params: Any  # The backbone's, on the devices.
  num_trained: int  # Numbers that one run trains.
  state: step_lib.State | None = None  # Of the phase that trained last.

  @property
  def frozen(self) -> Any:
    """The frozen half of all parameters."""
    variables = jax.eval_shape(self.tuner.init, jax.random.key(0))
    return tuner_lib.partition(self.params, variables)[1]


def _prepare(config, workdir, console) -> Job:
  task = data.make_task(
      config.task, **{name: config[name] for name in config_lib.TASK_FIELDS}
  )
  data.check_prepared(task)
  if warning := data.size_warning(task):
    console.note(warning)

  on_cpu = jax.default_backend() == "cpu"
  image_size = (config.image_size, config.image_width or config.image_size)
  with contextlib.ExitStack() as download:
    backbone = checkpoints.load_backbone(
        config.init,
        variant=config.variant,
        image_size=image_size,
        value_range=config.value_range,
        pool_type=config.pool_type,
        gelu=config.gelu,
        dtype=config.dtype or ("float32" if on_cpu else "bfloat16"),
        progress=_download_line(console, download),
    )
  checkpoints.check_image_size(backbone.config.patch_size, image_size)
  options = {}
  if config.method == "vqt":
    options = {
        "num_queries": config.num_queries,
        "normalize": config.normalize,
        "combine": config.combine,
    }
  tuner = tuner_lib.make_tuner(
      config.method, backbone.config, task.num_classes, **options
  )
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model)
  job = Job(
      config=config,
      workdir=workdir,
      console=console,
      mesh=mesh,
      backbone=backbone,
      task=task,
      tuner=tuner,
      recipe=step_lib.Recipe(
          optimizer=config.optimizer,
          query_dropout=config.query_dropout if tuner.reads_blocks else 0.0,
          embedding_dropout=config.embedding_dropout,
      ),
      params=parallel.place_backbone(
          backbone.params, mesh, backbone.config.dtype
      ),
      num_trained=_count(jax.eval_shape(tuner.init, jax.random.key(0))),
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


def _count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _describe(job: Job) -> list[str]:
  """The resolved setting in two lines."""
  c, tuner = job.backbone.config, job.tuner
  size = "x".join(map(str, dict.fromkeys(c.image_size)))
  group = " (vtab-1k)" if job.task.group else ""
  shapes = f"head {tuner.num_features:,} x {tuner.num_classes}"
  if tuner.reads_blocks:
    shapes = f"queries {c.depth} x {tuner.num_queries} x {c.width}, {shapes}"
  return [
      f"{tuner.method} on {job.task.name}{group}   ViT-{c.variant}"
      f" {job.backbone.source}, {size} px, inputs {job.backbone.value_range},"
      f" {c.dtype}   {job.mesh.size} x {jax.devices()[0].device_kind}",
      f"frozen {_count(job.backbone.params):,}   trained"
      f" {job.num_trained:,}: {shapes}",
  ]


class _Phases:
  """Search, seeds, test; each goes on from what the last checkpoint holds."""

  def __init__(self, job, saver, metrics, stop):
    self._job, self._saver = job, saver
    self._metrics, self._stop = metrics, stop
    self._saved = saver.progress() or {"phase": "", "search": None}
    self._examples = examples_lib.Examples(
        job.config, job.console, job.task, job.backbone, job.tuner,
        job.params, job.mesh,
    )  # fmt: skip

  def search(self) -> dict[str, Any] | None:
    """Every setting on train, compared on val; None if there is only one."""
    c = self._job.config
    settings = list(itertools.product(c.lr, c.weight_decay))
    self._runs = tuple(
        loop.Run(lr * c.batch_size / 256, decay, c.search_seed)
        for lr, decay in settings
    )
    if len(settings) == 1:
      return None
    found = self._saved["search"]
    if not found:
      progress = self._train("search", self._runs, "train", may_diverge=True)
      accuracy = self._evaluate("val")
      out = set(map(int, progress.diverged))
      found = {
          "chosen": loop.choose(self._runs, accuracy, out),
          "runs": [dataclasses.asdict(run) for run in self._runs],
          "val_accuracy": accuracy,
          "diverged": sorted(out),
          "seconds": progress.seconds,
      }
      self._saved["search"] = found
    self._job.console.note(_choice(found), "chosen")
    return found

  def seeds(self, search: dict[str, Any] | None) -> dict[str, Any]:
    """The chosen setting with every seed, on trainval."""
    chosen = self._runs[search["chosen"] if search else 0]
    seeds = self._job.config.seeds
    runs = tuple(dataclasses.replace(chosen, seed=seed) for seed in seeds)
    progress = self._train("seeds", runs, "trainval", may_diverge=False)
    return {
        "runs": [dataclasses.asdict(run) for run in runs],
        "history": progress.history,
        "seconds": progress.seconds,
    }

  def test(self) -> dict[str, Any]:
    """All seeds over the test set in one pass of the backbone."""
    started = time.monotonic()
    return {
        "accuracy": self._evaluate("test"),
        "images": data.num_examples(self._job.task, "test"),
        "seconds": time.monotonic() - started,
    }

  def _train(self, name, runs, split, *, may_diverge) -> loop.Progress:
    """Trains one phase, from its start or from the checkpoint."""
    job, c = self._job, self._job.config
    job.state = None  # Frees the last phase's.
    progress = loop.Progress()
    state = loop.init_state(job.tuner, job.recipe, job.params, runs, job.mesh)
    resumed = self._saved["phase"] == name
    if resumed:
      progress = loop.Progress(**self._saved["progress"])
      state = self._saver.restore(state)
      if progress.epoch < c.epochs:
        job.console.note(f"{name} after epoch {progress.epoch}", "resume")

    def log(rows):
      if parallel.is_first():
        self._metrics.epochs(name, rows)

    log([row for epoch in range(progress.epoch)
         for row in _rows(runs, epoch, progress)])  # fmt: skip

    def save(state):
      saved = {"phase": name, "progress": dataclasses.asdict(progress)}
      self._saver.save(state, {**saved, "search": self._saved["search"]})

    if progress.epoch < c.epochs:
      with self._stop.at_once(), parallel.together():
        source = self._examples.source(split)
      phase = loop.Phase(
          name, runs, source, c.epochs, c.warmup_epochs,
          per_step=c.schedule == "step", may_diverge=may_diverge,
      )  # fmt: skip
      kind = "setting" if name == "search" else "seed"
      plural = "s" if len(runs) > 1 else ""
      detail = f"{len(runs)} {kind}{plural} x {c.epochs} epochs"
      with job.console.phase(name, c.epochs, detail=detail) as line:

        def report(epoch, loss, accuracy, speed):
          log(_rows(runs, epoch, progress))
          able = np.isfinite(loss)
          line.update(
              epoch + 1,
              loss=float(np.mean(loss[able])),
              accuracy=float(np.mean(accuracy[able])),
              images_per_second=speed,
          )

        state = loop.train_phase(
            phase, job.tuner, job.recipe, job.frozen, state, progress,
            save=save, due=self._saver.due, stop=self._stop, report=report,
        )  # fmt: skip
      save(state)
    job.state = state
    return progress

  def _evaluate(self, split: str) -> list[float]:
    """Accuracy of every run; each image of the split counts exactly once."""
    job = self._job
    right, count = 0.0, 0
    total = data.num_examples(job.task, split)
    with job.console.phase(split, total, "image") as line:
      for chunk, order, mask in self._examples.evaluation(split):
        part = step_lib.eval_steps(
            job.tuner, job.state.trained, job.frozen, chunk, order, mask
        )
        right = right + parallel.to_host(part).astype(np.float64)
        count += int(mask.sum())
        line.update(count)
        if self._stop:
          raise checkpoint.Stopped
    return (right / count).tolist()


def _choice(found: dict[str, Any]) -> str:
  """What a search has chosen, and how clearly."""
  best, accuracy = found["runs"][found["chosen"]], found["val_accuracy"]
  top, diverged = accuracy[found["chosen"]], found["diverged"]
  near = [a for i, a in enumerate(accuracy) if i not in diverged]
  near = sum(a >= top - 0.005 for a in near) - 1
  lost = f", {len(diverged)} diverged" if diverged else ""
  return (
      f"lr {best['lr']:g}, weight decay {best['weight_decay']:g} (val"
      f" {100 * top:.1f} %; of {len(accuracy) - 1} others {near} within"
      f" 0.5{lost})"
  )


def _rows(runs, epoch, progress) -> list[dict[str, Any]]:
  """The metrics of an epoch, a row per run."""
  history = progress.history[epoch]
  return [
      {
          "epoch": epoch + 1,
          "run": i,
          **dataclasses.asdict(run),
          "loss": history["loss"][i],
          "accuracy": history["accuracy"][i],
      }
      for i, run in enumerate(runs)
  ]
