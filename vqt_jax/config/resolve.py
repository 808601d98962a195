"""What a run is made of: every field with its default and unit.

A config is a `Config` that starts from `default_config`; no other fields exist.
The defaults are the paper's method and the authors' recipe on a frozen,
noiseless stream. What their program does otherwise (and what changes results)
sits in these fields, all set by `preset="authors"`:

  embedding_dropout  0.1: noise on the frozen stream while queries train
  resize             "legacy": TensorFlow 1's bilinear resize
  value_range        "imagenet": its mean and deviation, whatever the backbone
  gelu, dtype        exact (erf) GELU, float32 products, whatever the backbone
  schedule           "epoch" (also the default): the first epoch has rate 0
"""

from collections.abc import Mapping
import copy
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.config import validate as validate_lib
from vqt_jax.data import vtab
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib

# What the authors' program does otherwise than the defaults above, and the
# fields in which the defaults are already theirs.
AUTHORS = {
  "resize": "legacy",
  "value_range": "imagenet",
  "gelu": "exact",
  "dtype": "float32",
  "embedding_dropout": 0.1,
}
AUTHORS_KEEP = 0.7  # Of the features, on VTAB tasks with one query per block.
# Of the features; the Head2Toe authors' commands have 0.01 and 0.2, but of more
# features, see docs/methods.md.
HEAD2TOE_KEEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Optimiser and peak rates. Readers alone: the VQT authors', and those of
# Head2Toe; their rates are of a head, so editors beside such readers move at a
# fraction of them (`EDITOR_RATE`). Prompts, and all else: the searches of the
# VPT paper (docs/methods.md).
READERS_RECIPE = ("adam", (1.0, 0.5, 0.25, 0.1, 0.05))
HEAD2TOE_RECIPE = ("adam", (0.2, 0.02))  # Theirs: 0.1 and 0.01, batch 128.
PROMPTS_RECIPE = (
  "sgd",
  (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
)
EDITORS_RECIPE = ("adamw", (5e-3, 1e-3, 5e-4, 1e-4))
EDITOR_RATE = 0.01
SETTINGS_DECAY = 1e-4  # Of a search of so many settings.
AUTHORS_TOO = (
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
  "search_seed",
  "seeds",
  "protocol",
  "keep_fraction",
)


def resolve(
  config: Mapping[str, Any] | ConfigDict, keep: tuple[str, ...] = ()
) -> fields.Config:
  """The config with its preset written out, checked.

  A preset is an abbreviation: its fields are set, whatever they were, and
  `preset` is cleared, so that what comes back says all and can be resolved
  again. To depart from a preset, change fields after this call. The same goes
  for `settings` and `reader_lr`. (With `task="all"`, what the authors choose by
  the task is left to `config_for`, and with `methods` all that depends on the
  method; `method` is empty then.)

  Args:
    config: a changed `default_config()`, which is left as it is; or a dict of
      what to change in it, such as `config.json` of a run.
    keep: fields that the preset must leave alone (`main.py` names those given
      on the command line).

  Raises:
    UserError: an unknown name, or a value that makes no sense.
  """
  config = _own(config)
  validate(config)
  if config.preset == "authors":
    for name, value in _authors(config.method).items():
      if name not in keep:
        config[name] = value
    config.preset = ""
  if config.warmup_epochs < 0:
    config.warmup_epochs = config.epochs // 10
  if config.methods:  # The rest is each method's own.
    if "method" in keep:
      raise errors.UserError(
        f"config.method={config.method} and config.methods={config.methods}:"
        " give one of them."
      )
    config.methods = ",".join(tuner_lib.parse_list(config.methods))
    config.method = ""
    return config
  _follow_recipe(config)
  if config.settings:
    _follow_budget(config)
  if config.task != vtab.ALL:  # Else each task's own.
    _follow_authors(config)
  validate(config)
  return config


def _own(config: Mapping[str, Any] | ConfigDict) -> fields.Config:
  """A copy, as a Config."""
  if isinstance(config, fields.Config):
    return copy.deepcopy(config)
  if not hasattr(config, "items"):
    raise errors.UserError(
      "config: expected default_config() with changes, or a dict of these,"
      f" found {config!r}."
    )
  own = fields.default_config()
  own.update(config)
  return own


def config_for(config: fields.Config, **changes: str) -> fields.Config:
  """What a resolved config of several runs means for one of them, resolved.

  Args:
    config: of `task="all"`, or of `methods`.
    **changes: `task`, or `method`.
  """
  config = copy.deepcopy(config)
  if "method" in changes:
    config.methods = ""
  config.update(changes)
  return resolve(config)


def recipe(method: str) -> dict[str, Any]:
  """Optimiser, rates, and the editor's rate, as published for a method."""
  reader, editor = tuner_lib.parse(method)
  if not editor or reader != "linear":
    alike = reader == "head2toe"
    optimizer, lr = HEAD2TOE_RECIPE if alike else READERS_RECIPE
    rate = EDITOR_RATE if editor else 1.0
  else:
    prompts = editor.startswith("vpt_")
    optimizer, lr = PROMPTS_RECIPE if prompts else EDITORS_RECIPE
    rate = 1.0
  return {"optimizer": optimizer, "lr": lr, "editor_rate": rate}


def _follow_recipe(config: fields.Config) -> None:
  """Writes out what is empty because it is as published for the method."""
  if config.lr == (0.0,) and config.method in readers.READERS:
    config.lr = config.reader_lr[config.method]
  for name in readers.READERS:
    config.reader_lr[name] = (0.0,)
  for name, value in recipe(config.method).items():
    if config[name] in ("", (0.0,), 0.0):
      config[name] = value


def _follow_budget(config: fields.Config) -> None:
  """Writes out which rates and weight decay `settings` stands for."""
  config.lr = spread(config.lr, config.settings)
  if len(config.weight_decay) > 1:
    config.weight_decay = (SETTINGS_DECAY,)
  config.settings = 0


def spread(rates: tuple[float, ...], count: int) -> tuple[float, ...]:
  """So many of some rates, evenly, with the first and the last.

  One is the middle one. Where more are wanted than there are, they lie between
  these, at even steps of the logarithm from each to the next.
  """
  places = np.linspace(0, len(rates) - 1, count)
  if count == 1:
    places = np.array([(len(rates) - 1) / 2])
  if count <= len(rates):
    return tuple(rates[i] for i in np.rint(places).astype(int))
  logs = np.interp(places, range(len(rates)), np.log(rates))
  return tuple(float(f"{rate:.3g}") for rate in np.exp(logs))


def _follow_authors(config: fields.Config) -> None:
  """Writes out what is 0 because the authors choose it by the task."""
  task = vtab.find(config.task)
  if not config.num_queries:
    config.num_queries = vtab.NUM_QUERIES.get(task.name, 1) if task else 1
  if config.keep_fraction == (0.0,):
    selects = config.method == "vqt" and config.num_queries == 1
    config.keep_fraction = (AUTHORS_KEEP if selects and task else 1.0,)
    if tuner_lib.parse(config.method)[0] == "head2toe":
      config.keep_fraction = HEAD2TOE_KEEP


def _authors(method: str) -> dict[str, Any]:
  defaults = fields.default_config()
  values = {name: defaults[name] for name in AUTHORS_TOO} | AUTHORS
  if method != "vqt":  # All other methods they train without noise.
    values["embedding_dropout"] = 0.0
  return values


def validate(config: fields.Config) -> None:
  """Checks all that can be known without files and devices.

  Raises:
    UserError: with the field, what was expected and what was found.
  """
  validate_lib.check(config, fields.default_config())
