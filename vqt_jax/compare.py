"""Puts finished runs side by side: a table, compare.csv and compare.png.

A run of `--config configs/compare.py` does it with its methods. For any others:

  python -m vqt_jax.compare runs/linear runs/vqt --output runs/comparison

and, where it was installed with pip, `vqt-jax compare` with the same arguments.

--output FOLDER  where they are written; default: the current folder

It says in what the runs differ beside their methods: images, backbone, data.
Of each VQT run it also draws what the queries attend to,
`attention_<run>.png`.
"""

from collections.abc import Sequence
import os
import sys
from typing import Any

from absl import flags

from vqt_jax import errors
from vqt_jax.reports import compare
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files


def main(argv: Sequence[str]) -> int:
  """Compares the runs named on a command line; returns the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("output", ".", "", flag_values=values)
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  try:
    paths = [files.path(path) for path in values(list(argv))[1:]]
    if values.help:
      print(__doc__)
      return 0
    if not paths:
      raise errors.UserError(
        "No runs given. Usage: WORKDIR... [--output FOLDER] (--help tells"
        " more)."
      )
    workdirs = workdir_names(paths)
    outcomes = {name: read_runs(path) for name, path in workdirs.items()}
    summary = compare.summarize(outcomes)
    output = files.path(values.output)
    compare.write(console_lib.Console(), summary, workdirs, output)
  except (errors.UserError, flags.Error) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


def workdir_names(paths: Sequence[files.Path]) -> dict[str, files.Path]:
  """Workdirs by their last part, or by more of it if these are not enough."""
  local = lambda path: files.path(os.path.abspath(path))  # `.` has no name.
  whole = [p if files.in_bucket(p) else local(p) for p in paths]
  for parts in range(1, max(len(path.parts) for path in whole) + 1):
    names = ["_".join(path.parts[-parts:]) for path in whole]
    if len(set(names)) == len(paths):
      return dict(zip(names, paths))
  raise errors.UserError("The same run is given twice.")


def read_runs(workdir: files.Path) -> dict[str, Any]:
  results = files.read_json(workdir / "results.json")
  for of_all in ("tasks", "runs"):
    if of_all in results:
      raise errors.UserError(
        f"{workdir} holds all of several runs; name the folder of one in it,"
        f" e.g. {workdir / next(iter(results[of_all]))}."
      )
  return results


if __name__ == "__main__":
  sys.exit(main(sys.argv))
