"""A run from config to results: the protocol's stages, then the test."""

import contextlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from vqt_jax import data
from vqt_jax import results as results_lib
from vqt_jax.features import examples as examples_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import memory
from vqt_jax.runtime import processes
from vqt_jax.training import auto
from vqt_jax.training import checkpoint
from vqt_jax.training import forecast as forecast_lib
from vqt_jax.training import metrics as metrics_lib
from vqt_jax.training import preemption
from vqt_jax.training import protocol
from vqt_jax.training import results as results_training
from vqt_jax.training import setup
from vqt_jax.training import stages as stages_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import workdir as workdir_lib


def run(
  config: ml_collections.ConfigDict,
  workdir: files.Path,
  console: console_lib.Console,
  task: data.Task | None = None,
) -> dict[str, Any]:
  """Train and test one method on one task; see `experiments.train.train`.

  Args:
    config: resolved.
    workdir: a folder.
    console: shows progress.
    task: in place of `config.task`.
  """
  with contextlib.ExitStack() as opened:
    with processes.raise_on_all():
      if processes.is_first():
        opened.enter_context(workdir_lib.open_workdir(config, workdir))
      finished = files.exists(workdir / results_lib.RESULTS)
    if not processes.any_process(finished):
      return _run(config, workdir, console, task)
    with processes.raise_on_all():
      results = results_lib.read(workdir)
    console.note("this run is finished already; it is not done again")
    return results


def _run(config, workdir, console, task) -> dict[str, Any]:
  with preemption.StopSignal() as stop:
    started, peak = time.monotonic(), memory.PeakMemory()
    with stop.at_once(), processes.raise_on_all():
      context = setup.prepare(config, workdir, console, task)
    with jax.set_mesh(context.mesh):
      place = workdir / "checkpoints"
      saver = checkpoint.Checkpointer(place, config.checkpoint_seconds)
      with (
        contextlib.closing(saver),
        contextlib.closing(metrics_lib.MetricsWriter(workdir)) as metrics,
      ):
        examples = examples_lib.Examples(
          config,
          console,
          context.task,
          context.backbone,
          context.tuner,
          context.params,
          context.mesh,
        )
        examples.check_classes()
        method = auto if context.tuner.members else protocol
        planned = method.planned(config, context.tuner)
        with processes.raise_on_all():
          forecast = forecast_lib.Forecast(context, examples, planned)
          resumed = bool(files.list_names(workdir / "stages"))
        is_own = isinstance(context.task, data.FileTask)
        if is_own and not processes.any_process(resumed):
          forecast.tell_before()
        stages = stages_lib.Stages(
          context, examples, saver, metrics, stop, peak, forecast
        )
        found, candidates = method.candidates(context, stages, examples)
        test = _test(stages, candidates)
    with processes.raise_on_all():
      seconds = time.monotonic() - started
      return results_training.write(
        context, found, candidates, test, seconds, peak
      )


def _test(stages, candidates) -> dict[str, Any]:
  """Test all seeds of all candidates in one pass over the test set."""
  started = time.monotonic()
  label, predictions, probabilities = stages.evaluate(
    "test",
    None,
    [
      (
        each.tuner,
        step_lib.TrainedTrials(
          each.variables, np.array([r.normalize for r in each.trials])
        ),
      )
      for each in candidates
    ],
    "test",
  )
  for each, predicted in zip(candidates, predictions):
    accuracy = [float((seed == label).mean()) for seed in predicted[:-1]]
    epoch, name = len(each.trained.history), "test_accuracy"
    stages.log_accuracy(f"test_{each.name}", each.trials, epoch, name, accuracy)
  return {
    "label": label,
    "predictions": predictions,
    "probabilities": probabilities,
    "seconds": time.monotonic() - started,
  }
