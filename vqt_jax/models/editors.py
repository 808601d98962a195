"""Editors, which change the stream.

An editor has weights of its own and an `attention.Edit` that applies them, or
it trains copies of backbone leaves. All that it trains is one tree:

  {"encoderblock": {operation: leaves stacked over depth},
   operation outside of the blocks: leaves,
   "backbone": copies of the backbone leaves that train, by their names}

Of a stacked leaf whose last rows alone train, only these rows are copied. The
frozen backbone itself never changes: the copies replace its leaves before
anything runs. So trials that train side by side share all leaves that none of
them trains, and a file of trained weights holds nothing else.

Letters: D width, L depth, H heads, K head size, P prompts, R rank, M hidden.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from etils import epy

from vqt_jax import errors
from vqt_jax.models import readers
from vqt_jax.models import vit_config

with epy.lazy_imports():  # Slow; a config reads the table of editors only.
  import flax.traverse_util
  import jax
  import jax.numpy as jnp
  import numpy as np

  from vqt_jax.models import attention
  from vqt_jax.models import vit

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes of the editors; each editor uses its own.

  Attributes:
    num_prompts: P (vpt_shallow; vpt_deep: in each block).
    bottleneck: M (adapter, adaptformer); 0: D / 8 and 64, as published.
    rank: R (lora).
    alpha: the learnt change is scaled by alpha / R (lora).
    last_blocks: number of blocks that train (partial).
  """

  num_prompts: int = 10
  bottleneck: int = 0
  rank: int = 8
  alpha: float = 8.0
  last_blocks: int = 1


@dataclasses.dataclass(frozen=True)
class Editor:
  """Implementation of an editor.

  Attributes:
    edit: (config, options) -> the edit; None: the architecture stays.
    init: (config, options, key) -> weights of the edit, float32.
    trains: (path, options) -> rows of this backbone leaf that train, or None.
    fold: (weights, flat params, options) -> flat params of a plain ViT that
      computes the same without the edit; None: no plain ViT does.
    has_prompts: it adds `num_prompts` tokens to the stream.
    scales_outputs: its gradient needs the output of every operation.
  """

  edit: Callable[[vit_config.ViTConfig, Options], attention.Edit] | None = None
  init: Callable[[vit_config.ViTConfig, Options, jax.Array], Weights] = (
    lambda config, options, key: {}
  )
  trains: Callable[[str, Options], slice | None] = lambda path, options: None
  fold: Callable[[Weights, Any, Options], Any] | None = None
  has_prompts: bool = False
  scales_outputs: bool = False


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float):
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _zeros(shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.float32)


def _insert(
  config: vit_config.ViTConfig, z: jax.Array, prompts: jax.Array, size: int
):
  """Put prompts (P, D) after the class token, over the next `size` tokens."""
  first = int(config.has_class_token)
  shape = (z.shape[0], *prompts.shape)
  prompts = jnp.broadcast_to(prompts, shape).astype(z.dtype)
  return jnp.concatenate([z[:, :first], prompts, z[:, first + size :]], axis=1)


def _remove_prompts(config: vit_config.ViTConfig, z: jax.Array, count: int):
  """Remove the prompts, so that pooling is that of pre-training."""
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
      return _remove_prompts(config, y, options.num_prompts)
    return y

  return edit


def _vpt_deep_init(config, options, key):
  shape = (config.depth, options.num_prompts, config.width)
  prompts = _uniform(key, shape, readers.token_bound(config))
  return {"encoderblock": {"input": prompts}}


def _vpt_deep(config, options):
  """Visual prompt tuning, https://arxiv.org/abs/2203.12119, section 3.2.

  Like `_vpt_shallow`, but before each block the prompts of the block before are
  replaced by the block's own.
  """

  def edit(name, weights, x, y):
    del x
    if name == "embedded":  # Makes room; the first block replaces them.
      return _insert(config, y, weights["encoderblock"]["input"][0], 0)
    if name == "input":
      return _insert(config, y, weights["input"], options.num_prompts)
    if name == "output":
      return _remove_prompts(config, y, options.num_prompts)
    return y

  return edit


def _bottleneck_init(config, size, key):
  """Initialise bottlenecks: down as a linear layer of torch, up zero."""
  depth, width = config.depth, config.width
  down = _uniform(key, (depth, width, size), width**-0.5)
  down = {"kernel": down, "bias": _zeros((depth, size))}
  up = {"kernel": _zeros((depth, size, width)), "bias": _zeros((depth, width))}
  return {"encoderblock": {"MlpBlock_0": {"down": down, "up": up}}}


def _dense(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
  kernel, bias = params["kernel"], params["bias"]
  return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _adapter(config, options):
  """Adapters, https://arxiv.org/abs/1902.00751, where VPT's program has them.

  One bottleneck of D / 8 with GELU and a skip connection, after the MLP and
  before its residual. The VPT and VQT programs initialise all of it with zeros,
  and then nothing but the last bias ever trains; here the down projection
  starts random, and the rest at zero (section 2.1: near the identity).
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

  A bottleneck of 64 with ReLU parallel to the MLP, on the same tokens before
  their normalisation, scaled by 0.1. Initialisation (section 3.2, as LoRA):
  down Kaiming-uniform, up zero.
  """
  del config, options

  def edit(name, weights, x, y):
    if name != "MlpBlock_0":
      return y
    hidden = jax.nn.relu(_dense(x.astype(y.dtype), weights[name]["down"]))
    return y + ADAPTFORMER_SCALE * _dense(hidden, weights[name]["up"])

  return edit


LORA_PROJECTIONS = ("query", "value")


def _lora_init(config, options, key):
  def factors(key):
    shape = (config.depth, config.width, options.rank)
    up = (config.depth, options.rank, config.num_heads, config.head_dim)
    down = _uniform(key, shape, config.width**-0.5)
    return {"down": down, "up": _zeros(up)}

  keys = jax.random.split(key, len(LORA_PROJECTIONS))
  return {"encoderblock": dict(zip(LORA_PROJECTIONS, map(factors, keys)))}


def _lora(config, options):
  """LoRA, https://arxiv.org/abs/2106.09685, section 4.

  Query and value projections get a low-rank part, computed as two products. The
  first factor starts Kaiming-uniform (as in the authors' program; the paper
  says random Gaussian), the second at zero.
  """
  del config
  scale = options.alpha / options.rank

  def edit(name, weights, x, y):
    if name not in LORA_PROJECTIONS:
      return y
    low = x.astype(y.dtype) @ weights[name]["down"].astype(y.dtype)
    up = weights[name]["up"].astype(y.dtype)
    return y + scale * jnp.einsum("...r,rhk->...hk", low, up)

  return edit


def _fold_lora(weights, params, options):
  for name in LORA_PROJECTIONS:
    w = weights["encoderblock"][name]
    change = jnp.einsum("ldr,lrhk->ldhk", w["down"], w["up"])
    path = _LEAF_PATHS[name]
    kernel = params[f"{path}/kernel"]
    params[f"{path}/kernel"] = kernel + options.alpha / options.rank * change
  return params


# Operation -> path of its leaves in the backbone's parameters.
_BLOCK = "Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_LEAF_PATHS = {
  **{name: f"{_ATTENTION}/{name}" for name in ("query", "key", "value")},
  "out": f"{_ATTENTION}/out",
  **{name: f"{_BLOCK}/{name}" for name in ("LayerNorm_0", "LayerNorm_1")},
  **{n: f"{_BLOCK}/MlpBlock_0/{n}" for n in ("Dense_0", "gate", "Dense_1")},
  "embedding": "embedding",
  "encoder_norm": "Transformer/encoder_norm",
}
_ENDS = ("embedding", "encoder_norm")  # Those outside of the blocks.


def _ssf_init(config, options, key):
  del options, key
  c, heads = config, (config.num_heads, config.head_dim)
  identity = lambda shape: {"scale": 1 + _zeros(shape), "shift": _zeros(shape)}
  sizes = dict.fromkeys(_LEAF_PATHS, (c.width,))
  sizes |= dict.fromkeys(("Dense_0", "gate"), (c.mlp_dim,))
  if not c.gated_mlp:
    del sizes["gate"]
  sizes |= dict.fromkeys(("query", "key", "value"), heads)
  ends = {name: identity(sizes.pop(name)) for name in _ENDS}
  blocks = {name: identity((c.depth, *size)) for name, size in sizes.items()}
  return {"encoderblock": blocks, **ends}


def _ssf(config, options):
  """SSF, https://arxiv.org/abs/2210.08823, section 3.2.

  Every operation (LayerNorms, projections, MLP layers, patch embedding) is
  followed by a scale and a shift per channel. They start at exactly 1 and 0;
  the authors' program draws them around these with deviation 0.02.
  """
  del config, options

  def edit(name, weights, x, y):
    del x
    if name not in weights:
      return y
    scale, shift = weights[name]["scale"], weights[name]["shift"]
    return y * scale.astype(y.dtype) + shift.astype(y.dtype)

  return edit


def _fold_ssf(weights, params, options):
  del options
  ends = {name: weights[name] for name in _ENDS}
  for name, own in (ends | weights["encoderblock"]).items():
    path, scale, shift = _LEAF_PATHS[name], own["scale"], own["shift"]
    norm = "norm" in path.lower()
    factor = f"{path}/{'scale' if norm else 'kernel'}"
    kernel = params[factor]
    # The axes of a kernel: depth, if it is in a block, inputs, outputs.
    first = int(name not in _ENDS)
    inputs = range(first, first + kernel.ndim - scale.ndim)
    params[factor] = kernel * np.expand_dims(scale, tuple(inputs))
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
  "vpt_shallow": Editor(_vpt_shallow, _vpt_shallow_init, has_prompts=True),
  "vpt_deep": Editor(_vpt_deep, _vpt_deep_init, has_prompts=True),
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
  "ssf": Editor(_ssf, _ssf_init, fold=_fold_ssf, scales_outputs=True),
}

# Leaves of the pre-trained head, which is not used here.
_UNUSED = ("head/", "pre_logits/")


def init(
  name: str,
  config: vit_config.ViTConfig,
  options: Options,
  key: jax.Array,
  params: Any,
) -> Weights:
  """Initialise the weights of an editor, float32; copies are of `params`.

  Raises:
    ValueError: the editor copies backbone leaves, and `params` is None.
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


def apply_copies(params: Any, weights: Weights) -> Any:
  """Return backbone params with an editor's copies in place of their leaves."""
  if "backbone" not in weights:
    return params
  flat = _flat(params)
  for path, copy in _flat(weights["backbone"]).items():
    frozen, copy = flat[path], copy.astype(flat[path].dtype)
    if copy.shape != frozen.shape:  # The last rows.
      copy = jnp.concatenate([frozen[: -len(copy)], copy])
    flat[path] = copy
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def can_fold(name: str) -> bool:
  """Return whether some plain ViT computes what this editor does."""
  editor = EDITORS[name]
  return editor.edit is None or editor.fold is not None


def fold(name: str, options: Options, params: Any, weights: Weights) -> Any:
  """Fold an editor into the backbone: params that need no edit.

  Raises:
    UserError: no weights of a plain ViT compute the same.
  """
  if not can_fold(name):
    able = ", ".join(filter(can_fold, EDITORS))
    raise errors.UserError(
      f"{name} cannot be folded into the weights of a plain ViT; {able} can."
    )
  params = apply_copies(params, weights)
  if EDITORS[name].fold is None:
    return params
  flat = EDITORS[name].fold(weights, _flat(params), options)
  return flax.traverse_util.unflatten_dict(flat, sep="/")
