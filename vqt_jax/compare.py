"""Puts finished runs side by side.

  python -m vqt_jax.compare runs/linear runs/vqt --output runs/comparison

prints a table and draws `comparison.png`; of each VQT run it also draws what
the queries attend to, `attention_<run>.png`.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from absl import flags
import numpy as np

from vqt_jax import config as config_lib
from vqt_jax import console as console_lib
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import plots
from vqt_jax import results as results_lib
from vqt_jax import tuned as tuned_lib
from vqt_jax.backbone import VALUE_RANGES

IMAGES = 8  # In the picture of what queries attend to.


def table(console: console_lib.Console, results: Sequence[dict[str, Any]]):
  """Prints test accuracy and sizes, a row per run."""
  rows = []
  for r in results:
    test = r["test_accuracy"]
    rows.append([
        f"{r['method']} on {r['task']}"
        + (f", {r['num_queries']} per block" if r["num_queries"] else ""),
        f"{test['mean']:.2%} ± {test['std']:.2%}",
        len(test["per_seed"]),
        f"{r['trained_parameters']:,}",
        f"{r['seconds']['training']:.0f}",
    ])
  columns = ["", "test accuracy", "seeds", "trained", "seconds to train"]
  console.table("", columns, rows)


def draw_attention(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Where the queries of a VQT run's first seed look, on test images.

  Attention is averaged over heads and queries; the class token is left out.
  """
  results = results_lib.read_json(workdir / "results.json")
  config = results_lib.read_json(workdir / "config.json")
  seed = next(iter(results["test_accuracy"]["per_seed"]))
  tuned = tuned_lib.load(workdir / "tuned" / f"seed_{seed}")
  task = data.make_task(
      config["task"], **{k: config[k] for k in config_lib.TASK_FIELDS}
  )
  c = tuned.backbone.config
  batch = next(
      data.batches(
          task,
          "test",
          batch_size=IMAGES,
          image_size=c.image_size,
          value_range=tuned.backbone.value_range,
          resize=config["resize"],
      )
  )
  weights = tuned.attention(batch["image"]).mean(axis=(2, 3))
  if c.has_class_token:
    weights = weights[..., 1:]
  maps = np.moveaxis(weights, 0, 1).reshape(len(weights[0]), -1, *c.grid)
  predicted = np.argmax(tuned(batch["image"]).logits, axis=-1)
  mean, std = VALUE_RANGES[tuned.backbone.value_range]
  images = np.clip(batch["image"] * np.array(std) + np.array(mean), 0, 1)
  labels = [f"{a}, said {b}" for a, b in zip(batch["label"], predicted)]
  plots.attention(images, maps, labels, path)


def main(argv: Sequence[str]) -> int:
  """Compares the runs named on a command line; returns the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("output", ".", "folder", flag_values=values)
  try:
    workdirs = [pathlib.Path(path) for path in values(list(argv))[1:]]
    if not workdirs:
      raise errors.UserError(
          "No runs given. Usage: python -m vqt_jax.compare WORKDIR..."
          " [--output FOLDER]"
      )
    compare(workdirs, pathlib.Path(values.output))
  except (errors.UserError, flags.Error) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


def compare(workdirs: Sequence[pathlib.Path], output: pathlib.Path) -> None:
  """Prints the table of finished runs and draws their pictures."""
  results = [results_lib.read_json(w / "results.json") for w in workdirs]
  for workdir, result in zip(workdirs, results):
    if "tasks" in result:
      raise errors.UserError(
          f"{workdir} holds all tasks; name the folder of one in it, e.g."
          f" {workdir / next(iter(result['tasks']))}."
      )
  output.mkdir(parents=True, exist_ok=True)
  console = console_lib.Console()
  table(console, results)
  plots.comparison(results, output / "comparison.png")
  pictures = ["comparison.png"]
  for workdir, result in zip(workdirs, results):
    if result["method"] == "vqt":
      pictures.append(f"attention_{workdir.name}.png")
      draw_attention(workdir, output / pictures[-1])
  console.note("   ".join(str(output / p) for p in pictures), "pictures")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
