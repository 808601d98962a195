"""Fields of a config: names, defaults, units, and which methods use them."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections import FieldReference

from vqt_jax import errors
from vqt_jax.config import values as values_lib
from vqt_jax.models import editors
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib


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
      values_lib.check_field(full, default_config())
    group, dot, rest = name.partition(".")
    if dot:
      self[group][rest] = value
      return
    if name not in self:
      if hasattr(value, "items"):
        value = Config(value, group=f"{full}.")
    elif isinstance(self[name], Config):
      if not hasattr(value, "items"):
        values_lib.check_field(full, default_config())  # Names what is in it.
      self[name].update(value)
      return
    elif not isinstance(value, FieldReference):
      value = values_lib.convert(full, value, self[name])
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
  c.splits = {
    "train": "",  # searched on; "": "train[:800]"
    "val": "",  # the setting is chosen by it; "": "train[800:1000]"
    "trainval": "",  # of the final runs; "": train and val
    "test": "",  # reported; "": "test"
  }
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
  c.reader_lr = {  # the same of a reader alone, if lr is 0
    "vqt": (0.0,),
    "head2toe": (0.0,),
    "linear": (0.0,),
  }
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
  c.best = {
    "num_queries": (1, 10),
    "query_dropout": (0.1,),
    "normalize": (True, False),
    "keep_fractions": (0.3, 0.5, 0.7, 0.9),
    "finalists": 8,  # settings, the best on val, that are cross-validated
    "folds": 5,  # of trainval
  }

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
  c.mesh = {
    "data": -1,  # devices that share a batch; -1: all that are left
    "model": 1,  # devices that share one copy of the backbone
  }
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

# A run may be resumed with other values of these.
RESUMABLE = (
  "checkpoint_seconds",
  "data_dir",
  "eval_batch_size",
  "features",
  "methods",
  "store_dir",
)


def tuner_options(config: Config) -> dict[str, Any]:
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
      raise errors.unknown_name("config argument", name, defaults)
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
        f" {values_lib.expected(defaults[name])} as the value."
      ) from e
  return values


def to_json(config: Config) -> dict[str, Any]:
  """The config as JSON would give it back: plain dicts, lists and numbers."""
  return json.loads(json.dumps(config.to_dict()))


def differences(
  old: dict[str, Any], new: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Fields whose values differ between two `to_json` results: (old, new)."""
  old, new = values_lib.flatten(old), values_lib.flatten(new)
  return {
    name: (old.get(name), new.get(name))
    for name in {**old, **new}
    if old.get(name) != new.get(name)
  }


OPTIMIZERS = ("adam", "sgd", "adamw")
