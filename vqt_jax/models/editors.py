"""Editors: what changes the stream.

An editor brings weights of its own and a `vit.Edit` that hooks them in, or it
trains copies of backbone leaves, or both. All that it trains is one tree:

  {"encoderblock": {operation: leaves stacked over depth},
   operation at the ends: leaves,
   "backbone": copies of the backbone leaves that train, by their names}

A stacked leaf of which only the last rows train has copies of these rows alone.
The frozen backbone itself never changes: copies take its leaves' places before
anything runs, so that runs side by side share what none of them trains, and a
file of what was trained holds nothing else.

Letters: D width, L depth, H heads, K head size, P prompts, R rank, M hidden.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from vqt_jax import errors
from vqt_jax.models import attention
from vqt_jax.models import readers
from vqt_jax.models import vit
from vqt_jax.models import vit_config

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes of the editors; each reads its own.

  Attributes:
    num_prompts: P (vpt_shallow, vpt_deep: of each block).
    bottleneck: M (adapter, adaptformer); 0: D / 8 and 64, as published.
    rank: R (lora).
    alpha: what is learnt is scaled by alpha / R (lora).
    last_blocks: how many train (partial).
  """

  num_prompts: int = 10
  bottleneck: int = 0
  rank: int = 8
  alpha: float = 8.0
  last_blocks: int = 1


@dataclasses.dataclass(frozen=True)
class Editor:
  """A line of the table.

  Attributes:
    edit: (config, options) -> the `vit.Edit`; None: the architecture stays.
    init: (config, options, key) -> its weights, float32.
    trains: (path, options) -> rows of this backbone leaf that train, or None.
    fold: (weights, params, options) -> backbone params that do the same without
      an edit; None: there are none.
  """

  edit: Callable[[vit_config.ViTConfig, Options], attention.Edit] | None = None
  init: Callable[[vit_config.ViTConfig, Options, jax.Array], Weights] = (
    lambda config, options, key: {}
  )
  trains: Callable[[str, Options], slice | None] = lambda path, options: None
  fold: Callable[[Weights, Any, Options], Any] | None = None


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float):
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _zeros(shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.float32)


def _insert(
  config: vit_config.ViTConfig, z: jax.Array, prompts: jax.Array, size: int
):
  """Puts prompts (P, D) after the class token, over the next `size` tokens."""
  first = int(config.has_class_token)
  shape = (z.shape[0], *prompts.shape)
  prompts = jnp.broadcast_to(prompts, shape).astype(z.dtype)
  return jnp.concatenate([z[:, :first], prompts, z[:, first + size :]], axis=1)


def _without_prompts(config: vit_config.ViTConfig, z: jax.Array, count: int):
  """They have had their say: pooling is that of pre-training."""
  first = int(config.has_class_token)
  return jnp.concatenate([z[:, :first], z[:, first + count :]], axis=1)


def _vpt_shallow_init(config, options, key):
  shape = (options.num_prompts, config.width)
  return {"embedded": _uniform(key, shape, readers.token_bound(config))}


def _vpt_shallow(config, options):
  """Visual prompt tuning, https://arxiv.org/abs/2203.12119, section 3.2.

  P prompts go in after the class token, without positions, and through all
  blocks. Initialisation, as in the authors' program: `readers.token_bound`.
  """

  def edit(name, weights, x, y):
    del x
    if name == "embedded":
      return _insert(config, y, weights["embedded"], 0)
    if name == "output":
      return _without_prompts(config, y, options.num_prompts)
    return y

  return edit


def _vpt_deep_init(config, options, key):
  shape = (config.depth, options.num_prompts, config.width)
  prompts = _uniform(key, shape, readers.token_bound(config))
  return {"encoderblock": {"input": prompts}}


def _vpt_deep(config, options):
  """Visual prompt tuning, https://arxiv.org/abs/2203.12119, section 3.2.

  As `_vpt_shallow`, but what became of the prompts is replaced by each block's
  own before it.
  """

  def edit(name, weights, x, y):
    del x
    if name == "embedded":  # Room for them.
      return _insert(config, y, weights["encoderblock"]["input"][0], 0)
    if name == "input":
      return _insert(config, y, weights["input"], options.num_prompts)
    if name == "output":
      return _without_prompts(config, y, options.num_prompts)
    return y

  return edit


def _bottleneck_init(config, size, key):
  """Down Kaiming-uniform (a = sqrt 5, as of linear layers), up zero."""
  depth, width = config.depth, config.width
  down = _uniform(key, (depth, width, size), width**-0.5)
  down = {"kernel": down, "bias": _zeros((depth, size))}
  up = {"kernel": _zeros((depth, size, width)), "bias": _zeros((depth, width))}
  return {"encoderblock": {"MlpBlock_0": {"down": down, "up": up}}}


def _dense(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
  kernel, bias = params["kernel"], params["bias"]
  return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _adapter(config, options):
  """Adapters, https://arxiv.org/abs/1902.00751, as VPT's program places them.

  One bottleneck of D / 8 with GELU and a skip connection, after the MLP and
  before its residual. The VPT and VQT programs start all of it at zero, and
  then nothing but the last bias ever trains; here the down projection starts
  random, and the rest at zero (section 2.1: near the identity).
  """
  del config, options

  def edit(name, weights, x, y):
    del x
    if name != "MlpBlock_0":
      return y
    hidden = jax.nn.gelu(_dense(y, weights[name]["down"]), approximate=False)
    return y + _dense(hidden, weights[name]["up"])

  return edit


ADAPTFORMER_SCALE = 0.1


def _adaptformer(config, options):
  """AdaptFormer, https://arxiv.org/abs/2205.13535, section 3.2.

  A bottleneck of 64 with ReLU beside the MLP, on the same tokens but not
  normalised, scaled by 0.1. Initialisation (section 3.2, as LoRA): down
  Kaiming-uniform, up zero.
  """
  del config, options

  def edit(name, weights, x, y):
    if name != "MlpBlock_0":
      return y
    hidden = jax.nn.relu(_dense(x.astype(y.dtype), weights[name]["down"]))
    return y + ADAPTFORMER_SCALE * _dense(hidden, weights[name]["up"])

  return edit


LORA = ("query", "value")


def _lora_init(config, options, key):
  def one(key):
    shape = (config.depth, config.width, options.rank)
    up = (config.depth, options.rank, config.num_heads, config.head_dim)
    down = _uniform(key, shape, config.width**-0.5)
    return {"down": down, "up": _zeros(up)}

  keys = jax.random.split(key, len(LORA))
  return {"encoderblock": dict(zip(LORA, map(one, keys)))}


def _lora(config, options):
  """LoRA, https://arxiv.org/abs/2106.09685, section 4.

  Query and value projections get a low-rank part, computed as such. The first
  factor starts Kaiming-uniform (as in the authors' program; the paper says
  random Gaussian), the second at zero.
  """
  del config
  scale = options.alpha / options.rank

  def edit(name, weights, x, y):
    if name not in LORA:
      return y
    low = x.astype(y.dtype) @ weights[name]["down"].astype(y.dtype)
    up = weights[name]["up"].astype(y.dtype)
    return y + scale * jnp.einsum("...r,rhk->...hk", low, up)

  return edit


def _fold_lora(weights, params, options):
  for name in LORA:
    w = weights["encoderblock"][name]
    change = jnp.einsum("ldr,lrhk->ldhk", w["down"], w["up"])
    path = _PLACES[name]
    kernel = params[f"{path}/kernel"]
    params[f"{path}/kernel"] = kernel + options.alpha / options.rank * change
  return params


_BLOCK = "Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_PLACES = {
  **{name: f"{_ATTENTION}/{name}" for name in ("query", "key", "value")},
  "out": f"{_ATTENTION}/out",
  **{name: f"{_BLOCK}/{name}" for name in ("LayerNorm_0", "LayerNorm_1")},
  **{n: f"{_BLOCK}/MlpBlock_0/{n}" for n in ("Dense_0", "Dense_1")},
  "embedding": "embedding",
  "encoder_norm": "Transformer/encoder_norm",
}


def _ssf_init(config, options, key):
  del options, key
  c, heads = config, (config.num_heads, config.head_dim)
  one = lambda shape: {"scale": 1 + _zeros(shape), "shift": _zeros(shape)}
  shapes = dict.fromkeys(attention.EDITED, (c.width,)) | {
    "Dense_0": (c.mlp_dim,)
  }
  shapes |= dict.fromkeys(("query", "key", "value"), heads)
  return {
    "encoderblock": {n: one((c.depth, *s)) for n, s in shapes.items()},
    "embedding": one((c.width,)),
    "encoder_norm": one((c.width,)),
  }


def _ssf(config, options):
  """SSF, https://arxiv.org/abs/2210.08823, section 3.2.

  Every operation (LayerNorms, projections, MLP layers, patch embedding) is
  followed by a scale and a shift per channel. They start at exactly 1 and 0;
  the authors' program draws them around these with deviation 0.02.
  """
  del config, options

  def edit(name, weights, x, y):
    del x
    if name not in _PLACES:
      return y
    scale, shift = weights[name]["scale"], weights[name]["shift"]
    return y * scale.astype(y.dtype) + shift.astype(y.dtype)

  return edit


def _fold_ssf(weights, params, options):
  del options
  flat = {**weights, **weights["encoderblock"]}
  for name, path in _PLACES.items():
    scale, shift = flat[name]["scale"], flat[name]["shift"]
    norm = "norm" in path.lower()
    factor = f"{path}/{'scale' if norm else 'kernel'}"
    kernel = params[factor]
    # Behind depth, a kernel's inputs come first.
    inputs = kernel.ndim - scale.ndim
    axes = range(path.startswith(_BLOCK), path.startswith(_BLOCK) + inputs)
    params[factor] = kernel * jnp.expand_dims(scale, tuple(axes))
    params[f"{path}/bias"] = params[f"{path}/bias"] * scale + shift
  return params


def _finetune_trains(path, options):
  """Full fine-tuning: every leaf."""
  del path, options
  return slice(None)


def _bitfit_trains(path, options):
  """BitFit, https://arxiv.org/abs/2106.10199, section 3: all biases."""
  del options
  return slice(None) if path.endswith("/bias") else None


def _partial_trains(path, options):
  """Partial-k of https://arxiv.org/abs/2203.12119, section 4.1.

  The last k blocks and, as in the authors' program, the final LayerNorm.
  """
  if path.startswith(_BLOCK):
    return slice(-options.last_blocks, None)
  return slice(None) if path.startswith("Transformer/encoder_norm") else None


EDITORS = {
  "finetune": Editor(trains=_finetune_trains),
  "bitfit": Editor(trains=_bitfit_trains),
  "partial": Editor(trains=_partial_trains),
  "vpt_shallow": Editor(_vpt_shallow, _vpt_shallow_init),
  "vpt_deep": Editor(_vpt_deep, _vpt_deep_init),
  "adapter": Editor(
    _adapter,
    lambda config, options, key: _bottleneck_init(
      config, options.bottleneck or config.width // 8, key
    ),
  ),
  "adaptformer": Editor(
    _adaptformer,
    lambda config, options, key: _bottleneck_init(
      config, options.bottleneck or 64, key
    ),
  ),
  "lora": Editor(_lora, _lora_init, fold=_fold_lora),
  "ssf": Editor(_ssf, _ssf_init, fold=_fold_ssf),
}

# Of the pre-trained head, which nothing here passes through.
_UNUSED = ("head/", "pre_logits/")


def init(
  name: str,
  config: vit_config.ViTConfig,
  options: Options,
  key: jax.Array,
  params: Any,
) -> Weights:
  """Fresh weights of an editor, float32.

  Args:
    name: of `EDITORS`.
    config: architecture of the backbone.
    options: its sizes.
    key: what is random comes from.
    params: the backbone's, which copies start from; None is enough for an
      editor that has none.

  Raises:
    ValueError: they are wanted.
  """
  editor = EDITORS[name]
  weights = editor.init(config, options, key)
  copies = {}
  for path, leaf in _flat(params or vit.param_shapes(config)).items():
    rows = editor.trains(path, options)
    if rows is None or path.startswith(_UNUSED):
      continue
    if params is None:
      raise ValueError(f"{name} starts from the backbone: give its params.")
    copies[path] = jnp.asarray(leaf[rows], jnp.float32)
  if copies:
    weights["backbone"] = flax.traverse_util.unflatten_dict(copies, sep="/")
  return weights


def _flat(params: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(params, sep="/")


def replaced(params: Any, weights: Weights) -> Any:
  """Backbone params with an editor's copies in the places they belong to."""
  if "backbone" not in weights:
    return params
  flat = _flat(params)
  for path, copy in _flat(weights["backbone"]).items():
    frozen, copy = flat[path], copy.astype(flat[path].dtype)
    if copy.shape != frozen.shape:  # The last rows.
      copy = jnp.concatenate([frozen[: -len(copy)], copy])
    flat[path] = copy
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def folds(name: str) -> bool:
  """Whether what it does can be had by other backbone weights alone."""
  editor = EDITORS[name]
  return editor.edit is None or editor.fold is not None


def folded(name: str, options: Options, params: Any, weights: Weights) -> Any:
  """Backbone params that do without an edit what they do with it.

  Raises:
    UserError: no weights of a plain ViT do the same.
  """
  if not folds(name):
    able = ", ".join(filter(folds, EDITORS))
    raise errors.UserError(
      f"What {name} does cannot be written as the weights of a plain ViT;"
      f" that of {able} can."
    )
  params = replaced(params, weights)
  if EDITORS[name].fold is None:
    return params
  flat = EDITORS[name].fold(weights, _flat(params), options)
  return flax.traverse_util.unflatten_dict(flat, sep="/")
