"""Heads that are computed from the features of all examples, not trained."""

from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from vqt_jax import errors
from vqt_jax.features import batches
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import ahead
from vqt_jax.runtime import memory
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.runtime import processes
from vqt_jax.runtime import units
from vqt_jax.training import logistic
from vqt_jax.training import ridge
from vqt_jax.training import selected_ridge
from vqt_jax.training import step as step_lib

# Of cross-validation.
FOLDS = 5


def check_memory(tuner: tuner_lib.Tuner, count: int) -> None:
  """Raise a `UserError` if the features of `count` examples are too many."""
  needed, available = 4 * count * tuner.num_features, memory.host_memory()
  if needed > available:
    raise errors.UserError(
      f"The {tuner.num_features:,} features of {count:,} images take"
      f" {units.format_bytes(needed)}, and this machine has"
      f" {units.format_bytes(available)} of memory. {ridge.ADVICE}"
    )


def read_features(
  tuner: tuner_lib.Tuner,
  variables: Any,
  normalize: bool,
  params: Any,
  calls: Iterable[batches.Call],
  count: int,
  progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
  """Collect the features of examples, as the head sees them, on the host.

  Args:
    tuner: the method, without an editor.
    variables: {"tuner", "head"} of one trial.
    normalize: whether feature groups are divided by their norms.
    params: of the backbone, on the devices.
    calls: over the examples, each once.
    count: number of examples n.
    progress: called with the number of examples done.

  Returns:
    Features (n, F) float32, and labels (n,) int32.
  """
  features = np.empty((count, tuner.num_features), np.float32)
  labels, done = np.empty(count, np.int32), 0
  run = functools.partial(
    step_lib.features_of, tuner, variables, normalize, params
  )
  each = (
    (data, order[i], mask[i])
    for data, order, mask in calls
    for i in range(len(order))
  )
  for part in ahead.compute(run, each):
    found, label, mask = processes.to_host(part)
    real = mask > 0
    end = done + int(real.sum())
    features[done:end], labels[done:end] = found[real], label[real]
    done = end
    progress(done)
  return features, labels


def solve(
  solver: str,
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  class_weights: np.ndarray | None = None,
  fractions: Sequence[float] = (),
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Compute a head; every process does it alone, on one device.

  Args:
    solver: "ridge", "selected ridge" or "logistic".
    features: (n, F) float32; overwritten.
    labels: (n,).
    num_classes: C.
    class_weights: (C,), or None.
    fractions: of the features, for "selected ridge".

  Returns:
    {"kernel", "bias"}; and the rest of the `linear_fit.LinearFit`.

  Raises:
    UserError: the problem is too large or too small, or not finite.
  """
  if not np.isfinite(features).all():
    raise errors.UserError(
      "The features of some images are infinite or NaN: look at the value range"
      " of the inputs (config.value_range), or compute in float32"
      " (config.dtype=float32)."
    )
  with jax.set_mesh(mesh_lib.make_mesh(devices=jax.local_devices()[:1])):
    given, folds = (features, labels, num_classes), stratified_folds(labels)
    match solver:
      case "ridge":
        fit = ridge.fit(*given, class_weights)
      case "selected ridge":
        fit = selected_ridge.fit(*given, folds, fractions, class_weights)
      case _:
        fit = logistic.fit(*given, folds, class_weights)
  head, found = {"kernel": fit.kernel, "bias": fit.bias}, dict(vars(fit))
  for name in head:
    del found[name]
  return jax.tree.map(np.asarray, head), found


def stratified_folds(labels: np.ndarray) -> list[np.ndarray]:
  """Divide rows into `FOLDS` stratified folds, the rows judged in each."""
  sorted_rows = np.argsort(labels, kind="stable")
  count = min(FOLDS, len(labels))
  return [np.sort(sorted_rows[i::count]) for i in range(count)]


def of_first_process(tree: Any) -> Any:
  """Return the arrays of the first process: rounding differs by machine."""
  if jax.process_count() == 1:
    return tree
  tree = multihost_utils.broadcast_one_to_all(tree)
  return jax.tree.map(np.array, tree)
