"""Compare finished runs: a table, report.html, compare.csv and compare.png.

A run of `--config configs/compare.py` compares its methods. For any others:

  python -m vqt_jax.compare runs/linear runs/vqt --output runs/comparison

and, after an installation with pip, `vqt-jax compare` with the same arguments.

--output FOLDER  for the files; default: the current folder

Differences of the runs beside their methods (images, backbone, data) are noted.
For each VQT run the attention of its queries is drawn, `attention_<run>.png`.
"""

from collections.abc import Sequence
import os
import sys

from absl import flags
from etils import epy

from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import logfile

with epy.lazy_imports():  # Figures take a second; --help needs none.
  from vqt_jax.reports import compare
  from vqt_jax.reports import html


def main(argv: Sequence[str]) -> int:
  """Compare the runs named on a command line; return the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("output", ".", "", flag_values=values)
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  try:
    paths = [files.path(path) for path in values(list(argv))[1:]]
    if values.help:
      logfile.print_to_stdout(__doc__)
      return 0
    if not paths:
      raise errors.UserError(
        "No runs given. Usage: WORKDIR... [--output FOLDER] (--help tells"
        " more)."
      )
    workdirs = workdir_names(paths)
    results = {
      name: results_lib.read_to_compare(path) for name, path in workdirs.items()
    }
    predictions = results_lib.read_all_predictions(workdirs, results)
    output = files.path(values.output)
    html.check_folder(output)
    summary = compare.summarize(results, predictions)
    compare.write(console_lib.Console(), summary, workdirs, output)
  except (errors.UserError, flags.Error) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


def workdir_names(paths: Sequence[files.Path]) -> dict[str, files.Path]:
  """Name each workdir by the last parts of its path, as few as are unique.

  Raises:
    UserError: a workdir is given twice.
  """
  absolute = lambda path: files.path(os.path.abspath(path))  # "." has no name.
  whole = [p if files.in_bucket(p) else absolute(p) for p in paths]
  for parts in range(1, max(len(path.parts) for path in whole) + 1):
    names = ["_".join(path.parts[-parts:]) for path in whole]
    if len(set(names)) == len(paths):
      return dict(zip(names, paths))
  raise errors.UserError("The same run is given twice.")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
