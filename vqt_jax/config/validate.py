"""Checks of a config that need no file and no device."""

import math
from typing import Any

from ml_collections import ConfigDict

from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.config import values as values_lib
from vqt_jax.data import vtab
from vqt_jax.models import readers
from vqt_jax.models import tuner
from vqt_jax.models import vit_config
from vqt_jax.models.backbone import VALUE_RANGES

CHOICES = {
  "combine": readers.COMBINE,
  "optimizer": ("", *fields.OPTIMIZERS),
  "schedule": ("epoch", "step"),
  "resize": ("bilinear", "legacy"),
  "value_range": ("", *VALUE_RANGES),
  "pool_type": ("", "tok", "gap", "map", "0", "mae"),
  "gelu": ("", "tanh", "exact"),
  "dtype": ("", "float32", "bfloat16"),
  "features": ("", "device", "host", "disk", "live"),
  "feature_dtype": ("", "float32", "bfloat16"),
  "data": ("", "device", "stream"),
  "protocol": ("full", "best"),
  "preset": ("", "authors"),
}

# Field -> (smallest, largest) value, or element of a tuple; always finite.
BOUNDS = {
  "image_size": (1, math.inf),
  "image_width": (0, math.inf),
  "trained_size": (0, math.inf),
  "trained_width": (0, math.inf),
  "num_classes": (0, math.inf),
  "num_queries": (0, math.inf),
  "target_size": (1, math.inf),
  "query_dropout": (0, 0.99),
  "num_prompts": (1, math.inf),
  "bottleneck": (0, math.inf),
  "rank": (1, math.inf),
  "alpha": (0, math.inf),
  "last_blocks": (1, math.inf),
  "editor_rate": (0, math.inf),
  "embedding_dropout": (0, 0.99),
  "epochs": (1, math.inf),
  "warmup_epochs": (-1, math.inf),
  "batch_size": (1, math.inf),
  "eval_batch_size": (1, math.inf),
  "settings": (0, math.inf),
  "lr": (0, math.inf),
  **{f"reader_lr.{name}": (0, math.inf) for name in readers.READERS},
  "weight_decay": (0, math.inf),
  "search_seed": (0, 2**32 - 1),
  "seeds": (0, 2**32 - 1),
  "seed": (0, 2**32 - 1),
  "mesh.data": (-1, math.inf),
  "mesh.model": (1, math.inf),
  "checkpoint_seconds": (0, math.inf),
  "keep_fraction": (0, 1),
  "best.num_queries": (1, math.inf),
  "best.query_dropout": (0, 0.99),
  "best.keep_fractions": (0.01, 0.99),  # All features are always tried.
  "best.finalists": (1, math.inf),
  "best.folds": (2, math.inf),
}

# Fields for datasets that are no VTAB task.
OF_OTHERS = ("splits.", "image_key", "label_key", "num_classes")


def check(config: ConfigDict, defaults: ConfigDict) -> None:
  """Checks a config: its fields, names, bounds, and what they combine.

  Args:
    config: to be checked.
    defaults: the config with all known fields.

  Raises:
    UserError: with the field, what was expected and what was found.
  """
  _check_fields(values_lib.flatten(config), values_lib.flatten(defaults))
  for name, known in CHOICES.items():
    if config[name] not in known:
      named = [k or '""' for k in known]
      raise errors.unknown_name(f"config.{name}", config[name], named)
  for name, (low, high) in BOUNDS.items():
    _check_bounds(name, values_lib.flatten(config)[name], low, high)
  _check_names(config)
  _check_combinations(config)


def _check_names(config: ConfigDict) -> None:
  _methods(config)
  for name in ("task", "init"):
    if not config[name]:
      raise errors.UserError(f"config.{name} is empty; give a name.")
  if config.variant:
    try:
      vit_config.decode_variant(config.variant)
    except ValueError as e:
      raise errors.UserError(f"config.variant: {e}") from e


def _methods(config: ConfigDict) -> tuple[str, ...]:
  """All methods of the run or runs.

  Raises:
    UserError: one is unknown, or there twice.
  """
  if config.methods:
    return tuner.parse_list(config.methods, "config.methods")
  tuner.parse(config.method, "config.method")
  return (config.method,)


def _check_combinations(config: ConfigDict) -> None:
  if config.warmup_epochs >= config.epochs:
    raise errors.UserError(
      f"config.warmup_epochs={config.warmup_epochs} must be smaller than"
      f" config.epochs={config.epochs}: nothing would be left to train."
    )
  if config.trained_width and not config.trained_size:
    raise errors.UserError(
      f"config.trained_width={config.trained_width} is a width alone; give"
      " the height as well, config.trained_size."
    )
  if "://" in config.store_dir:
    raise errors.UserError(
      f"config.store_dir={config.store_dir}: expected a folder, since its"
      " files are mapped into memory. Name one on a local disk, or mount the"
      " bucket."
    )
  if config.mesh.data == 0:
    raise errors.UserError(
      "config.mesh.data=0: expected a number of devices, or -1 for all."
    )
  for name, rates in values_lib.flatten(config).items():
    is_rate = name == "lr" or name.startswith("reader_lr.")
    if is_rate and not all(rates) and len(rates) > 1:
      raise errors.UserError(
        f"config.{name}={rates}: with a rate of 0 nothing is trained."
      )
  if not all(config.keep_fraction) and len(config.keep_fraction) > 1:
    raise errors.UserError(
      f"config.keep_fraction={config.keep_fraction}: with a fraction of 0 no"
      " feature is left."
    )
  given = [
    f"config.{name}"
    for name, value in values_lib.flatten(config).items()
    if name.startswith(OF_OTHERS) and value
  ]
  if config.task == vtab.ALL and given:
    raise errors.UserError(
      f"config.task={vtab.ALL} takes VTAB's tasks as they are: leave"
      f" {', '.join(given)} empty."
    )
  _check_methods(config)
  if config.embedding_dropout and config.features not in ("", "live"):
    raise errors.UserError(
      f"config.embedding_dropout={config.embedding_dropout} makes the stream"
      " differ in every step, so it cannot be stored: use features=live."
    )


def _check_methods(config: ConfigDict) -> None:
  if config.methods and config.task == vtab.ALL:
    raise errors.UserError(
      f"config.task={vtab.ALL} takes one config.method; to compare"
      f" config.methods={config.methods}, name one task."
    )
  if config.methods and config.preset:
    raise errors.UserError(
      f"config.preset={config.preset} depends on the method; set its fields"
      " one by one to compare config.methods."
    )
  for method in _methods(config):
    if tuner.parse(method)[1] and config.features not in ("", "live"):
      raise errors.UserError(
        f"config.method={method} changes the stream in every step, so it"
        " cannot be stored: use features=live."
      )


def _check_fields(values: dict[str, Any], defaults: dict[str, Any]) -> None:
  """Exactly the known fields."""
  for name in values:
    values_lib.check_field(name, defaults)
  for name in defaults:
    if name not in values:
      raise errors.UserError(
        f"config.{name} is missing: start from default_config()."
      )


def _check_bounds(name: str, value: Any, low: float, high: float) -> None:
  """Every element within the bounds, finite, and in a tuple only once."""
  values = value if isinstance(value, (tuple, list)) else (value,)
  for x in values:
    if not (low <= x <= high and math.isfinite(x)):
      wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
      raise errors.UserError(f"config.{name}: expected {wanted}, found {x}.")
  if len(set(values)) < len(values):
    raise errors.UserError(f"config.{name}={value} holds the same value twice.")
