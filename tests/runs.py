"""Tiny runs of `main.py`: a random ViT, a few coloured squares, their outcome.

In this process, or in others that are forked from one that has imported all.
"""

from collections.abc import Callable, Mapping
import functools
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import pkgutil
import resource
import signal
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

import main
from tests import helpers
from tests import pictures
from vqt_jax import checkpoints
from vqt_jax.training import loop

CLASSES = 3
STOPPED = "Stopped and saved; resume with the same command."
# 40 to train on, 8 to choose by: as many steps as with all 48, so that one
# traced program serves the search and the seeds.
SIZES = {"train": 48, "test": 30}
CONFIG = """
from vqt_jax import config

def get_config():
  c = config.default_config()
  c.task = "squares"
  c.data_dir = {folder!r}
  c.splits = dict(
      train="train[:40]", val="train[40:]", trainval="", test="test"
  )
  c.init = {folder!r} + "/vit.npz"
  c.image_size = 8
  c.batch_size = 12
  c.eval_batch_size = 16
  c.epochs = 3
  c.warmup_epochs = 1
  c.lr = (4.0, 0.1)
  c.weight_decay = (1e-4,)
  c.solver = "gradient"  # So that a linear probe has epochs to be stopped in.
  c.seeds = (7, 8)
  return c
"""

with tfds.core.registered.skip_registration():

  class Squares(tfds.core.GeneratorBasedBuilder):
    """Noisy squares; the class is the colour that is brightest."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {
        split: self._generate_examples(seed, size)
        for seed, (split, size) in enumerate(SIZES.items())
      }

    def _generate_examples(self, seed, size):
      rng = np.random.default_rng(seed)
      for key in range(size):
        label = int(rng.integers(CLASSES))
        image = rng.integers(0, 150, (8, 8, 3), np.uint8)
        image[..., label] += 100
        yield key, {"image": image, "label": label}


def make_material(folder: pathlib.Path) -> None:
  """Writes a checkpoint, a prepared dataset and a config that uses them."""
  backbone = helpers.tiny_backbone(image_size=(8, 8))
  checkpoints.save_npz(folder / "vit.npz", backbone)
  tfds.disable_progress_bar()
  Squares(data_dir=str(folder)).download_and_prepare()
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))


def command(
  folder: pathlib.Path, workdir: pathlib.Path, **changes: Any
) -> list[str]:
  """The command line of a run; `splits__test="x"` changes `splits.test`."""
  fields = [
    f"--config.{name.replace('__', '.')}={value}"
    for name, value in changes.items()
  ]
  config = f"--config={folder / 'config.py'}"
  return ["main.py", config, f"--workdir={workdir}", *fields]


def read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text())


def results(workdir: pathlib.Path) -> dict[str, Any]:
  return read_json(workdir / "results.json")


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def bits(workdir: pathlib.Path) -> dict[str, Any]:
  """Everything of an outcome that must not depend on interruptions."""
  found = results(workdir)
  search = found["search"] or {}
  return {
    "accuracy": found["test_accuracy"],
    "history": found["seeds"]["history"],
    "search": {k: v for k, v in search.items() if k != "seconds"},
    **files(workdir, "tuned/**/*"),
    **files(workdir, "metrics.jsonl"),
    **files(workdir, "test_predictions.safetensors"),
  }


def flat(tree: Any) -> dict[str, np.ndarray]:
  """Leaves by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def files(folder: pathlib.Path, pattern: str = "**/*") -> dict[str, bytes]:
  """Contents of the files in a folder, by path."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.glob(pattern))
    if path.is_file()
  }


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
  """For what forked processes say and leave; goes when this one ends."""
  return tempfile.TemporaryDirectory(prefix="vqt_jax_tests_")


# A forked process has all imports already; each takes seconds otherwise.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
  [
    "orbax.checkpoint",
    "tensorflow",
    "tests.runs",
    "vqt_jax.reports.run_figure",
    "vqt_jax.training.run",
  ]
)


class Process:
  """A command line that runs in a process of its own."""

  def __init__(
    self,
    argv: list[str],
    *,
    signals: Mapping[str, tuple[int, signal.Signals]] | None = None,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    largest_file: int | None = None,
  ):
    """Starts it.

    Args:
      argv: of `main.main`.
      signals: "module:function" -> (n, signal) that the process sends itself
        when it calls the function for the n-th time.
      devices: fake CPU devices.
      environment: further variables.
      largest_file: bytes at which a file cannot grow, as on a full disk.
    """
    scratch = _scratch().name
    with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as screen:
      self._screen = pathlib.Path(screen.name)
    self._process = _CONTEXT.Process(
      target=_run,
      args=(argv, screen.name, scratch, devices),
      kwargs={
        "signals": signals or {},
        "environment": environment or {},
        "largest_file": largest_file,
      },
      daemon=True,
    )
    self._process.start()

  @property
  def pid(self) -> int:
    return self._process.pid

  def wait(self, seconds: float = 300) -> int:
    """The exit status; minus the signal's number where one ended it."""
    self._process.join(seconds)
    assert self._process.exitcode is not None, f"It hangs: {self.said()}"
    return self._process.exitcode

  def said(self) -> str:
    """What it printed on the screen."""
    return self._screen.read_text()


def _run(argv, screen, scratch, devices, *, signals, environment, largest_file):
  """Body of a forked process."""
  gc.freeze()  # What came with the fork is no garbage.
  file = os.open(screen, os.O_WRONLY | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  # Of a flag that is given twice, the last counts.
  flags = f"--xla_force_host_platform_device_count={devices}"
  os.environ["XLA_FLAGS"] += f" {flags}"
  os.environ.update(environment)
  tempfile.tempdir = scratch  # What a killed one leaves goes with the rest.
  pictures.leave_empty(setattr)
  loop.CALL_SECONDS = 1e9  # Else the machine's speed tells how many calls.
  for name, (call, number) in signals.items():
    signal_on_call(setattr, name, call, number)
  if largest_file is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
  sys.exit(main.main(argv))


def signal_on_call(
  replace: Callable[[Any, str, Any], None],
  name: str,
  call: int,
  number: signal.Signals,
) -> None:
  """Has this process send itself a signal when it calls a function.

  Args:
    replace: `setattr`, or that of a `monkeypatch`.
    name: "module:function".
    call: the number of the call, from 1 on.
    number: the signal.
  """
  module, _, function = name.partition(":")
  original = pkgutil.resolve_name(name)
  calls = itertools.count(1)

  def wrapped(*args, **kwargs):
    if next(calls) == call:
      os.kill(os.getpid(), number)
    return original(*args, **kwargs)

  vars(wrapped).update(lower=getattr(original, "lower", None))
  replace(pkgutil.resolve_name(module), function, wrapped)
