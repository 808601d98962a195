"""Results of a finished run, and its predictions on the test set."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.runtime import array_files
from vqt_jax.runtime import files

RESULTS = "results.json"
PREDICTIONS = "test_predictions.safetensors"

_ACCURACY = {
  "mean": float,
  "std": float | None,
  "per_seed": dict[str, float],
  "images": int | None,
}
_SETTING = dict[str, int | float | bool | str | None]
_SPLIT = {"slices": str, "images": int}
# Of heads that were computed: per trial. None of those that were trained.
_SOLVED = (
  None,
  [
    {
      "penalty": float,
      "accuracy": float,
      "loss": float,
      "tried": [{"penalty": float, "accuracy": float, "loss": float | None}],
    }
  ],
)
_RUN = {"lr": float, "weight_decay": float}
# What a comparison reads; None of what an earlier version left out.
_COMPARED = {
  "task": str,
  "method": str,
  "backbone": str,
  "device": str,
  "num_queries": int,
  "test_accuracy": _ACCURACY,
  "chosen": _SETTING,
  "search": (None, {"runs": list}),
  "best": (None, {"tried": list | None}),
  "trained_parameters": int,
  "tuned_bytes": int | None,
  "batch_size": int | None,
  "memory": (
    None,
    {
      "peak_bytes": int | None,
      "step_bytes": int | None,
      "side_by_side": int | None,
    },
  ),
  "seconds": {"training": float, "epoch": float | None},
  "image_size": list[int] | None,
  "data": (
    None,
    {"splits": (None, dict[str, _SPLIT])},
  ),
}
# What the report of the run itself and a summary of tasks read.
_WHOLE = {
  **_COMPARED,
  "search": (
    None,
    {
      "chosen": int,
      "runs": [_RUN],
      "val_accuracy": list[float | None],
      "diverged": list[int],
    },
  ),
  "selection": (
    None,
    {"keep_fractions": list[dict[str, float]], "chosen": float},
  ),
  "best": (
    None,
    {
      "searched": int,
      "tried": (
        None,
        [
          {
            **_RUN,
            "val_accuracy": float | None,
            "extended": bool,
            "query_dropout": float | None,
            "num_queries": int | None,
            "normalize": bool | None,
          }
        ],
      ),
      "finalists": [
        {
          **_RUN,
          "val_accuracy": float | None,
          "cv_accuracy": float,
          "full": bool,
          "query_dropout": float | None,
          "num_queries": int | None,
          "normalize": bool | None,
        }
      ],
      "keep_fractions": list[dict[str, float]],
      "folds": int,
      "chosen": _SETTING,
    },
  ),
  "tested": [
    {
      "name": str,
      "test_accuracy": _ACCURACY,
      "kept_share": list[float] | None,
      "trained_parameters": int,
      "training_seconds": float,
    }
  ],
  "test_ensemble_accuracy": (None, {"mean": float}),
  # Images of each class; right and predicted ones summed over the seeds.
  "test_classes": (
    None,
    {
      "class": list[str],
      "images": list[int],
      "right": list[int],
      "predicted": list[int],
    },
  ),
  "solved": _SOLVED,
  "seeds": {
    "history": [{"loss": list[float | None], "accuracy": list[float | None]}]
  },
  "seconds": {
    "training": float,
    "epoch": float | None,
    "test": float,
    "process": float,
  },
  "versions": dict[str, str] | None,
}


def find_task(config: Mapping[str, Any]) -> data.Task:
  """Return the task of a run, without the images that it left out.

  Args:
    config: contents of its `config.json`, or some of them.

  Raises:
    UserError: there is no such task any more.
  """
  options = {
    name: config[name] for name in fields.TASK_FIELDS if name in config
  }
  task = data.make_task(config["task"], **options)
  if config.get("skip_bad"):
    task = data.leave_out(task, data.find_faults(task))
  return task


def read(workdir: files.Path) -> dict[str, Any]:
  """Read the results of a finished run.

  Raises:
    UserError: the file is damaged, or is none of results.
  """
  path = workdir / RESULTS
  advice = "the same command runs it again."
  try:
    results = files.read_json(path)
  except errors.UserError as e:
    raise errors.UserError(f"{e} Delete it, and {advice}") from e
  if not isinstance(results, dict) or "tested" not in results:
    raise errors.UserError(
      f"{path} does not hold results of a run. Move it elsewhere, and {advice}"
    )
  with files.explain_damage(path, f"Delete it, and {advice}"):
    _check(results, _WHOLE)
    _check_lengths(results)
  return results


def read_to_compare(workdir: files.Path) -> dict[str, Any]:
  """Read the results of a run, which an earlier version may have written.

  Raises:
    UserError: they cannot be read, or are a summary of several runs.
  """
  path = workdir / RESULTS
  results = files.read_json(path)
  with files.explain_damage(path):
    for key in ("tasks", "runs"):
      if files.is_of(results, {key: dict}) and results[key]:
        raise errors.UserError(
          f"{workdir} summarises several runs; name the folder of one in it,"
          f" e.g. {workdir / next(iter(results[key]))}."
        )
    _check(results, _COMPARED)
  return results


class Predictions(NamedTuple):
  """Predicted classes of the test images, in the order of the test set.

  Attributes:
    label: (n,) classes.
    predicted: (R, n) classes, a row for each seed.
    together: (n,) classes, by the mean of the seeds' probabilities; None if
      they were not computed together.
    probability: (n,) float32, that mean for `together`; None if unknown.
  """

  label: np.ndarray
  predicted: np.ndarray
  together: np.ndarray | None = None
  probability: np.ndarray | None = None

  @property
  def right(self) -> np.ndarray:
    """Share of the seeds that are right about each image, (n,)."""
    return (self.predicted == self.label).mean(axis=0)


def write_predictions(
  workdir: files.Path,
  seeds: Sequence[int],
  label: np.ndarray,
  predicted: np.ndarray,
  probability: np.ndarray,
) -> None:
  """Write the predictions of a run.

  Args:
    workdir: of the run.
    seeds: R of them.
    label: (n,) classes of the test images.
    predicted: (R + 1, n) classes, of each seed and, last, of all together, -1
      where that is unknown.
    probability: (n,) of the last row, NaN where that is unknown.
  """
  *each, together = predicted
  arrays = {"label": label, "predicted": np.stack(each)}
  if (together >= 0).all():
    arrays["together"] = together
  small = np.min_scalar_type(max(x.max() for x in arrays.values()))
  arrays = {name: x.astype(small) for name, x in arrays.items()}
  if np.isfinite(probability).all():  # Not of seeds that have diverged.
    arrays["probability"] = probability.astype(np.float32)
  content = array_files.to_safetensors(arrays, {"seeds": list(map(str, seeds))})
  files.write(workdir / PREDICTIONS, content)


def read_predictions(
  workdir: files.Path, results: Mapping[str, Any]
) -> Predictions | None:
  """Read the predictions of a run; None if an earlier version left none.

  Args:
    workdir: of the run.
    results: contents of its `results.json`.

  Raises:
    UserError: they are damaged, or those of other results.
  """
  path, test = workdir / PREDICTIONS, results["test_accuracy"]
  if not files.exists(path):
    return None
  seeds, images = test["per_seed"], test.get("images")
  optional = {"together": (images,), "probability": (images,)}
  needed = {"label": (images,), "predicted": (len(seeds), images)}
  expected = [*seeds], optional | needed

  def check(shapes, info):
    found = info.get("seeds"), optional | shapes
    if found != expected:
      raise ValueError(f"expected seeds and shapes {expected}, found {found}")

  with files.explain_damage(path, "Delete it to compare the run without it."):
    arrays, _ = array_files.read_safetensors(path, check)
    predictions = Predictions(**arrays)
    found = (predictions.predicted == predictions.label).mean(axis=1)
    if not np.allclose(found, [*seeds.values()]):
      raise ValueError(f"its accuracies are not those of {RESULTS}")
    if counts := results.get("test_classes"):
      each = np.bincount(predictions.label, minlength=len(counts["class"]))
      if not np.array_equal(each, counts["images"]):
        raise ValueError(f"its classes are not those of {RESULTS}")
  return predictions


def read_all_predictions(
  workdirs: Mapping[str, files.Path], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Predictions | None]:
  """Read the predictions of several runs, by name; see `read_predictions`."""
  return {
    name: read_predictions(path, results[name])
    for name, path in workdirs.items()
  }


def _check(results: Any, kinds: dict[str, Any]) -> None:
  """Raise a `ValueError` if fields of results are not of these types."""
  if not isinstance(results, dict):
    raise ValueError("expected the results of a run")
  for name, kind in kinds.items():
    if not files.is_of(results.get(name), kind):
      raise ValueError(f"{name} is missing or of another type")
  tests = [results["test_accuracy"]]
  tests += [each["test_accuracy"] for each in results.get("tested", ())]
  for test in tests:
    shares = [test["mean"], *test["per_seed"].values()]
    images = test.get("images")
    if len(shares) < 2 or not all(0 <= x <= 1 for x in shares):
      raise ValueError("accuracies are not from 0 to 1")
    if len(shares) > 2 and test.get("std") is None or images == 0:
      raise ValueError("an accuracy is not that of several seeds")


def how_judged(solved: Mapping[str, Any]) -> str:
  """Return "cross-validation" or "leave-one-out", as a head was judged."""
  folds = not solved.get("temperature") or solved.get("keep_fractions")
  return "cross-validation" if folds else "leave-one-out"


def _check_lengths(results: dict[str, Any]) -> None:
  """Raise a `ValueError` if lists and numbers do not fit together."""
  history = results["seeds"]["history"]
  count = {len(values) for epoch in history for values in epoch.values()}
  fits = bool(results["tested"]) and 0 not in count
  if solved := results.get("solved"):
    fits &= not history and all(each["tried"] for each in solved)
  else:
    fits &= len(count) == 1
  fits &= all(t["kept_share"] != [] for t in results["tested"])
  if classes := results.get("test_classes"):
    fits &= len({len(column) for column in classes.values()}) == 1
  if search := results["search"]:
    trials = len(search["runs"])
    fits &= len(search["val_accuracy"]) == trials
    fits &= 0 <= search["chosen"] < trials
  selection, best = results.get("selection"), results["best"]
  kept = [(selection, selection["chosen"])] if selection else []
  if best:
    kept.append((best, best["chosen"].get("keep_fraction")))
    fits &= all(
      each.keys() - {"val_accuracy", "cv_accuracy", "full"}
      <= best["chosen"].keys()
      and (each.get("num_queries") is None or "normalize" in each)
      for each in best["finalists"]
    )
  for found, chosen in kept:
    fits &= all(len(each) == 2 for each in found["keep_fractions"])
    fits &= chosen in [
      each["keep_fraction"] for each in found["keep_fractions"]
    ]
  if not fits:
    raise ValueError("its lists do not fit together")
