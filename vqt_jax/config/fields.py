"""The table of all settings of a run.

Defaults, checks, command line flags and `--help` are made from it. The defaults
are the paper's method and its authors' recipe on a frozen, noiseless stream.
"""

import dataclasses
import math
import textwrap
from typing import Any

from ml_collections import ConfigDict

from vqt_jax import errors
from vqt_jax.config import values as values_lib
from vqt_jax.data import decoding
from vqt_jax.models import editors
from vqt_jax.models import methods as methods_lib
from vqt_jax.models import readers

OPTIMIZERS = ("adam", "sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class Field:
  """A setting.

  Attributes:
    default: its type is the field's; a tuple stands for one element or more.
    meaning: for people, with the unit.
    choices: the allowed values, if these are few.
    least: smallest number, of a tuple the smallest element.
    most: largest number.
    used_by: readers and editors whose results depend on it; (): every method.
    resumable: a run may be resumed with another value.
    tuner_option: it is an option of `make_tuner`.
  """

  default: Any
  meaning: str
  choices: tuple[str, ...] = ()
  least: float = 0
  most: float = math.inf
  used_by: tuple[str, ...] = ()
  resumable: bool = False
  tuner_option: bool = False

  @property
  def type_in_words(self) -> str:
    """Type and bounds, or choices, e.g. "a whole number, at least 1"."""
    if self.choices:
      return "one of " + ", ".join(x or '""' for x in self.choices)
    words = values_lib.describe_type(self.default)
    first = self.default[0] if isinstance(self.default, tuple) else self.default
    if type(first) in (int, float):
      words += f", {self._bounds}"
    return words

  @property
  def _bounds(self) -> str:
    if self.most == math.inf:
      return f"at least {self.least}"
    return f"{self.least} to {self.most}"

  def check(self, name: str, value: Any) -> None:
    """Check a value of the right type.

    Raises:
      UserError: it is none of the choices, out of bounds, or in a tuple twice.
    """
    if self.choices:
      if value not in self.choices:
        named = [x or '""' for x in self.choices]
        raise errors.unknown_name(f"config.{name}", value, named)
      return
    elements = value if isinstance(value, tuple) else (value,)
    for x in elements:
      if isinstance(x, (bool, str)):
        continue
      if not (self.least <= x <= self.most and math.isfinite(x)):
        raise errors.UserError(
          f"config.{name}: expected {self._bounds}, found {x}."
        )
    if len(set(elements)) < len(elements):
      raise errors.UserError(
        f"config.{name}={value} holds the same value twice."
      )


_ANY_EDITOR = tuple(editors.EDITORS)
_BLOCK_READERS = tuple(k for k, v in readers.READERS.items() if v.read)
_NORMALIZED = tuple(
  name
  for name, each in readers.READERS.items()
  if each.members or each.read and not each.is_network
)

SECTIONS = {
  "Data": {
    "task": Field(
      "cifar100",
      'A VTAB-1k task, "digits", or NAME[/CONFIG][:VERSION] of a classification'
      " dataset in TensorFlow Datasets (TFDS); or the path of images, ./FOLDER"
      " with a folder per class, or ./TABLE.csv (.tsv, .jsonl) of files and"
      ' labels. "all": each of the 19 VTAB-1k tasks, in a folder of its own,'
      " and a table of their results.",
    ),
    "splits.train": Field(
      "",
      "TFDS split to train on in the search; empty: train[:800]. This and the"
      " next six fields apply to tasks that are not of VTAB-1k.",
    ),
    "splits.val": Field(
      "",
      "TFDS split to choose a setting by; empty: train[800:1000]. Of a folder"
      " or table that is not divided itself, a share; empty: 20%.",
    ),
    "splits.trainval": Field(
      "", "TFDS split to train on with every seed; empty: train and val."
    ),
    "splits.test": Field(
      "",
      "TFDS split to test on; empty: test. Of a folder or table a share, as"
      " splits.val.",
    ),
    "image_key": Field(
      "",
      "Feature that holds the image, or column of a table that holds its path;"
      " empty: as the dataset declares, or a column with a usual name.",
    ),
    "label_key": Field(
      "",
      "Feature or column that holds the label; empty: as the dataset declares,"
      " or a column with a usual name.",
    ),
    "num_classes": Field(0, "Classes; 0: as the dataset declares."),
    "split_key": Field(
      "",
      "Column of a table that holds train, val or test; empty: split, if there"
      " is such a column.",
    ),
    "split_seed": Field(
      0,
      "Seed of the division of a folder or table into train, val and test.",
      most=2**32 - 1,
    ),
    "fit": Field(
      "squash",
      "How images of a folder or table are made to fit: stretched, cropped to"
      " the middle, or padded with grey.",
      choices=decoding.FITS,
    ),
    "skip_bad": Field(
      False, "Go on without images of a folder or table that cannot be read."
    ),
    "data_dir": Field(
      "",
      "Folder of prepared datasets; empty: ~/tensorflow_datasets.",
      resumable=True,
    ),
    "image_size": Field(224, "Height of the resized images, pixels.", least=1),
    "image_width": Field(
      0, "Width of the resized images, pixels; 0: the same as their height."
    ),
    "resize": Field(
      "bilinear",
      "Resizing of TFDS images as TensorFlow 2 does it, or as TensorFlow 1"
      " (legacy, as in VTAB).",
      choices=("bilinear", "legacy"),
    ),
    "value_range": Field(
      "",
      "Range that pixels are scaled to: -1..1, 0..1, imagenet, clip, or mean"
      " and standard deviation per channel, M,M,M/S,S,S; empty: the"
      " checkpoint's own.",
    ),
  },
  "Backbone": {
    "init": Field(
      "howto-i21k-B/16",
      "Checkpoint of the frozen ViT: a file or folder, an https://, gs:// or"
      " hf:// address, a public name, or OWNER/NAME of the Hugging Face hub.",
    ),
    "variant": Field(
      "", "Expected size, e.g. B/16, which the checkpoint is checked against."
    ),
    "pool_type": Field(
      "",
      "Pooling of the final tokens: class token, mean, attention pooling, first"
      " patch (0), or mean before the final LayerNorm (mae); empty: as the"
      " checkpoint tells.",
      choices=("", "tok", "gap", "map", "0", "mae"),
    ),
    "gelu": Field(
      "",
      "GELU by its tanh approximation, exact (erf), or quick (as in CLIP);"
      " empty: the checkpoint's own.",
      choices=("", "tanh", "exact", "quick"),
    ),
    "num_heads": Field(
      0,
      "Attention heads of the backbone; 0: as the checkpoint tells.",
    ),
    "trained_size": Field(
      0,
      "Height of the images of pre-training, pixels; 0: from the checkpoint's"
      " positions, if they form a square.",
    ),
    "trained_width": Field(
      0, "Width of the images of pre-training, pixels; 0: as their height."
    ),
    "dtype": Field(
      "",
      "Dtype of matrix products; empty: bfloat16 on TPU and GPU, else float32.",
      choices=("", "float32", "bfloat16"),
    ),
  },
  "Method": {
    "method": Field(
      "vqt",
      f"A reader ({', '.join(readers.READERS)}), an editor, which the linear"
      f" reader reads ({', '.join(editors.EDITORS)}), or READER+EDITOR.",
    ),
    "methods": Field(
      "",
      'Several methods, separated by commas, or "all": each in a folder of its'
      " own, and a table of their results. Replaces method.",
      resumable=True,
    ),
    "num_queries": Field(
      0,
      "Queries per block; 0: the authors' number for the task, which is 1 for"
      " all but seven VTAB-1k tasks; of instant and auto 4.",
      used_by=("vqt", "instant", "auto"),
      tuner_option=True,
    ),
    "query_dropout": Field(
      0.1,
      "Probability of dropout on queries in training.",
      most=0.99,
      used_by=("vqt",),
    ),
    "combine": Field(
      "concat",
      "How the outputs of a block's queries become features.",
      choices=readers.COMBINE,
      used_by=("vqt",),
      tuner_option=True,
    ),
    "normalize": Field(
      True,
      "Divide the features of each block by their L2 norm.",
      used_by=_NORMALIZED,
      tuner_option=True,
    ),
    "target_size": Field(
      8192,
      "Approximate number of features per block, from means over windows of"
      " tokens; up to the width D: one window.",
      least=1,
      used_by=("head2toe",),
      tuner_option=True,
    ),
    "embedding_dropout": Field(
      0.0, "Probability of dropout on embedded tokens in training.", most=0.99
    ),
    "num_prompts": Field(
      10,
      "Prompts; vpt_deep: in each block.",
      least=1,
      used_by=("vpt_shallow", "vpt_deep"),
      tuner_option=True,
    ),
    "bottleneck": Field(
      0,
      "Hidden size of the adapters; 0: D / 8 (adapter) or 64 (adaptformer).",
      used_by=("adapter", "adaptformer"),
      tuner_option=True,
    ),
    "rank": Field(
      8,
      "Rank of the change of a projection.",
      least=1,
      used_by=("lora",),
      tuner_option=True,
    ),
    "alpha": Field(
      8.0,
      "The change of a projection is scaled by alpha / rank.",
      used_by=("lora",),
      tuner_option=True,
    ),
    "last_blocks": Field(
      1,
      "Number of blocks, from the last, that train.",
      least=1,
      used_by=("partial",),
      tuner_option=True,
    ),
    "editor_rate": Field(
      0.0,
      "Learning rate of the editor's weights, as a multiple of lr; 0: 0.01"
      " beside vqt and head2toe, else 1.",
      used_by=_ANY_EDITOR,
    ),
  },
  "Training": {
    "solver": Field(
      "",
      "How a linear head on features that nothing changes is trained: by"
      " gradient, as other methods, or solved exactly, by which the fields of"
      " the gradient (from here to weight_decay) are not used; empty: exact"
      " for linear, head2toe and instant.",
      choices=("", "exact", "gradient"),
      used_by=("linear", "head2toe", "instant"),
    ),
    "epochs": Field(
      0,
      "Epochs of every trial; 0: 100, but of combo and auto 40, or as many as"
      " make 200 steps.",
    ),
    "warmup_epochs": Field(
      -1,
      "Epochs of linear warm-up before the cosine decay to 0; -1: a tenth of"
      " epochs.",
      least=-1,
    ),
    "schedule": Field(
      "epoch",
      "Whether the learning rate changes every epoch or every step.",
      choices=("epoch", "step"),
    ),
    "batch_size": Field(128, "Images in a training step.", least=1),
    "optimizer": Field(
      "",
      "sgd has momentum 0.9 and coupled L2 decay; empty: as published for the"
      " method.",
      choices=("", *OPTIMIZERS),
    ),
    "lr": Field(
      (0.0,),
      "Peak learning rates to try, per 256 images in a batch; 0: as published"
      " for the method.",
    ),
    **{
      f"reader_lr.{name}": Field(
        (0.0,), "Rates without an editor, if lr is 0.", used_by=(name,)
      )
      for name, reader in readers.READERS.items()
      if not reader.is_fixed
    },
    "weight_decay": Field(
      (1e-2, 1e-3, 1e-4, 0.0),
      "Weight decays to try, not applied to biases; of combo and auto 1e-4 if"
      " nothing else is given.",
    ),
    "class_weights": Field(
      "",
      "Weights of the images in the loss: all alike, or such that every class"
      " weighs the same (balanced).",
      choices=("", "balanced"),
    ),
  },
  "Protocol": {
    "protocol": Field(
      "full",
      "full, the authors': all settings, that is, pairs (lr, weight_decay),"
      " train on train and are compared on val; the best trains on trainval"
      " with every seed and is tested. best: then a wider search.",
      choices=("full", "best"),
    ),
    "settings": Field(
      0,
      "Number of settings to try: so many of the rates, evenly from the first"
      " to the last, with one weight decay (1e-4, if there are several), so"
      " that all methods are searched alike; 0: all rates with all weight"
      " decays.",
    ),
    "keep_fraction": Field(
      (0.0,),
      "Fraction of the features to select, by group lasso or, if the head is"
      " solved exactly, ridge regression; of several the best on val, or in"
      " folds. 0: for vqt the authors' for the task (0.7 where they use one"
      " query per block of a VTAB-1k task), for head2toe several up to 0.5,"
      " else 1.",
      most=1,
    ),
    "seeds": Field(
      (42, 44, 82, 100, 800), "Seeds of the final trials.", most=2**32 - 1
    ),
    "seed": Field(0, "Seed of the order of the examples.", most=2**32 - 1),
    "extend_grid": Field(
      True,
      "protocol=best: while the best learning rate, or weight decay, lies at"
      " an end of its grid, try values beyond it.",
    ),
    "best.num_queries": Field(
      (1, 10),
      "protocol=best: numbers of queries to try too.",
      least=1,
      used_by=("vqt",),
    ),
    "best.query_dropout": Field(
      (0.1,),
      "protocol=best: probabilities of query dropout to try.",
      most=0.99,
      used_by=("vqt",),
    ),
    "best.keep_fractions": Field(
      (0.3, 0.5, 0.7, 0.9),
      "protocol=best: fractions of the features to try beside keep_fraction"
      " and 1.",
      least=0.01,
      most=0.99,
      used_by=_BLOCK_READERS,
    ),
    "best.finalists": Field(
      8,
      "protocol=best: number of settings, the best on val, to cross-validate.",
      least=1,
    ),
    "best.folds": Field(
      5, "protocol=best: folds of trainval in cross-validation.", least=2
    ),
  },
  "Computation (results depend on it by rounding only, except data=stream)": {
    "features": Field(
      "",
      "Memory that stores the frozen features, once computed; live: the"
      " backbone runs in every step; empty: chosen by their size.",
      choices=("", "device", "host", "disk", "live"),
      resumable=True,
    ),
    "feature_dtype": Field(
      "",
      "Dtype of stored features; empty: as dtype.",
      choices=("", "float32", "bfloat16"),
    ),
    "store_dir": Field(
      "",
      "Folder for files of features, which other runs use too; empty: only"
      " features=disk writes files, in the cache folder.",
      resumable=True,
    ),
    "data": Field(
      "",
      "Where images are if features are not stored: in device memory, or"
      " read in every epoch, in another order (stream); empty: chosen by size.",
      choices=("", "device", "stream"),
    ),
    "eval_batch_size": Field(
      128,
      "Images in a batch of extraction or evaluation.",
      least=1,
      resumable=True,
    ),
    "remat": Field(
      False,
      "Recompute blocks in the gradient: less memory, more time.",
      used_by=_ANY_EDITOR,
    ),
    "mesh.model": Field(
      1,
      "Devices that share one copy of the backbone; batches are shared by all.",
      least=1,
    ),
    "checkpoint_seconds": Field(
      60.0, "Seconds between checkpoints.", resumable=True
    ),
  },
  "Presets": {
    "preset": Field(
      "",
      "authors: the authors' program except for its weights; sets the fields of"
      " the recipe, the noise and how images are read.",
      choices=("", "authors"),
    ),
  },
}

FIELDS = {
  name: field for fields in SECTIONS.values() for name, field in fields.items()
}

# Fields of earlier versions -> the value that every run has instead, or None if
# the field never had an effect.
RETIRED = {
  "best.normalize": (True, False),
  "mesh.data": None,
  "search_seed": 100,
}

# Fields, and a group of fields, that `data.make_task` takes beside the name.
TASK_FIELDS = (
  "data_dir",
  "splits",
  "image_key",
  "label_key",
  "num_classes",
  "split_key",
  "split_seed",
  "fit",
)


def find(name: str) -> Field:
  """Return a field by its name, e.g. "num_queries" or "splits.train".

  Raises:
    UserError: there is no such field; the message suggests the nearest ones.
  """
  inside = [f"config.{x}" for x in FIELDS if x.startswith(f"{name}.")]
  if inside:
    raise errors.UserError(
      f"config.{name} is a group of fields; set {', '.join(inside)}."
    )
  if name not in FIELDS:
    # Fields of groups are suggested for names with a dot only.
    known = [field for field in FIELDS if "." in name or "." not in field]
    raise errors.unknown_name("config field", name, known)
  return FIELDS[name]


def is_used(name: str, method: methods_lib.Method | None) -> bool:
  """Return whether the results of a method may depend on a field.

  Args:
    name: of the field.
    method: None for a config of several methods, each of which has a config of
      its own.
  """
  used_by = FIELDS[name].used_by
  if not used_by:
    return True
  return method is not None and (
    method.reader in used_by or method.editor in used_by
  )


# Fields that a head which is computed, not trained, does not depend on.
_OF_GRADIENT = (
  "epochs",
  "warmup_epochs",
  "schedule",
  "batch_size",
  "optimizer",
  "lr",
  "weight_decay",
  "settings",
  "protocol",
  "extend_grid",
)


def is_used_in(name: str, config: ConfigDict) -> bool:
  """Return whether results of any method of a config may depend on a field."""
  methods = map(
    methods_lib.parse, methods_lib.split_list(config.methods or config.method)
  )
  return any(
    is_used(name, method)
    and not (
      name in _OF_GRADIENT
      and method.may_be_exact
      and config.solver != "gradient"
    )
    for method in methods
  )


def may_change(
  name: str, method: methods_lib.Method | None, solver: str = ""
) -> bool:
  """Return whether a run may be resumed with another value of a field.

  Args:
    name: of the field, which need not exist.
    method: as for `is_used`.
    solver: of the run's resolved config.
  """
  if name not in FIELDS:
    return False
  of_others = solver == "exact" and name in _OF_GRADIENT
  return FIELDS[name].resumable or of_others or not is_used(name, method)


def tuner_options(config: ConfigDict) -> dict[str, Any]:
  """Return the options of `make_tuner` that a resolved config sets."""
  method = methods_lib.parse(config.method)
  return {
    name: config[name]
    for name, field in FIELDS.items()
    if field.tuner_option and is_used(name, method)
  }


def describe() -> str:
  """Describe all fields as flags: default, type and meaning, by section."""
  return "\n\n".join(
    "\n".join([f"{title}:", *map(_describe_field, fields, fields.values())])
    for title, fields in SECTIONS.items()
  )


def _describe_field(name: str, field: Field) -> str:
  default = field.default
  if isinstance(default, tuple):
    default = ",".join(map(str, default))
  words = field.meaning
  if field.used_by == _ANY_EDITOR:
    words += " For editors."
  elif field.used_by:
    *others, last = field.used_by
    words += f" For {', '.join(others)}{' and ' * bool(others)}{last}."
  indent = 4 * " "
  lines = textwrap.wrap(
    f"{words} ({field.type_in_words})",
    width=80,
    initial_indent=indent,
    subsequent_indent=indent,
    break_on_hyphens=False,
  )
  return "\n".join([f"--config.{name}={default}", *lines])
