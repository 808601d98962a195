"""Tuners: an optional editor, a reader and a head, by the method's name.

A method is a reader ("vqt"), an editor with the linear reader ("lora"), or a
reader and an editor ("vqt+vpt_deep").

Parameters are one tree {"backbone", "tuner", "head"}. `labels` names every leaf
"train" or "frozen"; `split` cuts the tree along them with optax's own
`MaskedNode` in the holes, so that gradients, optimiser state and saved files
know only what is trained. "tuner" holds "queries", "combine" and, under
"editor", all that an editor trains: copies of backbone leaves as well.
"""

import dataclasses
import math
import numbers
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqt_jax import errors
from vqt_jax.models import attention
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import editors
from vqt_jax.models import head
from vqt_jax.models import readers
from vqt_jax.models import vit
from vqt_jax.models import vit_config

# Readers, and editors with the linear one; all other pairs are READER+EDITOR.
METHODS = (*readers.READERS, *editors.EDITORS)
# What stands for all of them, and the pairs that it stands for too.
ALL = "all"
PAIRS = ("vqt+vpt_deep", "vqt+adaptformer")
# Parts of the parameters that a method brings; the backbone is frozen.
TRAINED = ("tuner", "head")


def parse(method: str, what: str = "method") -> tuple[str, str | None]:
  """The reader and the editor of a method.

  Args:
    method: e.g. "lora" or "vqt+lora".
    what: it is called in messages.

  Raises:
    UserError: unknown, with the nearest names.
  """
  reader, plus, editor = method.partition("+")
  if not plus:
    if method not in METHODS:
      raise errors.unknown_name(what, method, METHODS)
    return (method, None) if method in readers.READERS else ("linear", method)
  if reader not in readers.READERS:
    raise errors.unknown_name(f"reader of {what}", reader, readers.READERS)
  if editor not in editors.EDITORS:
    raise errors.unknown_name(f"editor of {what}", editor, editors.EDITORS)
  return reader, editor


def parse_list(methods: str, what: str = "methods") -> tuple[str, ...]:
  """The methods of a list.

  Args:
    methods: with commas between them, or "all": `METHODS` and `PAIRS`.
    what: it is called in messages.

  Raises:
    UserError: one is unknown, with the nearest names, or there twice.
  """
  if methods == ALL:
    return METHODS + PAIRS
  names = tuple(name.strip() for name in methods.split(","))
  for i, name in enumerate(names):
    parse(name, what)
    if name in names[:i]:
      raise errors.UserError(f"{what}={methods} names {name} twice.")
  return names


@dataclasses.dataclass(frozen=True)
class Tuner:
  """A method, ready for one backbone and one task.

  Attributes:
    method: as `parse` takes it, e.g. "vqt" (visual query tuning), "head2toe"
      (means of all blocks' tokens), "linear" (probe of the final feature),
      "lora", "vqt+vpt_deep".
    config: architecture of the backbone.
    num_classes: classes C of the task.
    num_queries: queries T per block (vqt).
    normalize: divide each feature group by its L2 norm (vqt, head2toe).
    combine: how a block's T outputs become features (vqt):
      "concat", "mean" or "weighted_sum".
    target_size: features per block, about (head2toe); see `readers.window`.
    options: sizes of the editor.
  """

  method: str
  config: vit_config.ViTConfig
  num_classes: int
  num_queries: int = 1
  normalize: bool = True
  combine: Literal["concat", "mean", "weighted_sum"] = "concat"
  target_size: int = 8192
  options: editors.Options = editors.Options()

  @property
  def reader(self) -> readers.Reader:
    return readers.READERS[parse(self.method)[0]]

  @property
  def editor(self) -> str | None:
    """Its name, or None: then the stream is frozen and no gradient enters."""
    return parse(self.method)[1]

  @property
  def edit(self) -> attention.Edit | None:
    """What hooks into the blocks, if the editor has any such."""
    make = self.editor and editors.EDITORS[self.editor].edit
    return make(self.config, self.options) if make else None

  @property
  def reads_blocks(self) -> bool:
    """Whether it needs the tokens of every block, or the final feature only."""
    return self.reader.blocks

  @property
  def has_queries(self) -> bool:
    return self.reader.queries

  @property
  def window(self) -> int:
    """Successive tokens of which only the mean is read; 1: each for itself."""
    if self.has_queries or not self.reads_blocks:
      return 1
    return readers.window(self.config, self.target_size)

  @property
  def num_features(self) -> int:
    """F: D for the final feature, and as many per query or window of a block.

    A block's queries count as one if they are combined.
    """
    if not self.reads_blocks:
      return self.config.width
    per_block = self.num_queries if self.combine == "concat" else 1
    if not self.has_queries:
      per_block = self.config.num_tokens // self.window
    return self.config.width * (1 + self.config.depth * per_block)

  def init(self, key: jax.Array, params: Any = None) -> dict[str, Any]:
    """Fresh trained parameters {"tuner", "head"}, float32.

    Args:
      key: what is random comes from.
      params: the backbone's; editors that train copies of its leaves start from
        them, others do without.
    """
    query_key, head_key = jax.random.split(key)
    tuner = {}
    if self.editor:
      editor_key = jax.random.fold_in(key, 2)  # The others stay as they are.
      tuner["editor"] = editors.init(
        self.editor, self.config, self.options, editor_key, params
      )
    if self.has_queries:
      tuner["queries"] = readers.init_queries(
        self.config, self.num_queries, query_key
      )
      if self.combine == "weighted_sum":
        tuner["combine"] = jnp.ones(
          (self.config.depth, self.num_queries), jnp.float32
        )
    return {
      "tuner": tuner,
      "head": head.init(self.num_features, self.num_classes, head_key),
    }

  def shapes(self) -> dict[str, Any]:
    """Shapes and dtypes of what `init` gives."""
    params = vit.param_shapes(self.config)
    return jax.eval_shape(self.init, jax.random.key(0), params)

  def stream(
    self,
    variables: Any,
    images: jax.Array,
    embedding_mask: jax.Array | None = None,
    remat: bool = False,
  ) -> vit.Stream:
    """What it reads of images; differentiable if it has an editor.

    Where only means of tokens are read, these are the stream's tokens.

    Args:
      variables: {"backbone", "tuner"}.
      images: (B, height, width, 3).
      embedding_mask: see `vit.ViT`.
      remat: the same.
    """
    if not self.editor:
      params = variables["backbone"]
      return run_backbone(
        self.config,
        self.reads_blocks,
        params,
        images,
        embedding_mask,
        self.window,
      )
    own = variables["tuner"]["editor"]
    stream = vit.ViT(self.config).apply(
      {"params": editors.replaced(variables["backbone"], own)},
      images,
      collect=("tokens",) if self.reads_blocks else (),
      embedding_mask=embedding_mask,
      edit=self.edit,
      weights=own,
      remat=remat,
    )
    if self.has_queries or not self.reads_blocks:
      return stream
    return _pooled(self.config, stream, self.window)

  def read(self, make_step: Any, variables: Any, queries: Any, *args: Any):
    """Scans `readers.query_step` or its like over depth; see `readers.read`."""
    params, edit = variables["backbone"], self.edit
    own = variables["tuner"].get("editor", {})
    blocks = editors.replaced(params, own)["Transformer"]["encoderblock"]
    weights = queries
    if edit:
      weights = (queries, own.get("encoderblock", {}))
    return readers.read(make_step(self.config, edit), blocks, weights, *args)

  def __call__(
    self,
    variables: Any,
    tokens: jax.Array | None,
    final: jax.Array,
    query_mask: jax.Array | None = None,
    normalize: jax.Array | None = None,
    rows: jax.Array | None = None,
  ) -> "Output":
    """Reads the stream and classifies what was read.

    Args:
      variables: {"backbone", "tuner", "head"}; of the backbone only the blocks.
      tokens: LN_0(z_m) of every block (L, B, N, D), or its means in windows as
        `stream` gives them; None for "linear".
      final: the backbone's pooled output (B, D).
      query_mask: (L, B, T, D), multiplies the queries (dropout), or None.
      normalize: () bool in the place of `self.normalize` (vqt), or None.
      rows: (B,) int32, if `tokens` are a store of more examples: (L, n, N, D),
        or with queries (vqt) their keys and values (L, n, 2, H, N, K).

    Returns:
      Logits, features and what the queries read.
    """
    if not self.reads_blocks:
      return Output(head.logits(variables["head"], final), final, None)
    outputs = None
    if self.has_queries:
      queries = variables["tuner"]["queries"]
      if query_mask is not None:
        queries = queries[:, None] * query_mask
      outputs = self.read(readers.query_step, variables, queries, tokens, rows)
      groups = readers.combine(
        outputs, self.combine, variables["tuner"].get("combine")
      )
    else:
      groups = readers.flat(tokens, rows)
    if normalize is None or not self.has_queries:
      # A constant, so that runs side by side share features no run changes.
      normalize = self.normalize
    final = jnp.where(normalize, head.normalize(final), final)
    groups = jnp.where(normalize, head.normalize(groups), groups)
    groups = jnp.moveaxis(groups, 0, 1).reshape(final.shape[0], -1)
    features = jnp.concatenate([final, groups], axis=-1)
    return Output(head.logits(variables["head"], features), features, outputs)


@flax.struct.dataclass
class Output:
  """Result of a tuner.

  Attributes:
    logits: (B, C), float32.
    features: (B, F), float32, as the head gets them.
    queries: outputs of the queries (L, B, T, D), float32, or None.
  """

  logits: jax.Array
  features: jax.Array
  queries: jax.Array | None

  __repr__ = vit.show_shapes


def make_tuner(
  method: str,
  backbone: backbone_lib.Backbone | vit_config.ViTConfig,
  num_classes: int,
  **options,
) -> Tuner:
  """A tuner by name.

  Args:
    method: as `parse` takes it.
    backbone: what it is for, or the architecture of that.
    num_classes: classes of the task.
    **options: further fields of `Tuner`, and of `editors.Options`.

  Raises:
    UserError: an unknown method or option, or a value that makes no sense.
  """
  config = getattr(backbone, "config", backbone)
  if not isinstance(config, vit_config.ViTConfig):
    raise errors.UserError(
      f"backbone: expected a Backbone or its ViTConfig, found {backbone!r}."
    )
  of_editor = _defaults(editors.Options)
  known = {"method": "", "num_classes": 0} | _defaults(Tuner) | of_editor
  for name in options:
    if name not in known:
      raise errors.unknown_name("option of make_tuner", name, known)
  _check({"method": method, "num_classes": num_classes, **options}, known)
  sizes = dataclasses.replace(
    options.pop("options", editors.Options()),
    **{name: options.pop(name) for name in of_editor if name in options},
  )
  _check(vars(sizes), of_editor)
  parse(method)
  tuner = Tuner(method, config, num_classes, options=sizes, **options)
  if tuner.combine not in readers.COMBINE:
    raise errors.unknown_name("combine", tuner.combine, readers.COMBINE)
  if tuner.editor == "partial" and tuner.options.last_blocks > config.depth:
    raise errors.UserError(
      f"{method}: expected last_blocks of at most {config.depth}, the depth"
      f" of the backbone, found {tuner.options.last_blocks}."
    )
  return tuner


# Smallest values; all other numbers may be 0.
_LEAST = {"num_classes": 2} | dict.fromkeys(
  ("num_queries", "target_size", "num_prompts", "rank", "last_blocks"), 1
)
# Type of a default -> what is taken in its place, and that in words.
_KINDS = {
  bool: ((bool, np.bool_), "True or False"),
  int: (numbers.Integral, "a whole number of at least"),
  float: (numbers.Real, "a number of at least"),
  str: (str, "text"),
  editors.Options: (editors.Options, "a vqt_jax.models.editors.Options"),
}


def _defaults(kind: type) -> dict[str, Any]:
  """The fields of a dataclass that have a default."""
  return {
    field.name: field.default
    for field in dataclasses.fields(kind)
    if field.default is not dataclasses.MISSING
  }


def _check(values: dict[str, Any], defaults: dict[str, Any]) -> None:
  """Refuses values that are not of their default's type, or too small."""
  for name, value in values.items():
    kind, words = _KINDS[type(defaults[name])]
    right = isinstance(value, kind)
    if kind in (numbers.Integral, numbers.Real):
      least = _LEAST.get(name, 0)
      words += f" {least}"
      right = right and not isinstance(value, bool)
      right = right and least <= value < math.inf
    if not right:
      raise errors.UserError(f"{name}: expected {words}, found {value!r}.")


def apply(
  backbone: backbone_lib.Backbone,
  tuner: Tuner,
  variables: Any,
  images: jax.Array,
) -> Output:
  """Images (B, height, width, 3), scaled as the backbone wants, to an output.

  Args:
    backbone: the frozen ViT.
    tuner: made for `backbone.config`.
    variables: {"tuner", "head"} from `tuner.init` or training.
    images: float, scaled to `backbone.value_range`.

  Raises:
    UserError: as `Backbone.checked`.
  """
  images = backbone.checked(images)
  return _apply(tuner, backbone.params, variables, images)


@jax.jit(static_argnums=0)
def _apply(tuner, params, variables, images):
  variables = {**variables, "backbone": params}
  stream = tuner.stream(variables, images)
  return tuner(variables, stream.tokens, stream.final)


def run_backbone(
  config: vit_config.ViTConfig,
  tokens: bool,
  params: Any,
  images: jax.Array,
  embedding_mask: jax.Array | None = None,
  window: int = 1,
) -> vit.Stream:
  """The frozen stream of some images, with or without the blocks' tokens.

  Of these the means in windows, see `readers.pool`.
  """
  stream = vit.ViT(config).apply(
    {"params": params},
    images,
    collect=("tokens",) if tokens else (),
    embedding_mask=embedding_mask,
  )
  if window > 1:
    stream = _pooled(config, stream, window)
  return jax.lax.stop_gradient(stream)


def _pooled(
  config: vit_config.ViTConfig, stream: vit.Stream, window: int
) -> vit.Stream:
  tokens = readers.pool(config, stream.tokens, window)
  return dataclasses.replace(stream, tokens=tokens)


def labels(variables: Any, trains: tuple[str, ...] = TRAINED) -> Any:
  """ "train" or "frozen" for every leaf of {"backbone", "tuner", "head"}."""
  label = lambda part: "train" if part in trains else "frozen"
  return {
    name: jax.tree.map(lambda _, part=name: label(part), tree)
    for name, tree in variables.items()
  }


def split(variables: Any, leaf_labels: Any) -> tuple[Any, Any]:
  """Cuts a tree into (trained, frozen); each has `MaskedNode` holes."""
  keep = lambda wanted: jax.tree.map(
    lambda label, leaf: leaf if label == wanted else optax.MaskedNode(),
    leaf_labels,
    variables,
  )
  return keep("train"), keep("frozen")


def partition(
  params: Any, variables: Any, trains: tuple[str, ...] = TRAINED
) -> tuple[Any, Any]:
  """Backbone `params` and {"tuner", "head"}, split by their labels."""
  variables = {**variables, "backbone": params}
  return split(variables, labels(variables, trains))


def merge(trained: Any, frozen: Any) -> Any:
  """Inverse of `split`."""
  hole = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda t, f: f if hole(t) else t, trained, frozen, is_leaf=hole
  )
