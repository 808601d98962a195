"""The whole protocol from stored features, against live, one run at a time.

  python -m benchmarks.protocol --config configs/digits.py
  python -m benchmarks.protocol --epochs=1 --live_settings=2 \\
      --config configs/vtab.py:task=fashion_mnist,init=dinov2_s14.npz \\
      --config.data_dir=DATA --config.value_range=imagenet \\
      --config.gelu=exact --config.splits.test='test[:2000]'

Both ways are the program itself (search, seeds, feature selection, test), with
every compiled call timed to its end. With `--epochs` phases are cut to so many
epochs and their times scaled to those of the config; with `--live_settings` the
live search tries only so many settings, and one seed is trained, and both are
scaled as well. Live, all seeds are tested in one pass; what single passes would
cost is added. `--no_live` leaves that half out.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import io
import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict
from rich import box
from rich import console as rich_console
from rich import table as rich_table

import vqt_jax
from vqt_jax import accuracy
from vqt_jax import cli
from vqt_jax.config import resolve
from vqt_jax.features import store
from vqt_jax.runtime import console as console_lib
from vqt_jax.training import stages
from vqt_jax.training import step
from vqt_jax.training import trial_memory

TRAINING = ("search", "seeds", "scores", "selected")


@dataclasses.dataclass
class Clock:
  """Times compiled calls, by the phase in which they are made.

  Attributes:
    phase: what is being done.
    calls: phase -> seconds of each call.
    compiling: phase -> seconds of each compilation.
    wall: seconds of everything.
  """

  phase: str = "extract"
  calls: dict[str, list[float]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  compiling: dict[str, list[float]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  wall: float = 0.0

  def timed(self, function: Any, num_static: int) -> Callable[..., Any]:
    """A jitted function that compiles ahead, and is waited for."""
    compiled = {}

    def call(*args):
      static, dynamic = args[:num_static], args[num_static:]
      key = static, str(jax.tree.map(jax.typeof, dynamic))
      if key not in compiled:
        start = time.perf_counter()
        compiled[key] = function.lower(*args).compile()
        self.compiling[self.phase].append(time.perf_counter() - start)
      start = time.perf_counter()
      out = jax.block_until_ready(compiled[key](*dynamic))
      self.calls[self.phase].append(time.perf_counter() - start)
      return out

    return call

  def seconds(self, phase: str) -> float:
    return sum(self.calls[phase])


@contextlib.contextmanager
def instrumented(clock: Clock, alone: bool) -> Iterator[None]:
  """Times all compiled calls of the program; `alone`: runs one by one."""
  pack, evaluate = stages.Stages._pack, stages.Stages.evaluate
  made: dict[Any, Any] = {}

  def train(self, stage):
    clock.phase = stage.label
    return pack(self, stage)

  def judge(self, split, *args):
    before, clock.phase = clock.phase, split
    try:
      return evaluate(self, split, *args)
    finally:
      clock.phase = before

  def extract(make):
    def each(layout):
      if (make, layout) not in made:
        made[make, layout] = clock.timed(make(layout), 0)

      def call(*args):
        before, clock.phase = clock.phase, "extract"
        try:
          return made[make, layout](*args)
        finally:
          clock.phase = before

      return call

    return each

  with contextlib.ExitStack() as patches:
    replace = lambda *args: patches.enter_context(mock.patch.object(*args))
    replace(stages.Stages, "_pack", train)
    replace(stages.Stages, "evaluate", judge)
    replace(step, "train_steps", clock.timed(step.train_steps, 2))
    # It would compile once more what is compiled ahead here.
    replace(step, "step_bytes", lambda *args: None)
    replace(step, "eval_steps", clock.timed(step.eval_steps, 1))
    replace(store, "extractor", extract(store.extractor))
    replace(store, "_writer", extract(store._writer))
    if alone:
      replace(trial_memory, "trials_at_once", lambda *args: 1)
    yield


def measure(config: ConfigDict, live: bool) -> tuple[Clock, dict[str, Any]]:
  """One run of the program; its clock and results."""
  clock = Clock()
  config = resolve.resolve(config)
  config.features = "live" if live else "device"
  config.data = "device" if live else ""
  quiet = console_lib.Console(io.StringIO())
  with tempfile.TemporaryDirectory() as workdir, instrumented(clock, live):
    start = time.perf_counter()
    results = vqt_jax.train(config, pathlib.Path(workdir) / "run", quiet)
    clock.wall = time.perf_counter() - start
  return clock, results


def phases(clock: Clock, factors: dict[str, float]) -> dict[str, float]:
  """Seconds of all calls of each phase."""
  return {
    name: sum(calls) * factors.get(name, 1)
    for name, calls in clock.calls.items()
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--epochs", type=int, default=0, help="0: the config's")
  parser.add_argument("--live_epochs", type=int, default=0, help="0: as above")
  parser.add_argument("--live_settings", type=int, default=0, help="0: all")
  parser.add_argument("--no_live", action="store_true", help="stored alone")
  options, rest = parser.parse_known_args()
  argv = ["main.py", "--workdir=unused", *rest]
  config = resolve.resolve(cli.parse(argv).config)
  settings, seeds = len(config.lr) * len(config.weight_decay), len(config.seeds)

  stored = cut(config, options.epochs)
  ours, results = measure(stored, live=False)
  scale = lambda c, runs: config.epochs / c.epochs * runs
  ours_s = phases(ours, dict.fromkeys(TRAINING, scale(stored, 1)))
  if options.no_live:
    show(config, ours, ours_s, {}, [results])
    return
  live = cut(config, options.live_epochs or options.epochs)
  live_settings, live_seeds = settings, seeds
  if options.live_settings:
    live.lr, live.weight_decay = live.lr[: options.live_settings], (1e-4,)
    live.seeds, live_settings, live_seeds = live.seeds[:1], len(live.lr), 1
  theirs, their_results = measure(live, live=True)
  more = seeds / live_seeds
  factors = {name: scale(live, more) for name in TRAINING}
  factors["search"] = scale(live, settings / live_settings)
  factors["val"] = settings / live_settings
  factors["test"] = seeds  # A pass for each.
  theirs_s = phases(theirs, factors)
  show(config, ours, ours_s, theirs_s, [results, their_results])


def cut(config: ConfigDict, epochs: int) -> ConfigDict:
  config = config.copy_and_resolve_references()
  if epochs:
    config.epochs, config.warmup_epochs = epochs, 0
  return config


def show(config, clock, ours, theirs, results) -> None:
  table = rich_table.Table(
    "phase",
    "stored, s",
    "live, one by one, s",
    "live / stored",
    title=f"{config.method} on {config.task}, {config.num_queries} queries,"
    f" {len(config.lr) * len(config.weight_decay)} settings,"
    f" {len(config.seeds)} seeds, {config.epochs} epochs",
    box=box.SIMPLE,
  )
  for column in table.columns[1:]:
    column.justify = "right"

  def add(name, a, b):
    seconds = [f"{x:,.1f}" if x else "" for x in (a, b)]
    table.add_row(name, *seconds, f"{b / a:.1f}" if a and b else "")

  for name in dict.fromkeys([*ours, *theirs]):
    add(name, ours.get(name, 0), theirs.get(name, 0))
  add("all", sum(ours.values()), sum(theirs.values()))
  out = rich_console.Console(width=100)
  out.print(table)
  inside = sum(map(sum, clock.calls.values()))
  compiling = sum(map(sum, clock.compiling.values()))
  out.print(
    f"stored, as it ran: {clock.wall:.1f} s, in compiled calls {inside:.1f},"
    f" compiling {compiling:.1f}, else {clock.wall - inside - compiling:.1f}"
  )
  out.print(
    "compilations:",
    ", ".join(f"{n} {len(s)}" for n, s in clock.compiling.items()),
  )
  for name, each in zip(("stored", "live"), results):
    test = each["test_accuracy"]
    seeds = ", ".join(test["per_seed"])
    out.print(f"test accuracy, {name}: {accuracy.told(test)} % (seeds {seeds})")


if __name__ == "__main__":
  main()
