"""Resolution of a config: its preset, recipe, and defaults of the task."""

from collections.abc import Mapping
import copy
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.config import validate
from vqt_jax.data import vtab
from vqt_jax.models import editors
from vqt_jax.models import methods as methods_lib
from vqt_jax.models import readers

# Differences of the authors' program from the defaults: noise on the frozen
# stream while queries train (it trains other methods without), TensorFlow 1's
# bilinear resize, and ImageNet's mean and deviation, exact GELU and float32
# whatever the backbone was trained with.
_AUTHORS = {
  "resize": "legacy",
  "value_range": "imagenet",
  "gelu": "exact",
  "dtype": "float32",
  "embedding_dropout": 0.1,
}
# Fields whose defaults are the authors' values.
_AUTHORS_DEFAULTS = (
  "query_dropout",
  "combine",
  "normalize",
  "epochs",
  "warmup_epochs",
  "schedule",
  "batch_size",
  "optimizer",
  "lr",
  "reader_lr",
  "weight_decay",
  "seeds",
  "protocol",
  "keep_fraction",
)

# Fraction of the features, on VTAB tasks with one query per block.
AUTHORS_KEEP = 0.7
# The Head2Toe authors' commands have 0.01 and 0.2, but of more features, see
# docs/methods.md.
HEAD2TOE_KEEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# Queries per block of instant; the features grow with them.
INSTANT_QUERIES = 4

# Optimiser and peak learning rates per 256 images: of readers those of the VQT
# and Head2Toe authors (0.1 and 0.01 at batch 128), and of combo what was best
# on rendered tasks; of prompts, and of all other editors, those searched in the
# VPT paper (docs/methods.md).
_READER_RECIPE = ("adam", (1.0, 0.5, 0.25, 0.1, 0.05))
_HEAD2TOE_RECIPE = ("adam", (0.2, 0.02))
_COMBO_RECIPE = ("adamw", (4e-3,))
_PROMPT_RECIPE = (
  "sgd",
  (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
)
_EDITOR_RECIPE = ("adamw", (5e-3, 1e-3, 5e-4, 1e-4))
# Beside vqt and head2toe an editor has this fraction of their rates, which are
# those of a head.
_EDITOR_RATE = 0.01
# Epochs of every trial; and of a network, which needs a number of steps,
# however few the images are.
_EPOCHS = 100
_NETWORK_EPOCHS, _NETWORK_STEPS = 40, 200
# The only weight decay that is tried if `settings` is given.
_SETTINGS_DECAY = 1e-4


def resolve(
  config: Mapping[str, Any] | ConfigDict, keep: tuple[str, ...] = ()
) -> config_dict.Config:
  """Return a checked config in which all that was left open is written out.

  The result is complete and can be resolved again. A preset is an abbreviation:
  its fields are set, whatever they were, and `preset` is cleared; to depart
  from it, change fields after this call. `settings` and `reader_lr` are cleared
  likewise. With `task="all"`, fields that depend on the task are left to
  `config_for`; with `methods`, all that depend on the method, and `method` is
  empty.

  Args:
    config: a changed `default_config()`, which is not modified; or a dict of
      the changes, such as `config.json` of a run.
    keep: fields that a preset must not change (those given on the command
      line).

  Raises:
    UserError: an unknown name, or an invalid value.
  """
  config = _copy(config)
  validate.check(config)
  if config.preset == "authors":
    _apply_authors_preset(config, keep)
  if config.methods:
    if "method" in keep:
      raise errors.UserError(
        f"config.method={config.method} and config.methods={config.methods}:"
        " give one of them."
      )
    config.methods = ",".join(methods_lib.split_list(config.methods))
    config.method = ""
    _fill_warmup(config)
    return config
  method = methods_lib.parse(config.method)
  if not config.solver and method.may_be_exact:
    config.solver = "exact"
  if config.solver == "exact":
    config.settings = 0
  else:
    _fill_recipe(config, method)
  if not method.trains_network:  # Else see `fill_epochs`.
    config.epochs = config.epochs or _EPOCHS
  _fill_warmup(config)
  if config.settings:
    _limit_settings(config)
  if config.task != vtab.ALL:
    _fill_task_defaults(config, method)
  validate.check(config)
  return config


def config_for(
  config: config_dict.Config, **changes: str
) -> config_dict.Config:
  """Return the resolved config of one run out of several.

  Args:
    config: resolved, of `task="all"` or of `methods`.
    **changes: `task`, or `method`.
  """
  config = copy.deepcopy(config)
  if "method" in changes:
    config.methods = ""
    method = methods_lib.parse(changes["method"])
    only_exact = readers.READERS[method.reader].is_fixed
    if config.solver == "gradient" and only_exact:
      config.solver = ""  # Of the other methods.
    if config.solver == "exact" and not method.may_be_exact:
      config.solver = ""
  config.update(changes)
  return resolve(config)


def fill_epochs(
  config: config_dict.Config, num_images: int
) -> config_dict.Config:
  """Return a resolved config with the epochs that depend on the images.

  Those of `combo` and `auto`: 40, or as many as make 200 steps.

  Args:
    config: resolved.
    num_images: images to train on.

  Raises:
    UserError: there are more epochs of warm-up.
  """
  config = copy.deepcopy(config)
  if not config.epochs:
    steps = -(-num_images // config.batch_size)
    config.epochs = max(_NETWORK_EPOCHS, -(-_NETWORK_STEPS // steps))
  _fill_warmup(config)
  validate.check(config)
  return config


def recipe(method: methods_lib.Method) -> dict[str, Any]:
  """Return a method's published recipe, as fields of a config."""
  rate = 1.0
  if method.trains_network:
    optimizer, lr = _COMBO_RECIPE
    return {
      "optimizer": optimizer,
      "lr": lr,
      "weight_decay": (_SETTINGS_DECAY,),
      "editor_rate": rate,
    }
  if method.reader == "linear" and method.editor:
    prompts = editors.EDITORS[method.editor].has_prompts
    optimizer, lr = _PROMPT_RECIPE if prompts else _EDITOR_RECIPE
  else:
    head2toe = method.reader == "head2toe"
    optimizer, lr = _HEAD2TOE_RECIPE if head2toe else _READER_RECIPE
    rate = _EDITOR_RATE if method.editor else 1.0
  return {"optimizer": optimizer, "lr": lr, "editor_rate": rate}


def choose_rates(rates: tuple[float, ...], count: int) -> tuple[float, ...]:
  """Choose a number of rates, evenly from the first to the last.

  One rate is the middle one. If there are too few rates, others between them
  are added, evenly on a logarithmic scale; but nothing is added to one alone.
  """
  count = count if len(rates) > 1 else 1
  positions = np.linspace(0, len(rates) - 1, count)
  if count == 1:
    positions = np.array([(len(rates) - 1) / 2])
  if count <= len(rates):
    return tuple(rates[i] for i in np.rint(positions).astype(int))
  logs = np.interp(positions, range(len(rates)), np.log(rates))
  return tuple(float(f"{rate:.3g}") for rate in np.exp(logs))


def _copy(config: Mapping[str, Any] | ConfigDict) -> config_dict.Config:
  if isinstance(config, config_dict.Config):
    return copy.deepcopy(config)
  if not hasattr(config, "items"):
    raise errors.UserError(
      "config: expected default_config() with changes, or a dict of these,"
      f" found {config!r}."
    )
  copied = config_dict.default_config()
  copied.update(config_dict.drop_retired(config))
  return copied


def _apply_authors_preset(
  config: config_dict.Config, keep: tuple[str, ...]
) -> None:
  defaults = config_dict.default_config()
  values = {name: defaults[name] for name in _AUTHORS_DEFAULTS} | _AUTHORS
  method = methods_lib.parse(config.method)
  if method != methods_lib.Method("vqt"):
    values["embedding_dropout"] = 0.0
  if method.may_be_exact and not readers.READERS[method.reader].is_fixed:
    values["solver"] = "gradient"
  for name, value in values.items():
    if name not in keep:
      config[name] = value
  config.preset = ""


def _fill_recipe(
  config: config_dict.Config, method: methods_lib.Method
) -> None:
  """Set the fields of the method's recipe that still have their defaults."""
  if _is_default(config, "lr") and not method.editor:
    config.lr = config.reader_lr[method.reader]
  for name in config.reader_lr:
    config.reader_lr[name] = fields.FIELDS[f"reader_lr.{name}"].default
  for name, value in recipe(method).items():
    if _is_default(config, name):
      config[name] = value


def _fill_warmup(config: config_dict.Config) -> None:
  if config.epochs and config.warmup_epochs < 0:
    config.warmup_epochs = config.epochs // 10


def _limit_settings(config: config_dict.Config) -> None:
  """Set the rates and the weight decay of as many settings as are wanted."""
  config.lr = choose_rates(config.lr, config.settings)
  if len(config.weight_decay) > 1:
    config.weight_decay = (_SETTINGS_DECAY,)
  config.settings = 0


def _fill_task_defaults(
  config: config_dict.Config, method: methods_lib.Method
) -> None:
  """Set the fields that the authors choose by the task, if they are 0."""
  task = vtab.find_task(config.task)
  if _is_default(config, "num_queries"):
    config.num_queries = vtab.NUM_QUERIES.get(task.name, 1) if task else 1
    if method.reader in ("instant", "auto"):
      config.num_queries = INSTANT_QUERIES
  if _is_default(config, "keep_fraction"):
    is_vqt = method == methods_lib.Method("vqt")
    selects = is_vqt and config.num_queries == 1 and task
    config.keep_fraction = (AUTHORS_KEEP if selects else 1.0,)
    if method.reader == "head2toe":
      config.keep_fraction = HEAD2TOE_KEEP


def _is_default(config: config_dict.Config, name: str) -> bool:
  return config[name] == fields.FIELDS[name].default
