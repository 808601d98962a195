"""One step from stored features against one through the backbone, and together.

  python -m benchmarks.stored --config \\
      configs/vtab.py:task=fashion_mnist,init=dinov2_s14.npz \\
      --config.data_dir=DATA --config.value_range=imagenet --config.gelu=exact

On a config's own weights and data: the same optimiser step both ways (and how
far apart the results are), and a step of 20 settings side by side against the
same one after another. Times are medians; ratios are of times taken in turn.
"""

import argparse
import dataclasses
import io
import itertools
import pathlib
import statistics
import time

import jax
from ml_collections import ConfigDict
import numpy as np

from vqt_jax import cli
from vqt_jax.config import resolve
from vqt_jax.features import examples as examples_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial

MIB = 2**20


class Way:
  """One step of some runs of a config, its features kept or not."""

  def __init__(
    self, job: setup.RunContext, runs: tuple[trial.Trial, ...], place: str
  ):
    config = job.config.copy_and_resolve_references()
    config.features = place
    job = dataclasses.replace(job, config=config)
    source = examples_lib.Examples(
      config,
      job.console,
      job.task,
      job.backbone,
      job.tuner,
      job.params,
      job.mesh,
    ).training_batches("train")
    stage = stage_lib.Stage("step", "step", job.tuner, runs, "setting")
    recipe = step_lib.StaticSettings(config.optimizer, query_dropout=True)
    data, order, mask = next(source.epoch(0, 0))
    frozen = tuner_lib.partition(
      job.params, jax.eval_shape(job.tuner.init, jax.random.key(0))
    )[1]
    rest = frozen, stage.settings(), data, order[:1], mask[:1], np.ones(1)
    self._start = lambda: step_lib.init_on(job.mesh, job.tuner, recipe)(
      job.params, np.array([run.seed for run in runs], np.uint32)
    )
    static = job.tuner, recipe
    compiled = step_lib.train_steps.lower(
      *static, self._start(), *rest
    ).compile()
    self._step = lambda state: compiled(state, *rest)
    self.temporary = compiled.memory_analysis().temp_size_in_bytes

  def seconds(self) -> float:
    """Of one step."""
    state = jax.block_until_ready(self._start())
    start = time.perf_counter()
    jax.block_until_ready(self._step(state))
    return time.perf_counter() - start

  def losses(self, steps: int) -> np.ndarray:
    """Of the first steps (in which Adam magnifies rounding of weights)."""
    state, found = self._start(), []
    for _ in range(steps):
      state, losses, _ = self._step(state)
      found.append(float(losses[0, 0]))
    return np.array(found)


def settings(config: ConfigDict, number: int) -> tuple[trial.Trial, ...]:
  grid = itertools.islice(
    itertools.product(config.lr, config.weight_decay), number
  )
  return tuple(
    trial.Trial(
      lr * config.batch_size / 256,
      decay,
      trial.SEARCH_SEED,
      config.query_dropout,
      config.normalize,
    )
    for lr, decay in grid
  )


def in_turn(*ways: Way, repeats: int) -> list[list[float]]:
  """Seconds of each, one of each at a time."""
  for way in ways:
    way.seconds()
  times = [[way.seconds() for way in ways] for _ in range(repeats)]
  return [list(column) for column in zip(*times)]


def compare(name: str, a: str, b: str, times: list[list[float]], factor=1):
  """Prints medians, and the median of the ratios b / a."""
  ratios = [factor * y / x for x, y in zip(*times)]
  first, second = map(statistics.median, times)
  print(
    f"{name}: {a} {first:.3f} s, {b} {factor * second:.3f} s, ratio"
    f" {statistics.median(ratios):.1f} ({min(ratios):.1f} to"
    f" {max(ratios):.1f})",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=5)
  options, rest = parser.parse_known_args()
  argv = ["main.py", "--workdir=unused", *rest]
  config = resolve.resolve(cli.parse(argv).config)
  quiet = console_lib.Console(io.StringIO())
  job = setup.prepare(config, pathlib.Path(), quiet)
  with jax.set_mesh(job.mesh):
    runs = settings(config, 20)
    stored = Way(job, runs[:1], "device")
    live = Way(job, runs[:1], "live")
    a, b = stored.losses(3), live.losses(3)
    print(f"losses of 3 steps, stored / live - 1: {a / b - 1}", flush=True)
    compare(
      "one step",
      "stored",
      "live",
      in_turn(stored, live, repeats=options.repeats),
    )
    together = Way(job, runs, "device")
    times = in_turn(together, stored, repeats=options.repeats)
    compare(
      f"{len(runs)} settings",
      "side by side",
      "one after another",
      times,
      len(runs),
    )
    for name, way in (
      ("live", live),
      ("stored", stored),
      ("side by side", together),
    ):
      print(f"temporary memory, {name}: {way.temporary / MIB:,.0f} MiB")


if __name__ == "__main__":
  main()
