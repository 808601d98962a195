"""Learning-rate schedule and optimiser: the authors' recipe, and AdamW."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from vqt_jax.config import fields


def schedule(length: int, warmup: int) -> optax.Schedule:
  """Linear warm-up from 0, then cosine to 0: a factor of the peak rate.

  Args:
    length: epochs (or steps) in all.
    warmup: epochs (or steps) of warm-up.
  """
  cosine = optax.cosine_decay_schedule(1.0, length - warmup)
  if not warmup:
    return cosine
  return optax.join_schedules(
    [optax.linear_schedule(0.0, 1.0, warmup), cosine], [warmup]
  )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """`schedule` over the epochs or steps of a stage.

  The official program counts in epochs, so its first epoch has rate 0 (but
  moves the moments), and its last a small rate that is not 0.

  Attributes:
    epochs: how often each example is seen.
    warmup_epochs: of `epochs`.
    steps: of an epoch.
    per_step: count steps rather than epochs.
  """

  epochs: int
  warmup_epochs: int
  steps: int
  per_step: bool = False

  @functools.cached_property
  def _curve(self) -> np.ndarray:
    """Factors of all epochs or steps.

    All at once: to compute one on the devices is to wait for the steps that
    are queued there.
    """
    each = self.steps if self.per_step else 1
    curve = schedule(self.epochs * each, self.warmup_epochs * each)
    # An epoch more, for what is left over in a call late in the last one.
    steps = np.arange((self.epochs + 1) * each)
    return np.asarray(curve(steps), np.float32)

  def factors(self, epoch: int, start: int, steps: int) -> np.ndarray:
    """Factors of some steps of an epoch, (steps,) float32."""
    if not self.per_step:
      return np.full(steps, self._curve[epoch])
    first = epoch * self.steps + start
    return self._curve[first : first + steps]


# Not decayed; of an editor's, those that start at 1 or 0 and do nothing there.
_UNDECAYED = ("bias", "scale", "shift")


def decayed(trained: Any) -> Any:
  """Weight decay falls on every trained leaf but biases and norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in _UNDECAYED, trained
  )


def _scale_editor(rate: float) -> optax.GradientTransformation:
  """Moves what an editor trains at another rate than the rest."""

  def scale(path, update):
    is_editor = any(getattr(key, "key", None) == "editor" for key in path)
    return update * rate if is_editor else update

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates)
  )


def optimizer(
  name: str,
  lr: jax.typing.ArrayLike,
  weight_decay: jax.typing.ArrayLike,
  editor_rate: float = 1.0,
) -> optax.GradientTransformation:
  """The update rule; `lr` and `weight_decay` may be traced scalars.

  "adam" (0.9, 0.999, 1e-8) and "sgd" (momentum 0.9) add coupled L2 to the
  gradient before the moments, as torch's do; "adamw" decays the weights apart
  from them. `editor_rate` times `lr` is the rate of what an editor trains.
  """
  decay = optax.add_decayed_weights(weight_decay, decayed)
  rate = optax.scale_by_learning_rate(lr)
  if editor_rate != 1:
    rate = optax.chain(rate, _scale_editor(editor_rate))
  match name:
    case "adam":
      return optax.chain(decay, optax.scale_by_adam(), rate)
    case "sgd":
      return optax.chain(decay, optax.trace(decay=0.9), rate)
    case "adamw":
      return optax.chain(optax.scale_by_adam(), decay, rate)
  raise ValueError(
    f"optimizer must be one of {fields.OPTIMIZERS}, not {name!r}"
  )
