"""Learning-rate schedule and optimiser: the authors' recipe, and AdamW."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from vqt_jax.config import fields


def schedule(length: int, warmup: int) -> optax.Schedule:
  """Factor of the peak rate: linear warm-up from 0, then cosine decay to 0."""
  cosine = optax.cosine_decay_schedule(1.0, length - warmup)
  if not warmup:
    return cosine
  return optax.join_schedules(
    [optax.linear_schedule(0.0, 1.0, warmup), cosine], [warmup]
  )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """`schedule` over the epochs, or the steps, of a stage.

  The official program counts epochs, so its first epoch has rate 0 (but updates
  the moments), and its last one a small rate that is not 0.

  Attributes:
    epochs: number of epochs.
    warmup_epochs: of these, epochs of warm-up.
    steps: steps in an epoch.
    per_step: whether the rate changes with every step, not every epoch.
  """

  epochs: int
  warmup_epochs: int
  steps: int
  per_step: bool = False

  @functools.cached_property
  def _curve(self) -> np.ndarray:
    """Factors of all epochs or steps, computed at once.

    To compute one while training would wait for the steps that are queued on
    the devices.
    """
    each = self.steps if self.per_step else 1
    curve = schedule(self.epochs * each, self.warmup_epochs * each)
    # One epoch more, as the last call may have room for more steps.
    steps = np.arange((self.epochs + 1) * each)
    return np.asarray(curve(steps), np.float32)

  def factors(self, epoch: int, start: int, steps: int) -> np.ndarray:
    """Return the factors of `steps` steps of an epoch, (steps,) float32."""
    if not self.per_step:
      return np.full(steps, self._curve[epoch])
    first = epoch * self.steps + start
    return self._curve[first : first + steps]


# Not decayed. Scales and shifts of editors start as the identity.
_UNDECAYED = ("bias", "scale", "shift")


def decayed(trained: Any) -> Any:
  """Mask of the leaves that weight decay applies to: not biases, not norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in _UNDECAYED, trained
  )


def _scale_editor(rate: float) -> optax.GradientTransformation:
  """Scale the updates of an editor's leaves by `rate`."""

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
  """Build the update rule; `lr` and `weight_decay` may be traced scalars.

  "adam" (0.9, 0.999, 1e-8) and "sgd" (momentum 0.9) add the L2 term to the
  gradient before the moments, as PyTorch does; "adamw" decouples it. Leaves of
  an editor train at `editor_rate` times `lr`.
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
