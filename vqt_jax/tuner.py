"""Tuners: a reader and a head, by the method's name.

Parameters are one tree {"backbone", "tuner", "head"}. `labels` names every leaf
"train" or "frozen"; `split` cuts the tree along them with optax's own
`MaskedNode` in the holes, so that gradients, optimiser state and saved files
know only what is trained.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqt_jax import backbone as backbone_lib
from vqt_jax import errors
from vqt_jax import head
from vqt_jax import readers
from vqt_jax import vit

METHODS = ("vqt", "linear")
# Parts of the parameters that reader and head bring; the backbone is frozen.
TRAINED = ("tuner", "head")


@dataclasses.dataclass(frozen=True)
class Tuner:
  """A method, ready for one backbone and one task.

  Attributes:
    method: "vqt" (visual query tuning) or "linear" (probe of the final
      feature).
    config: architecture of the backbone.
    num_classes: classes C of the task.
    num_queries: queries T per block (vqt).
    normalize: divide each feature group by its L2 norm (vqt).
    combine: how a block's T outputs become features (vqt):
      "concat", "mean" or "weighted_sum".
  """

  method: str
  config: vit.ViTConfig
  num_classes: int
  num_queries: int = 1
  normalize: bool = True
  combine: Literal["concat", "mean", "weighted_sum"] = "concat"

  @property
  def reads_blocks(self) -> bool:
    """Whether it needs the tokens of every block, or the final feature only."""
    return self.method == "vqt"

  @property
  def num_features(self) -> int:
    """F: D for the final feature, and T*D (or D, if combined) per block."""
    if not self.reads_blocks:
      return self.config.width
    per_block = self.num_queries if self.combine == "concat" else 1
    return self.config.width * (1 + self.config.depth * per_block)

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Fresh trained parameters {"tuner", "head"}, float32."""
    query_key, head_key = jax.random.split(key)
    tuner = {}
    if self.reads_blocks:
      tuner["queries"] = readers.init_queries(
          self.config, self.num_queries, query_key
      )
      if self.combine == "weighted_sum":
        tuner["combine"] = jnp.ones((self.config.depth, self.num_queries))
    return {
        "tuner": tuner,
        "head": head.init(self.num_features, self.num_classes, head_key),
    }

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
      tokens: LN_0(z_m) of every block (L, B, N, D); None for "linear".
      final: the backbone's pooled output (B, D).
      query_mask: (L, B, T, D), multiplies the queries (dropout), or None.
      normalize: () bool in the place of `self.normalize`, or None.
      rows: (B,) int32, if `tokens` are a store (L, n, N, D) of more examples.

    Returns:
      Logits, features and what the queries read.
    """
    if not self.reads_blocks:
      return Output(head.logits(variables["head"], final), final, None)
    queries = variables["tuner"]["queries"]
    if query_mask is not None:
      queries = queries[:, None] * query_mask
    blocks = variables["backbone"]["Transformer"]["encoderblock"]
    outputs = readers.read(
        readers.query_step(self.config), blocks, queries, tokens, rows
    )
    groups = readers.combine(
        outputs, self.combine, variables["tuner"].get("combine")
    )
    if normalize is None:
      normalize = self.normalize
    final = jnp.where(normalize, head.normalize(final), final)
    groups = jnp.where(normalize, head.normalize(groups), groups)
    groups = jnp.moveaxis(groups, 0, 1).reshape(len(final), -1)
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


def make_tuner(
    method: str, config: vit.ViTConfig, num_classes: int, **options
) -> Tuner:
  """A tuner by name.

  Args:
    method: one of `METHODS`.
    config: architecture of the backbone.
    num_classes: classes of the task.
    **options: further fields of `Tuner`.

  Raises:
    UserError: unknown method, or sizes that make no sense.
  """
  if method not in METHODS:
    raise errors.UserError(
        f"Unknown method {method!r}. Known: {', '.join(METHODS)}."
    )
  tuner = Tuner(method, config, num_classes, **options)
  if tuner.num_queries < 1 or num_classes < 2:
    raise errors.UserError(
        f"{method}: expected at least 1 query and 2 classes, found"
        f" num_queries={tuner.num_queries}, num_classes={num_classes}."
    )
  return tuner


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
  """
  return _apply(tuner, backbone.params, variables, images)


@jax.jit(static_argnums=0)
def _apply(tuner, params, variables, images):
  stream = run_backbone(tuner.config, tuner.reads_blocks, params, images)
  return tuner({**variables, "backbone": params}, stream.tokens, stream.final)


def run_backbone(
    config: vit.ViTConfig,
    tokens: bool,
    params: Any,
    images: jax.Array,
    embedding_mask: jax.Array | None = None,
) -> vit.Stream:
  """The frozen stream of some images, with or without the blocks' tokens."""
  stream = vit.ViT(config).apply(
      {"params": params},
      images,
      collect=("tokens",) if tokens else (),
      embedding_mask=embedding_mask,
  )
  return jax.lax.stop_gradient(stream)


def labels(variables: Any, trains: tuple[str, ...] = TRAINED) -> Any:
  """"train" or "frozen" for every leaf of {"backbone", "tuner", "head"}."""
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
