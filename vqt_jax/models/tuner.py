"""Tuners: an optional editor, a reader and a head.

The parameters of a tuner on its backbone are one tree {"backbone", "tuner",
"head"}. `labels` marks every leaf "train" or "frozen"; `split` divides the tree
by these labels, with optax's `MaskedNode` in place of the other leaves, so that
gradients, optimiser state and saved files hold trainable leaves only. "tuner"
holds "queries", "combine" and "editor": all that an editor trains, copies of
backbone leaves included.
"""

import dataclasses
import functools
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
from vqt_jax.models import methods
from vqt_jax.models import readers
from vqt_jax.models import vit
from vqt_jax.models import vit_config

# Parts of the parameters that train; the backbone is frozen.
TRAINED = ("tuner", "head")


@dataclasses.dataclass(frozen=True)
class Tuner:
  """A method for one backbone and one task.

  Attributes:
    method: its name, e.g. "vqt" (visual query tuning), "head2toe" (means of all
      blocks' tokens), "linear" (probe of the final feature), "lora",
      "vqt+vpt_deep"; see `methods.parse`.
    config: architecture of the backbone.
    num_classes: classes C of the task.
    num_queries: queries T per block (vqt).
    normalize: divide each feature group by its L2 norm (vqt, head2toe).
    combine: turns a block's T outputs into features (vqt): "concat", "mean" or
      "weighted_sum".
    target_size: approximate number of features per block (head2toe); see
      `readers.window`.
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

  @functools.cached_property
  def _method(self) -> methods.Method:
    return methods.parse(self.method)

  @property
  def reader(self) -> readers.Reader:
    return readers.READERS[self._method.reader]

  @functools.cached_property
  def members(self) -> tuple["Tuner", ...]:
    """Tuners whose answers are mixed; none if it answers alone."""
    names = self.reader.members
    return tuple(dataclasses.replace(self, method=name) for name in names)

  @property
  def learner(self) -> "Tuner":
    """The member that gradients train; itself, if it answers alone."""
    learners = (each for each in self.members if not each.reader.is_fixed)
    return next(learners, self)

  @property
  def editor(self) -> str | None:
    """Name of the editor; None if the stream is frozen."""
    return self._method.editor

  @property
  def edit(self) -> attention.Edit | None:
    """The editor's change of the architecture; None if it makes none."""
    make = self.editor and editors.EDITORS[self.editor].edit
    return make(self.config, self.options) if make else None

  @property
  def reads_blocks(self) -> bool:
    """True if the tokens of every block are read; else the final feature."""
    return self.reader.read is not None or bool(self.members)

  @property
  def has_queries(self) -> bool:
    return self.reader.has_queries

  @property
  def window(self) -> int:
    """Number of successive tokens whose mean is read; 1: tokens as they are."""
    return self.reader.window(self) if self.reader.window else 1

  @property
  def num_features(self) -> int:
    """Features F: D of the final feature, and those that the reader reads.

    Of all members, if there are any.
    """
    if self.members:
      return sum(member.num_features for member in self.members)
    read = self.reader.num_groups(self) * self.reader.group_features(self)
    return read if self.reader.is_network else self.config.width + read

  def init(self, key: jax.Array, params: Any = None) -> dict[str, Any]:
    """Initialise the trainable parameters {"tuner", "head"}, float32.

    Args:
      key: for random initialisation.
      params: the backbone's; needed by editors that train copies of its leaves.

    Returns:
      The tree; of a mixture "tuner" holds one of each member, by its method,
      and "head" the "weights" (K,) of the K members, which sum to 1.
    """
    if self.members:
      count = len(self.members)
      return {
        "tuner": {each.method: each.init(key) for each in self.members},
        "head": {"weights": jnp.full(count, 1 / count, jnp.float32)},
      }
    query_key, head_key = jax.random.split(key)
    tuner = self.reader.init(self, query_key) if self.reader.init else {}
    if self.editor:
      editor_key = jax.random.fold_in(key, 2)  # Leaves the other two as before.
      tuner["editor"] = editors.init(
        self.editor, self.config, self.options, editor_key, params
      )
    sizes = self.num_features, self.num_classes
    init = head.init_layer if self.reader.is_network else head.init
    return {"tuner": tuner, "head": init(*sizes, head_key)}

  def shapes(self) -> dict[str, Any]:
    """Shapes and dtypes of the trainable parameters {"tuner", "head"}."""
    return jax.tree.map(lambda leaf: leaf, self._shapes)

  @functools.cached_property
  def _shapes(self) -> dict[str, Any]:
    params = vit.param_shapes(self.config) if self.editor else None
    return jax.eval_shape(self.init, jax.random.key(0), params)

  def stream(
    self,
    variables: Any,
    images: jax.Array,
    embedding_mask: jax.Array | None = None,
    remat: bool = False,
  ) -> vit.Stream:
    """Run the backbone, with the editor if there is one.

    The stream holds tokens if the reader needs them; if it reads windows, their
    means in place of the tokens. Only an edited stream is differentiable.

    Args:
      variables: {"backbone", "tuner"}.
      images: (B, height, width, 3).
      embedding_mask: see `vit.ViT`.
      remat: see `vit.ViT`.
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
      {"params": editors.apply_copies(variables["backbone"], own)},
      images,
      collect=("tokens",) if self.reads_blocks else (),
      embedding_mask=embedding_mask,
      edit=self.edit,
      weights=own,
      remat=remat,
    )
    if not self.reader.window:
      return stream
    return _pool_tokens(self.config, stream, self.window)

  def read(
    self, make_step: Any, variables: Any, weights: Any, *args: Any, **options
  ) -> tuple[Any, jax.Array]:
    """Scan the step that `make_step` makes over depth, see `readers.scan`.

    Args:
      make_step: `readers.query_step`, or a function like it.
      variables: {"backbone", "tuner"}.
      weights: the reader's, stacked over depth; for `query_step` its queries
        (L, T, D), or (L, B, T, D).
      *args: tokens and rows, as for `readers.scan`.
      **options: of `readers.scan`.
    """
    params, edit = variables["backbone"], self.edit
    own = variables["tuner"].get("editor", {})
    blocks = editors.apply_copies(params, own)["Transformer"]["encoderblock"]
    if edit:
      weights = (weights, own.get("encoderblock", {}))
    step = make_step(self.config, edit)
    row = self.config.num_tokens, self.config.width
    return readers.scan(step, blocks, weights, *args, row=row, **options)

  def __call__(
    self,
    variables: Any,
    tokens: jax.Array | None,
    final: jax.Array,
    query_mask: jax.Array | None = None,
    normalize: jax.Array | None = None,
    rows: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> "Output":
    """Read the stream and classify the features.

    Args:
      variables: {"backbone", "tuner", "head"}; of the backbone only the blocks.
      tokens: LN_0(z_m) of every block (L, B, N, D), or their means in windows,
        as in `stream`; None for the linear reader.
      final: the backbone's pooled output (B, D); or without tokens the features
        (B, F) of `read_fixed`.
      query_mask: (L, B, T, D), multiplies the queries (dropout), or None.
      normalize: () bool that replaces `self.normalize` (vqt), or None.
      rows: (B,) int32, the examples to read if `tokens` is a store of more:
        (L, n, N, D), sharded (L, n, S, 128), or for queries keys and
        values (L, n, 2, H, N, K).
      key: of a reader's own dropout; None: nothing drops out.
    """
    if self.members:
      given = (tokens, final, query_mask, normalize, rows, key)
      return self._mix(variables, given)
    if tokens is None or not self.reads_blocks:
      return Output(head.logits(variables["head"], final), final, None)
    if query_mask is not None:
      queries = variables["tuner"]["queries"][:, None] * query_mask
      masked = {**variables["tuner"], "queries": queries}
      variables = {**variables, "tuner": masked}
    groups, outputs = self.reader.read(self, variables, tokens, rows, key=key)
    return self.classify(variables, groups, final, outputs, normalize)

  def read_fixed(self, tokens: jax.Array, final: jax.Array) -> jax.Array:
    """Return the features (B, F) that a reader without weights gives."""
    groups, _ = self.reader.read(self, {}, tokens, None, key=None)
    return self._join(groups, final, self.normalize)

  def _mix(self, variables: Any, given: tuple[Any, ...]) -> "Output":
    """Return the logarithm of the weighted mean of the probabilities."""
    found = [
      each({**variables, **variables["tuner"][each.method]}, *given)
      for each in self.members
    ]
    scores = jnp.stack([jax.nn.log_softmax(out.logits) for out in found])
    weights = variables["head"]["weights"][:, None, None]
    logits = jax.nn.logsumexp(scores, axis=0, b=weights)
    features = jnp.concatenate([out.features for out in found], axis=-1)
    return Output(logits, features, None)

  def classify(
    self,
    variables: Any,
    groups: jax.Array,
    final: jax.Array,
    outputs: jax.Array | None = None,
    normalize: jax.Array | None = None,
  ) -> "Output":
    """Classify what has been read.

    Args:
      variables: {"head"}, and others.
      groups: features that have been read (G, B, K), see `readers.Reader`.
      final: the backbone's pooled output (B, D).
      outputs: of queries, to be passed on.
      normalize: as in `__call__`.
    """
    if self.reader.is_network:
      features = jnp.concatenate(groups, axis=-1)
      return Output(head.logits(variables["head"], features), features, None)
    if normalize is None or not self.reader.init:
      # A constant, so that trials side by side share what none of them changes.
      normalize = self.normalize
    features = self._join(groups, final, normalize)
    return Output(head.logits(variables["head"], features), features, outputs)

  def _join(self, groups: jax.Array, final: jax.Array, normalize: Any):
    """Join the final feature (B, D) and groups (G, B, K), (B, F)."""
    final = jnp.where(normalize, head.normalize(final), final)
    groups = jnp.where(normalize, head.normalize(groups), groups)
    groups = jnp.moveaxis(groups, 0, 1).reshape(final.shape[0], -1)
    return jnp.concatenate([final, groups], axis=-1)


@flax.struct.dataclass
class Output:
  """Result of a tuner.

  Attributes:
    logits: (B, C), float32.
    features: (B, F), float32, the input of the head.
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
  """Make the tuner of a method.

  Args:
    method: its name, see `methods.parse`.
    backbone: the backbone, or its architecture.
    num_classes: classes of the task.
    **options: further fields of `Tuner` and of `editors.Options`.

  Raises:
    UserError: an unknown method or option, or an invalid value.
  """
  config = getattr(backbone, "config", backbone)
  if not isinstance(config, vit_config.ViTConfig):
    raise errors.UserError(
      f"backbone: expected a Backbone or its ViTConfig, found {backbone!r}."
    )
  editor_defaults = _defaults(editors.Options)
  known = {"method": "", "num_classes": 0} | _defaults(Tuner) | editor_defaults
  for name in options:
    if name not in known:
      raise errors.unknown_name("option of make_tuner", name, known)
  _check({"method": method, "num_classes": num_classes, **options}, known)
  sizes = dataclasses.replace(
    options.pop("options", editors.Options()),
    **{name: options.pop(name) for name in editor_defaults if name in options},
  )
  _check(vars(sizes), editor_defaults)
  methods.parse(method)
  tuner = Tuner(method, config, num_classes, options=sizes, **options)
  if tuner.combine not in readers.COMBINE:
    raise errors.unknown_name("combine", tuner.combine, readers.COMBINE)
  if tuner.editor == "partial" and tuner.options.last_blocks > config.depth:
    raise errors.UserError(
      f"{method}: expected last_blocks of at most {config.depth}, the depth"
      f" of the backbone, found {tuner.options.last_blocks}."
    )
  return tuner


# Type of a default -> types that are accepted, and these in words.
_KINDS = {
  bool: ((bool, np.bool_), "True or False"),
  int: (numbers.Integral, "a whole number of at least"),
  float: (numbers.Real, "a number of at least"),
  str: (str, "text"),
  editors.Options: (editors.Options, "a vqt_jax.models.editors.Options"),
}


def _defaults(kind: type) -> dict[str, Any]:
  """Return field -> default of a dataclass, for fields that have one."""
  return {
    field.name: field.default
    for field in dataclasses.fields(kind)
    if field.default is not dataclasses.MISSING
  }


def _check(values: dict[str, Any], defaults: dict[str, Any]) -> None:
  """Raise a `UserError` for values of another type, or that are too small.

  Only whole numbers with the default 0 may be 0.
  """
  for name, value in values.items():
    kind, words = _KINDS[type(defaults[name])]
    right = isinstance(value, kind)
    if kind in (numbers.Integral, numbers.Real):
      least = 0 if kind is numbers.Real else min(defaults[name], 1)
      if name == "num_classes":
        least = 2
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
  """Classify images.

  Args:
    backbone: the frozen ViT.
    tuner: made for `backbone.config`.
    variables: {"tuner", "head"} from `tuner.init` or training.
    images: (B, height, width, 3), float, scaled to `backbone.value_range`.

  Raises:
    UserError: the images do not fit the backbone, see `Backbone.checked`.
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
  """Run the frozen backbone.

  Returns:
    The stream, without a gradient.
  """
  stream = vit.ViT(config).apply(
    {"params": params},
    images,
    collect=("tokens",) if tokens else (),
    embedding_mask=embedding_mask,
  )
  if window > 1:
    stream = _pool_tokens(config, stream, window)
  return jax.lax.stop_gradient(stream)


def _pool_tokens(
  config: vit_config.ViTConfig, stream: vit.Stream, window: int
) -> vit.Stream:
  tokens = readers.pool(config, stream.tokens, window)
  return dataclasses.replace(stream, tokens=tokens)


def labels(variables: Any, trains: tuple[str, ...] = TRAINED) -> Any:
  """Label every leaf of {"backbone", "tuner", "head"} "train" or "frozen"."""
  label = lambda part: "train" if part in trains else "frozen"
  return {
    name: jax.tree.map(lambda _, part=name: label(part), tree)
    for name, tree in variables.items()
  }


def split(variables: Any, leaf_labels: Any) -> tuple[Any, Any]:
  """Split a tree into (trainable, frozen), each with `MaskedNode` holes."""
  keep = lambda wanted: jax.tree.map(
    lambda label, leaf: leaf if label == wanted else optax.MaskedNode(),
    leaf_labels,
    variables,
  )
  return keep("train"), keep("frozen")


def partition(
  params: Any, variables: Any, trains: tuple[str, ...] = TRAINED
) -> tuple[Any, Any]:
  """Label and split backbone `params` and {"tuner", "head"}, see `split`."""
  variables = {**variables, "backbone": params}
  return split(variables, labels(variables, trains))


def merge(trained: Any, frozen: Any) -> Any:
  """Merge the two parts of a tree that `split` made."""
  hole = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(
    lambda t, f: f if hole(t) else t, trained, frozen, is_leaf=hole
  )
