"""Writing of results.json, of test predictions and of tuned/."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import data
from vqt_jax import results as results_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import memory
from vqt_jax.runtime import processes
from vqt_jax.training import protocol
from vqt_jax.training import setup
from vqt_jax.tuned import bundle

# Name -> function of a tally.
SCORES = {
  "test_accuracy": accuracy_lib.accuracy,
  "test_balanced_accuracy": accuracy_lib.balanced,
  "test_macro_f1": accuracy_lib.macro_f1,
}
ENSEMBLE = "test_ensemble_accuracy"  # Of all seeds, by mean probability.
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


def write(
  context: setup.RunContext,
  found: dict[str, Any],
  candidates: Sequence[protocol.Candidate],
  test: dict[str, Any],
  seconds: float,
  peak: memory.PeakMemory,
) -> dict[str, Any]:
  """Write all results; `results.json` comes last and marks the run as finished.

  Args:
    context: of the run.
    found: what the protocol found on the way.
    candidates: tested settings; the last one is the result.
    test: what `Stages.evaluate` has found on the test images, and how long it
      took, as of `run`.
    seconds: wall time of this process.
    peak: peak memory of this process.

  Returns:
    The contents of `results.json`.
  """
  results = _results(context, found, candidates, test, seconds, peak)
  if processes.is_first():
    results["tuned_bytes"] = _write_tuned(context, candidates[-1], results)
    seeds = [trial.seed for trial in candidates[-1].trials]
    results_lib.write_predictions(
      context.workdir,
      seeds,
      test["label"],
      test["predictions"][-1],
      test["probabilities"][-1],
    )
    files.write_json(context.workdir / results_lib.RESULTS, results)
    files.remove_folder(context.workdir / "stages")
  return results


def _results(context, found, candidates, test, seconds, peak) -> dict[str, Any]:
  c, result = context.backbone.config, candidates[-1]
  tested = [
    {
      "name": each.name,
      "setting": each.setting,
      "kept_share": each.kept_share,
      **_scores(each, test["label"], predicted),
      "trained_parameters": each.num_trained,
      "training_seconds": each.seconds,
    }
    for each, predicted in zip(candidates, test["predictions"])
  ]
  return {
    "task": context.task.name,
    "method": context.config.method,
    "num_queries": result.setting.get("num_queries", 0),
    "backbone": f"ViT-{c.variant} {context.backbone.source}",
    "weights": context.backbone.identity,
    "pool_type": c.pool_type,
    "gelu": c.gelu,
    "dtype": c.dtype,
    "image_size": list(c.image_size),
    "value_range": context.backbone.value_range,
    "resize": context.config.resize,
    "fit": context.config.fit,
    "data": data.dataset_identity(context.task),
    "protocol": context.config.protocol,
    "batch_size": context.config.batch_size,  # config.lr is per 256 images.
    **{name: tested[-1][name] for name in (*SCORES, ENSEMBLE)},
    "test_classes": _count_classes(
      context.task, test["label"], test["predictions"][-1][:-1]
    ),
    "chosen": result.setting,
    "tested": tested,
    **found,
    "seeds": {
      "runs": [dataclasses.asdict(trial) for trial in result.trials],
      "history": result.trained.history,
    },
    "solved": result.trained.solved,
    "trained_parameters": result.num_trained,
    "seconds": {
      "training": result.seconds,
      "epoch": result.trained.epoch_seconds,
      "test": test["seconds"],
      "process": seconds,
    },
    "memory": {
      "peak_bytes": peak.bytes(),
      "start_bytes": peak.start,
      "step_bytes": result.trained.step_bytes,
      "side_by_side": result.trained.side_by_side,
    },
    "tuned_bytes": None,  # Set when they are written.
    "device": f"{context.mesh.size} x {jax.devices()[0].device_kind}",
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
  }


def _scores(candidate, label, predicted) -> dict[str, Any]:
  """Return the `SCORES` of the seeds of a candidate, and of all together."""
  seeds, images = [trial.seed for trial in candidate.trials], len(label)
  *each, together = predicted
  classes = candidate.tuner.num_classes
  tallies = [accuracy_lib.tally(x, label, classes) for x in each]
  values = {
    name: [function(tally) for tally in tallies]
    for name, function in SCORES.items()
  }
  found = {name: accuracy_lib.over(seeds, x) for name, x in values.items()}
  accuracy = values["test_accuracy"]
  found["test_accuracy"] = accuracy_lib.summary(seeds, accuracy, images)
  found[ENSEMBLE] = None
  if len(seeds) > 1 and (together >= 0).all():
    share = float((together == label).mean())
    found[ENSEMBLE] = {
      "mean": share,
      "interval": list(accuracy_lib.interval(share, images)),
    }
  return found


def _count_classes(
  task: data.Task, label: np.ndarray, predicted: np.ndarray
) -> dict[str, Any]:
  """Return names and numbers of test images of each class.

  Images that are right, and those taken for the class, are summed over seeds.

  Args:
    task: of the run.
    label: (n,) of the test images.
    predicted: (R, n) of each seed.
  """
  tallies = [accuracy_lib.tally(x, label, task.num_classes) for x in predicted]
  right, taken, there = sum(tallies)
  return {
    "class": _class_names(task),
    "images": there // len(tallies),
    "right": right,
    "predicted": taken,
  }


def _class_names(task: data.Task) -> list[str]:
  return list(task.class_names or map(str, range(task.num_classes)))


def _write_tuned(context, candidate, results) -> int:
  """Write the bundle of all seeds; return the bytes of one seed's weights."""
  task, trials = context.task, candidate.trials
  how = "fit" if isinstance(task, data.FileTask) else "resize"
  size = bundle.write(
    context.workdir / "tuned",
    context.config.init,
    context.backbone,
    dataclasses.replace(candidate.tuner, normalize=trials[0].normalize),
    candidate.variables,
    {
      "task": task.name,
      "classes": _class_names(task),
      "preprocessing": {
        "image_size": results["image_size"],
        "value_range": results["value_range"],
        how: results[how],
      },
      "seeds": [trial.seed for trial in trials],
      "results": {
        **{name: results[name] for name in (*SCORES, ENSEMBLE)},
        "chosen": results["chosen"],
      },
      "versions": results["versions"],
    },
    candidate.feature_mask,
  )
  return size // len(trials)
