"""Checks of a config that need no file and no device."""

from ml_collections import ConfigDict

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.data import vtab
from vqt_jax.models import methods as methods_lib
from vqt_jax.models import readers
from vqt_jax.models import scaling
from vqt_jax.models import vit_config

# Fields, and a group of fields, for datasets that are no VTAB task.
_DATASET_FIELDS = (
  "splits.",
  "image_key",
  "label_key",
  "num_classes",
  "split_key",
)


def check(config: ConfigDict) -> None:
  """Check the fields of a config, their values, and their combinations.

  Raises:
    UserError: with the field, what was expected and what was found.
  """
  values = config_dict.flatten(config)
  for name in values:
    fields.find(name)
  for name, field in fields.FIELDS.items():
    if name not in values:
      raise errors.UserError(
        f"config.{name} is missing: start from default_config()."
      )
    field.check(name, values[name])
  _check_names(config)
  _check_numbers(config)
  _check_computation(config)
  if config.task == vtab.ALL:
    _check_all_tasks(config)
  if config.methods:
    _check_several_methods(config)
  else:
    _check_solver(config)


def _check_names(config: ConfigDict) -> None:
  for name in ("task", "init"):
    if not config[name]:
      raise errors.UserError(f"config.{name} is empty; give a name.")
  if config.value_range:
    try:
      scaling.find_scaling(config.value_range)
    except errors.UserError as e:
      raise errors.UserError(f"config.{e}") from e
  if config.variant:
    try:
      vit_config.decode_variant(config.variant)
    except ValueError as e:
      raise errors.UserError(f"config.variant: {e}") from e


def _check_numbers(config: ConfigDict) -> None:
  if config.epochs and config.warmup_epochs >= config.epochs:
    raise errors.UserError(
      f"config.warmup_epochs={config.warmup_epochs} must be smaller than"
      f" config.epochs={config.epochs}: nothing would be left to train."
    )
  if config.trained_width and not config.trained_size:
    raise errors.UserError(
      f"config.trained_width={config.trained_width} is a width alone; give"
      " the height as well, config.trained_size."
    )
  for name, rates in config_dict.flatten(config).items():
    is_rate = name == "lr" or name.startswith("reader_lr.")
    if is_rate and 0 in rates and len(rates) > 1:
      raise errors.UserError(
        f"config.{name}={rates}: 0 stands for the published rates, so it cannot"
        " be one of several."
      )
  if 0 in config.keep_fraction and len(config.keep_fraction) > 1:
    raise errors.UserError(
      f"config.keep_fraction={config.keep_fraction}: 0 stands for the default"
      " fraction, so it cannot be one of several."
    )


def _check_computation(config: ConfigDict) -> None:
  if "://" in config.store_dir:
    raise errors.UserError(
      f"config.store_dir={config.store_dir}: expected a folder, since its"
      " files are mapped into memory. Name one on a local disk, or mount the"
      " bucket."
    )
  names = (config.method,)
  if config.methods:
    names = methods_lib.split_list(config.methods, "config.methods")
  for name in names:
    method = methods_lib.parse(name, "config.method")
    if method.editor and config.features not in ("", "live"):
      raise errors.UserError(
        f"config.method={name} changes the stream in every step, so it"
        " cannot be stored: use features=live."
      )
  if config.embedding_dropout and config.features not in ("", "live"):
    raise errors.UserError(
      f"config.embedding_dropout={config.embedding_dropout} makes the stream"
      " differ in every step, so it cannot be stored: use features=live."
    )


def _check_solver(config: ConfigDict) -> None:
  """Check `solver` against the method, and fields that it cannot respect."""
  method = methods_lib.parse(config.method, "config.method")
  reader = readers.READERS[method.reader]
  fixed, selects = reader.is_fixed, reader.read and not reader.is_fixed
  if config.solver == "gradient" and fixed:
    raise errors.UserError(
      f"config.solver=gradient: {config.method} has an exact head only. Leave"
      " config.solver empty."
    )
  if config.solver == "exact" and not method.may_be_exact:
    raise errors.UserError(
      f"config.solver=exact: {config.method} learns by gradients. Leave"
      " config.solver empty, or take config.method=linear, head2toe or instant."
    )
  exact = config.solver == "exact" or (
    not config.solver and method.may_be_exact
  )
  if method.reader == "auto" and config.protocol == "best":
    raise errors.UserError(
      "config.protocol=best: method auto chooses by cross-validation already."
      " Leave config.protocol out."
    )
  if not (exact or method.reader == "auto") or config.preset:
    return
  other = ", or set config.solver=gradient" * (exact and not fixed)
  if not (selects or set(config.keep_fraction) <= {0.0, 1.0}):
    raise errors.UserError(
      f"config.keep_fraction={config.keep_fraction}: the exact head of"
      f" {config.method} uses all features. Leave it out"
      f"{other}."
    )
  if config.embedding_dropout:
    raise errors.UserError(
      f"config.embedding_dropout={config.embedding_dropout}: the exact head of"
      f" {config.method} sees every image once, without noise. Leave it out"
      f"{other}."
    )


def _check_all_tasks(config: ConfigDict) -> None:
  given = [
    f"config.{name}"
    for name, value in config_dict.flatten(config).items()
    if name.startswith(_DATASET_FIELDS) and value
  ]
  if given:
    raise errors.UserError(
      f"config.task={vtab.ALL} takes VTAB's tasks as they are: leave"
      f" {', '.join(given)} empty."
    )


def _check_several_methods(config: ConfigDict) -> None:
  if config.task == vtab.ALL:
    raise errors.UserError(
      f"config.task={vtab.ALL} takes one config.method; to compare"
      f" config.methods={config.methods}, name one task."
    )
  if config.preset:
    raise errors.UserError(
      f"config.preset={config.preset} depends on the method; set its fields"
      " one by one to compare config.methods."
    )
