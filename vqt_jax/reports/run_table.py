"""The results of a run as a table on the terminal."""

from typing import Any

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import results as results_lib
from vqt_jax.reports import style
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files


def show(
  console: console_lib.Console, workdir: files.Path, results: dict[str, Any]
) -> None:
  """Print the results of a run, and where they are."""
  rows = []
  others = {  # Missing from the results of earlier versions.
    "balanced": "test_balanced_accuracy",
    "macro F1": "test_macro_f1",
  }
  others = {k: x for k, x in others.items() if x in results}
  for tested in results["tested"]:
    test = tested["test_accuracy"]
    each = [f"{s} {100 * a:.1f}" for s, a in test["per_seed"].items()]
    if together := tested.get("test_ensemble_accuracy"):
      each.append(f"together {100 * together['mean']:.1f}")
    rows.append(
      [
        style.candidate_name(tested),
        f"{accuracy_lib.format_mean(test)} %",
        accuracy_lib.format_interval(test),
        *(f"{100 * tested[x]['mean']:.2f}" for x in others.values()),
        ", ".join(each),
        f"{tested['trained_parameters']:,}",
        f"{tested['training_seconds']:.0f}",
      ]
    )
  console.table(
    [
      f"{results['method']} on {results['task']}",
      "test accuracy",
      "95 % interval",
      *others,
      "of each seed",
      "trained",
      "seconds to train",
    ],
    rows,
  )
  console.note(
    f"{workdir / results_lib.RESULTS}   report.html   report.png   tuned/",
    "results",
  )
