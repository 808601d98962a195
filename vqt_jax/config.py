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
import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections import FieldReference
import numpy as np

from vqt_jax import checks
from vqt_jax import editors
from vqt_jax import errors
from vqt_jax import readers
from vqt_jax import tuner as tuner_lib
from vqt_jax.data import vtab


class Config(ConfigDict):
  """A ConfigDict whose fields take what people pass, or say what they expect.

  What a field gets becomes of the field's type, see `checks.convert`; a group
  of fields takes a dict of those that change.

  Raises, when a field is set:
    UserError: a value of another type, or no such field, with the nearest ones.
  """

  def __init__(self, *args: Any, group: str = "", **kwargs: Any):
    """As a ConfigDict; `group` is the field that holds it, with a dot."""
    object.__setattr__(self, "_group", group)
    super().__init__(*args, **kwargs)

  def __setitem__(self, name: str, value: Any) -> None:
    full = self._group + name
    if name not in self and self.is_locked:
      checks.check_field(full, default_config())
    group, dot, rest = name.partition(".")
    if dot:
      self[group][rest] = value
      return
    if name not in self:
      if hasattr(value, "items"):
        value = Config(value, group=f"{full}.")
    elif isinstance(self[name], Config):
      if not hasattr(value, "items"):
        checks.check_field(full, default_config())  # Names what is in it.
      self[name].update(value)
      return
    elif not isinstance(value, FieldReference):
      value = checks.convert(full, value, self[name])
    super().__setitem__(name, value)

  def update(self, *other: Any, **changes: Any) -> None:
    """Sets fields, those of a group one by one."""
    for name, value in dict(*other, **changes).items():
      self[name] = value


def default_config() -> Config:
  """All fields. Units are in the comments; "" means "decide for me"."""
  c = Config()

  # Data. One of the 19 VTAB-1k tasks, "digits", or any classification dataset
  # of TensorFlow Datasets (TFDS), to which alone the next seven fields apply.
  c.task = "cifar100"  # its name, or "name[/config][:version]" in TFDS; "all":
  # each of the 19, in a folder of its own, and a table of what came out
  c.splits = ConfigDict(
    {
      "train": "",  # searched on; "": "train[:800]"
      "val": "",  # the setting is chosen by it; "": "train[800:1000]"
      "trainval": "",  # of the final runs; "": train and val
      "test": "",  # reported; "": "test"
    }
  )
  c.image_key = ""  # feature that holds the image; "": as the dataset says
  c.label_key = ""  # feature that holds the label; "": as the dataset says
  c.num_classes = 0  # classes; 0: as the dataset says
  c.data_dir = ""  # folder of the prepared datasets; "": ~/tensorflow_datasets
  c.image_size = 224  # height the images are resized to, pixels
  c.image_width = 0  # width, pixels; 0: the same
  c.resize = "bilinear"  # "bilinear" (TF 2), or "legacy" (TF 1, as in VTAB)
  c.value_range = ""  # "-1..1", "0..1", "imagenet"; "": the checkpoint's own

  # Backbone: file, https:// or gs:// address, or public name. It stays frozen.
  c.init = "howto-i21k-B/16"
  c.variant = ""  # e.g. "B/16"; only checked against the file
  c.pool_type = ""  # "tok", "gap", "map", "0" (the first patch), "mae"; "": as
  # the file tells
  c.gelu = ""  # "tanh", "exact"; "": the checkpoint's own
  c.trained_size = 0  # height of the images it was trained on, pixels; 0: as
  # its positions tell, if they form a square
  c.trained_width = 0  # width, pixels; 0: the same
  c.dtype = ""  # of matrix products; "": bfloat16 on TPU/GPU, float32 on CPU

  # Method.
  c.method = "vqt"  # a reader ("vqt": visual query tuning; "head2toe": means of
  # all blocks' tokens; "linear": probe of the end), an editor, read by "linear"
  # ("finetune", "bitfit", "partial", "vpt_shallow", "vpt_deep", "adapter",
  # "adaptformer", "lora", "ssf"), or both: "vqt+vpt_deep"
  c.methods = ""  # several, with commas between them, or "all": each in a
  # folder of its own, and a table of what came out; in the place of method
  c.num_queries = 0  # queries per block (vqt); 0: the authors' for the task,
  # which is 1 but for seven tasks of VTAB
  c.query_dropout = 0.1  # probability, on queries while training (vqt)
  c.combine = "concat"  # a block's queries: "concat", "mean", "weighted_sum"
  c.normalize = True  # divide each block's features by their L2 norm (vqt,
  # head2toe)
  c.target_size = 8192  # features per block, about: as many windows of tokens
  # are averaged; at most the width D: all tokens in one (head2toe)
  c.embedding_dropout = 0.0  # probability, on the embedded tokens in training
  c.num_prompts = 10  # prompts (vpt_shallow), of each block (vpt_deep)
  c.bottleneck = 0  # hidden size (adapter, adaptformer); 0: D / 8 and 64
  c.rank = 8  # of the change of a projection (lora)
  c.alpha = 8.0  # which is scaled by alpha / rank (lora)
  c.last_blocks = 1  # blocks that train (partial)
  c.editor_rate = 0.0  # learning rate of what an editor trains, times lr; 0:
  # 0.01 beside vqt and head2toe, else 1

  # Training.
  c.epochs = 100  # epochs of every run
  c.warmup_epochs = -1  # epochs of linear warm-up, then cosine to 0; -1: a
  # tenth of epochs
  c.schedule = "epoch"  # learning rate changes every "epoch" or every "step"
  c.batch_size = 128  # images
  c.optimizer = ""  # "adam", "sgd" (momentum 0.9; coupled L2), or "adamw";
  # "": as published for the method
  c.lr = (0.0,)  # peak rates per 256 images of batch; 0: as published
  c.reader_lr = ConfigDict(
    {  # the same of a reader alone, if lr is 0
      "vqt": (0.0,),
      "head2toe": (0.0,),
      "linear": (0.0,),
    }
  )
  c.weight_decay = (1e-2, 1e-3, 1e-4, 0.0)  # not on biases

  # Runs. Several (lr, weight_decay) are tried on train and compared on val;
  # the best one is trained on trainval with every seed, and tested.
  c.protocol = "full"  # "full": the authors'; "best": also a wider search
  c.settings = 0  # how many are tried; 0: all rates with all weight decays; N:
  # N rates from the first to the last, with one weight decay (of several 1e-4),
  # so that all methods are searched alike
  c.keep_fraction = (0.0,)  # of the features, by group lasso; of several the
  # best on val; 0: for vqt the authors' for the task (0.7 where they use one
  # query per block of a VTAB task), for head2toe several up to 0.5; else 1
  c.search_seed = 100  # seed of the tried runs
  c.seeds = (42, 44, 82, 100, 800)  # seeds of the final runs
  c.seed = 0  # of the order of the examples

  # What protocol="best" searches beside lr and weight_decay (vqt; fractions of
  # features, with those of keep_fraction, also head2toe).
  c.best = ConfigDict(
    {
      "num_queries": (1, 10),
      "query_dropout": (0.1,),
      "normalize": (True, False),
      "keep_fractions": (0.3, 0.5, 0.7, 0.9),
      "finalists": 8,  # settings, the best on val, that are cross-validated
      "folds": 5,  # of trainval
    }
  )

  # How it is computed; results do not depend on it beyond rounding, but for
  # what is streamed: its examples come in another order.
  c.features = ""  # frozen features are kept on "device", "host" or "disk";
  # "live": the backbone runs in every step; "": decided from their size
  c.feature_dtype = ""  # of kept features; "": as dtype
  c.store_dir = ""  # folder; given, features are kept there for other runs too
  c.data = ""  # live: images kept on "device"; "stream": read every epoch
  c.eval_batch_size = 128  # images
  c.remat = False  # compute blocks again in the gradient (editors): less
  # memory, more time
  c.mesh = ConfigDict(
    {
      "data": -1,  # devices that share a batch; -1: all that are left
      "model": 1,  # devices that share one copy of the backbone
    }
  )
  c.checkpoint_seconds = 60.0  # seconds between saves of a run

  c.preset = ""  # "authors": their program but for its weights; sets the fields
  # of the recipe, the noise and how images are read
  return c.lock()


# What `data.make_task` takes besides the task's name.
TASK_FIELDS = ("data_dir", "splits", "image_key", "label_key", "num_classes")

# Fields that not every method looks at, and the readers and editors that do.
USED_BY = {
  "num_queries": ("vqt",),
  "query_dropout": ("vqt",),
  "combine": ("vqt",),
  "normalize": ("vqt", "head2toe"),
  "target_size": ("head2toe",),
  "num_prompts": ("vpt_shallow", "vpt_deep"),
  "bottleneck": ("adapter", "adaptformer"),
  "rank": ("lora",),
  "alpha": ("lora",),
  "last_blocks": ("partial",),
  "editor_rate": tuple(editors.EDITORS),
  "remat": tuple(editors.EDITORS),
  "best.num_queries": ("vqt",),
  "best.query_dropout": ("vqt",),
  "best.normalize": ("vqt",),
  "best.keep_fractions": ("vqt", "head2toe"),
  **{f"reader_lr.{name}": (name,) for name in readers.READERS},
}
# Those that `make_tuner` takes for a reader.
OF_READERS = ("num_queries", "normalize", "combine", "target_size")

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

# A run may be resumed with other values of these.
RESUMABLE = (
  "checkpoint_seconds",
  "data_dir",
  "eval_batch_size",
  "features",
  "methods",
  "store_dir",
)


def resolve(
  config: Mapping[str, Any] | ConfigDict, keep: tuple[str, ...] = ()
) -> Config:
  """The config with its preset written out, checked.

  A preset is an abbreviation: its fields are set, whatever they were, and
  `preset` is cleared, so that what comes back says all and can be resolved
  again. To depart from a preset, change fields after this call. The same goes
  for `settings` and `reader_lr`. (With `task="all"`, what the authors choose by
  the task is left to `one`, and with `methods` all that depends on the method;
  `method` is empty then.)

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


def _own(config: Mapping[str, Any] | ConfigDict) -> Config:
  """A copy, as a Config."""
  if isinstance(config, Config):
    return copy.deepcopy(config)
  if not hasattr(config, "items"):
    raise errors.UserError(
      "config: expected default_config() with changes, or a dict of these,"
      f" found {config!r}."
    )
  own = default_config()
  own.update(config)
  return own


def one(config: Config, **changes: str) -> Config:
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


def _follow_recipe(config: Config) -> None:
  """Writes out what is empty because it is as published for the method."""
  if config.lr == (0.0,) and config.method in readers.READERS:
    config.lr = config.reader_lr[config.method]
  for name in readers.READERS:
    config.reader_lr[name] = (0.0,)
  for name, value in recipe(config.method).items():
    if config[name] in ("", (0.0,), 0.0):
      config[name] = value


def _follow_budget(config: Config) -> None:
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


def of_tuner(config: Config) -> dict[str, Any]:
  """A resolved config's part of `make_tuner`'s options."""
  sizes = [field.name for field in dataclasses.fields(editors.Options)]
  options = {
    "options": editors.Options(**{name: config[name] for name in sizes})
  }
  named = [name for name in OF_READERS if uses(config.method, name)]
  return options | {name: config[name] for name in named}


def uses(method: str, field: str) -> bool:
  """Whether a method's outcome may depend on a field.

  Args:
    method: as `tuner.parse` takes it, or "" for several, each of which has a
      config of its own.
    field: e.g. "num_queries" or "best.folds".
  """
  if field not in USED_BY:
    return True
  parts = tuner_lib.parse(method) if method else ()
  return any(part in USED_BY[field] for part in parts)


def _follow_authors(config: Config) -> None:
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
  defaults = default_config()
  values = {name: defaults[name] for name in AUTHORS_TOO} | AUTHORS
  if method != "vqt":  # All other methods they train without noise.
    values["embedding_dropout"] = 0.0
  return values


def validate(config: Config) -> None:
  """Checks all that can be known without files and devices.

  Raises:
    UserError: with the field, what was expected and what was found.
  """
  checks.check(config, default_config())


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
  """Reads a config file's string argument, `name=value,name=value`.

  A name whose default is a tuple takes all values up to the next name:
  `names=a,b,c,name=value`.

  Args:
    arg: what follows the colon in `--config file.py:arg`, or None.
    **defaults: name -> default, whose type the value must have.

  Returns:
    The defaults, replaced by what was given.

  Raises:
    UserError: an unknown name (with the nearest ones) or a wrong type.
  """
  booleans = {"true": True, "1": True, "false": False, "0": False}
  values, name = dict(defaults), ""
  for part in filter(None, (arg or "").split(",")):
    if "=" not in part and isinstance(defaults.get(name), tuple):
      values[name] += (part.strip(),)
      continue
    name, equals, text = (x.strip() for x in part.partition("="))
    if name not in defaults:
      raise errors.unknown("config argument", name, defaults)
    kind = type(defaults[name])
    if kind is tuple and equals:
      values[name] = (text,) if text else ()
      continue
    try:
      if not equals:
        raise ValueError("no value")
      values[name] = booleans[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as e:
      raise errors.UserError(
        f"Config argument {part!r}: expected {name}=value, with"
        f" {checks.expected(defaults[name])} as the value."
      ) from e
  return values


def to_json(config: Config) -> dict[str, Any]:
  """The config as JSON would give it back: plain dicts, lists and numbers."""
  return json.loads(json.dumps(config.to_dict()))


def differences(
  old: dict[str, Any], new: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Fields whose values differ between two `to_json` results: (old, new)."""
  old, new = checks.flatten(old), checks.flatten(new)
  return {
    name: (old.get(name), new.get(name))
    for name in {**old, **new}
    if old.get(name) != new.get(name)
  }
