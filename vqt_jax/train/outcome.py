"""What a finished run leaves behind: results.json, tuned/, report.png."""

import importlib.metadata
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from vqt_jax import console as console_lib
from vqt_jax import parallel
from vqt_jax import plots
from vqt_jax import results as results_lib
from vqt_jax import tuned

RESULTS = "results.json"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets")


def write(
    job: Any,
    search: dict[str, Any] | None,
    final: dict[str, Any],
    test: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
  """Writes and prints the results; `results.json` comes last.

  Args:
    job: the `run.Job`, with the final state of the seeds.
    search: outcome of the search, or None if there was one setting only.
    final: outcome of training the seeds.
    test: outcome of testing them.
    seconds: wall time of this process's share of the run.

  Returns:
    The contents of `results.json`.
  """
  results = _results(job, search, final, test, seconds)
  if parallel.is_first():
    _write_tuned(job, results)
    plots.report(results, job.workdir / "report.png")
    results_lib.write_json(job.workdir / RESULTS, results)
  show(job.console, job.workdir, results)
  return results


def _results(job, search, final, test, seconds) -> dict[str, Any]:
  c = job.backbone.config
  accuracy = np.array(test["accuracy"])
  phases = {"seeds": final["seconds"], "test": test["seconds"]}
  if search:
    phases["search"] = search["seconds"]
  return {
      "task": job.task.name,
      "method": job.tuner.method,
      "num_queries": job.tuner.num_queries if job.tuner.reads_blocks else 0,
      "backbone": f"ViT-{c.variant} {job.backbone.source}",
      "image_size": list(c.image_size),
      "value_range": job.backbone.value_range,
      "resize": job.config.resize,
      "test_accuracy": {
          "mean": float(accuracy.mean()),
          "std": float(accuracy.std(ddof=1)) if len(accuracy) > 1 else 0.0,
          "per_seed": dict(zip(map(str, job.config.seeds), test["accuracy"])),
          "images": test["images"],
      },
      "chosen": {k: final["runs"][0][k] for k in ("lr", "weight_decay")},
      "search": search,
      "seeds": final,
      "trained_parameters": job.num_trained,
      "seconds": {**phases, "process": seconds},
      "device": f"{job.mesh.size} x {jax.devices()[0].device_kind}",
      "versions": {
          "python": platform.python_version(),
          **{name: importlib.metadata.version(name) for name in PACKAGES},
      },
  }


def _write_tuned(job, results) -> None:
  """Each seed's queries and head as `tuned/seed_<seed>/`, what one ships."""
  trained = jax.tree.map(parallel.to_host, job.state.trained)
  test = results["test_accuracy"]["per_seed"]
  for i, seed in enumerate(job.config.seeds):
    tuned.save(
        job.workdir / "tuned" / f"seed_{seed}",
        job.config.init,
        job.backbone,
        job.tuner,
        jax.tree.map(lambda x, i=i: x[i], trained),
        {
            "task": results["task"],
            "resize": results["resize"],
            "chosen": results["chosen"],
            "seed": seed,
            "test_accuracy": test[str(seed)],
        },
    )


def show(
    console: console_lib.Console, workdir: pathlib.Path, results: dict[str, Any]
) -> None:
  """Prints what came out, and where it is."""
  test = results["test_accuracy"]
  each = ", ".join(f"{s} {100 * a:.1f}" for s, a in test["per_seed"].items())
  console.table(
      "",
      ["", "test accuracy", "of each seed", "trained", "seconds"],
      [[
          f"{results['method']} on {results['task']}",
          f"{100 * test['mean']:.2f} +- {100 * test['std']:.2f} %",
          each,
          f"{results['trained_parameters']:,}",
          f"{results['seconds']['process']:.0f}",
      ]],
  )
  console.note(f"{workdir / RESULTS}   report.png   tuned/", "results")
