"""Several runs, one after another, each in a folder of its own.

Each behaves as if it was started alone: finished ones are not redone, but for
reports that are missing, and a stopped one is resumed.
"""

from collections.abc import Callable, Iterable, Mapping
import contextlib
from typing import Any

import ml_collections

from vqt_jax import results
from vqt_jax.experiments import single
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import processes
from vqt_jax.training import preemption
from vqt_jax.training import workdir as workdir_lib

Configs = Mapping[str, ml_collections.ConfigDict]


def train(
  config: ml_collections.ConfigDict,
  workdir: files.Path,
  console: console_lib.Console,
  label: str,
  look: Callable[[ml_collections.ConfigDict, files.Path], Any],
  sum_up: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
  """Run all configs, then sum up.

  Args:
    config: of all runs.
    workdir: gets a folder per run, named as the run.
    console: shows progress.
    label: what runs differ in, on the terminal: "task" or "method".
    look: (config, workdir) -> (name -> config of each run, a note or "").
    sum_up: (console, workdir, names) -> contents of `results.json`, which it
      writes.

  Returns:
    The result of `sum_up`.

  Raises:
    UserError: something that the user can correct.
    Stopped: asked to stop by a signal; everything is saved.
  """
  with preemption.StopSignal() as stop, contextlib.ExitStack() as opened:
    with stop.at_once():
      configs, missing = look(config, workdir)
      done = finished(workdir, configs)
      with processes.raise_on_all():
        if processes.is_first():
          # All of them, so that one of another config is found at once.
          opened.enter_context(workdir_lib.open_workdir(config, workdir))
          for name, its_config in configs.items():
            opened.enter_context(
              workdir_lib.open_workdir(its_config, workdir / name)
            )
    if missing:
      console.note(missing, "missing")
    for number, (name, its_config) in enumerate(configs.items(), start=1):
      place = f"{number} of {len(configs)}: {name}"
      if name in done:
        console.note(f"{place} is finished already", label)
        with processes.raise_on_all():
          its_results = results.read(workdir / name)
        single.write_reports(its_results, workdir / name, console)
        continue
      if stop:
        raise preemption.Stopped
      console.note(place, label)
      single.train(its_config, workdir / name, console)
    with processes.raise_on_all():
      return sum_up(console, workdir, list(configs))


def finished(workdir: files.Path, names: Iterable[str]) -> set[str]:
  """Return the names of finished runs, as seen by any process."""
  exists = lambda name: files.exists(workdir / name / results.RESULTS)
  return {name for name in names if processes.any_process(exists(name))}


def load_results(
  workdir: files.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """Return name -> contents of `results.json` of each run."""
  return {name: results.read(workdir / name) for name in names}
