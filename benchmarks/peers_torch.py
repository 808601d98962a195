"""Training steps that users would run in PyTorch instead; see `peers.py`.

The backbone is Hugging Face's ViT (transformers) with its fused attention, and
random weights; LoRA is PEFT's.
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import numpy as np
import peft
import torch
from torch.nn import functional as F
import transformers

from benchmarks import cases
import vqt_jax
from vqt_jax.models import vit as vit_lib
from vqt_jax.models import vit_config


def steps(
  name: str, config: vit_config.ViTConfig, batch_size: int, compiled: bool
) -> tuple[Callable[[int], None], str]:
  """A function that does so many steps and waits for them; the device.

  Args:
    name: one of `peers.TORCH`.
    config: sizes; with "bfloat16" frozen weights are, and products autocast.
    batch_size: images in a step.
    compiled: whether `torch.compile` does the forward and backward pass.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
  torch.manual_seed(0)
  model = _model(name, config).to(device).train()
  half = config.dtype == "bfloat16"
  for weights in model.parameters():
    if half and not weights.requires_grad:
      weights.data = weights.data.bfloat16()
  optimizer = torch.optim.Adam(
    [x for x in model.parameters() if x.requires_grad],
    lr=1e-3,
    weight_decay=1e-4,  # Added to the gradient, as the authors do.
  )
  images = torch.rand(batch_size, 3, *config.image_size, device=device) * 2 - 1
  images = images.bfloat16() if half else images
  labels = torch.arange(batch_size, device=device) % cases.NUM_CLASSES

  def loss_of():
    with torch.autocast(device, torch.bfloat16, enabled=half):
      logits = model(images)
    return F.cross_entropy(logits.float(), labels)

  objective = torch.compile(loss_of) if compiled else loss_of

  def run(count: int) -> None:
    for _ in range(count):
      objective().backward()
      optimizer.step()
      optimizer.zero_grad()
    if device == "cuda":
      torch.cuda.synchronize()

  return run, device


def measure(
  name: str,
  config: vit_config.ViTConfig,
  batch_size: int,
  count: int,
  repeats: int,
  compiled: bool,
) -> dict[str, Any]:
  """Seconds of a step, of each repeat, and the accelerator's peak memory."""
  run, device = steps(name, config, batch_size, compiled)
  start = time.perf_counter()
  run(2)
  first = time.perf_counter() - start
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    run(count)
    seconds.append((time.perf_counter() - start) / count)
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
  versions = f"torch {torch.__version__}, peft {peft.__version__}"
  return {
    "seconds": seconds,
    "first": first,
    "peak": peak,
    "versions": f"{versions}, transformers {transformers.__version__}",
  }


def _backbone(config: vit_config.ViTConfig) -> torch.nn.Module:
  return transformers.ViTModel(
    transformers.ViTConfig(
      hidden_size=config.width,
      num_hidden_layers=config.depth,
      num_attention_heads=config.num_heads,
      intermediate_size=config.mlp_dim,
      image_size=config.image_size[0],
      patch_size=config.patch_size[0],
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      layer_norm_eps=1e-6,
      attn_implementation="sdpa",
    ),
    add_pooling_layer=False,
  )


def _model(name: str, config: vit_config.ViTConfig) -> torch.nn.Module:
  vit = _backbone(config)
  if name == "fine-tuning":
    return Final(vit, config)
  vit.requires_grad_(False)
  if name == "LoRA":
    options = peft.LoraConfig(
      r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    return Final(peft.get_peft_model(vit, options), config)
  if name == "linear probe":
    return Final(vit, config)
  return Vqt(vit, config, cut_off=name != "VQT")


def check(config: vit_config.ViTConfig, batch_size: int) -> None:
  """Prints how far logits are from those of `vqt_jax`, of the same weights."""
  tuner = vqt_jax.make_tuner("vqt", config, cases.NUM_CLASSES, num_queries=1)
  tuner = dataclasses.replace(tuner, normalize=True)
  params = vit_lib.init_params(config, jax.random.key(1))
  params = jax.tree.map(  # Biases and the class token are 0 in the beginning.
    lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape),
    params,
  )
  variables = tuner.init(jax.random.key(2))
  shape = (batch_size, *config.image_size, 3)
  images = jax.random.uniform(jax.random.key(3), shape, minval=-1)
  stream = tuner.stream({**variables, "backbone": params}, images)
  everything = {**variables, "backbone": params}
  ours = np.asarray(tuner(everything, stream.tokens, stream.final).logits)

  model = _model("VQT", config).eval()
  _load(model, params, variables, config)
  found = torch.tensor(np.moveaxis(np.asarray(images), 3, 1))
  for model.cut_off in (False, True):
    theirs = model(found).detach().numpy()
    print(
      f"cut off {model.cut_off}: at most {np.abs(theirs - ours).max():.1e}"
      f" from ours, which are up to {np.abs(ours).max():.1f}"
    )


def _load(model, params, variables, config) -> None:
  """Copies a backbone's weights, queries and head."""
  width, state = config.width, {}

  def put(name, value, transposed=False):
    value = np.asarray(value)
    state[name] = torch.tensor(value.T.copy() if transposed else value)

  def dense(name, leaf, shape):
    put(f"{name}.weight", np.reshape(leaf["kernel"], shape), True)
    put(f"{name}.bias", np.reshape(leaf["bias"], -1))

  def norm(name, leaf):
    put(f"{name}.weight", leaf["scale"])
    put(f"{name}.bias", leaf["bias"])

  first, encoder = "vit.embeddings", params["Transformer"]
  kernel = np.transpose(params["embedding"]["kernel"], (3, 2, 0, 1))
  put(f"{first}.patch_embeddings.projection.weight", kernel)
  put(f"{first}.patch_embeddings.projection.bias", params["embedding"]["bias"])
  put(f"{first}.cls_token", params["cls"])
  none = np.zeros((1, 1, width), np.float32)  # The class token has it already.
  positions = np.concatenate([none, params["pos_embedding"]], 1)
  put(f"{first}.position_embeddings", positions)
  norm("vit.layernorm", encoder["encoder_norm"])
  for i in range(config.depth):
    name = f"vit.layers.{i}"
    block = jax.tree.map(lambda x, i=i: x[i], encoder["encoderblock"])
    norm(f"{name}.layernorm_before", block["LayerNorm_0"])
    norm(f"{name}.layernorm_after", block["LayerNorm_1"])
    attention = block["MultiHeadDotProductAttention_0"]
    for part in ("query", "key", "value", "out"):
      to = f"{name}.attention.{part[0]}_proj"
      dense(to, attention[part], (width, width))
    for part, leaf in enumerate(("Dense_0", "Dense_1"), 1):
      of = block["MlpBlock_0"][leaf]
      dense(f"{name}.mlp.fc{part}", of, of["kernel"].shape)
  put("queries", np.reshape(variables["tuner"]["queries"], (-1, 1, 1, width)))
  dense("head", variables["head"], variables["head"]["kernel"].shape)
  model.load_state_dict(state)


class Final(torch.nn.Module):
  """A head on the class token."""

  def __init__(self, vit: torch.nn.Module, config: vit_config.ViTConfig):
    super().__init__()
    self.vit = vit
    self.head = torch.nn.Linear(config.width, cases.NUM_CLASSES)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    return self.head(self.vit(images).last_hidden_state[:, 0])


class Vqt(torch.nn.Module):
  """VQT with one query a block, without dropout in the frozen stream.

  With the data flow of the authors' program queries travel through a block with
  the stream, so that autograd keeps the whole backbone and goes through it, for
  gradients that are zero. With `cut_off` it sees neither.
  """

  def __init__(
    self, vit: torch.nn.Module, config: vit_config.ViTConfig, cut_off: bool
  ):
    super().__init__()
    self.vit, self.cut_off = vit, cut_off
    shape = (config.depth, 1, 1, config.width)
    self.queries = torch.nn.Parameter(torch.rand(shape) * 0.1 - 0.05)
    features = config.width * (config.depth + 1)
    self.head = torch.nn.Linear(features, cases.NUM_CLASSES)

  def features(self, images: torch.Tensor) -> list[torch.Tensor]:
    """[class token; output of each block], each (B, D)."""
    outputs = []
    with torch.set_grad_enabled(not self.cut_off):
      stream = self.vit.embeddings(images)
    for layer, query in zip(self.vit.layers, self.queries):
      query = query.expand(len(images), -1, -1).to(stream.dtype)
      query = F.dropout(query, 0.1, self.training)
      if self.cut_off:
        with torch.no_grad():
          read = layer.layernorm_before(stream)
          keys = heads(layer, layer.attention.k_proj(read))
          values = heads(layer, layer.attention.v_proj(read))
          stream = block(layer, stream, read, keys, values)
        output = block(
          layer, query, layer.layernorm_before(query), keys, values
        )
      else:
        rows = torch.cat([query, stream], 1)
        read = layer.layernorm_before(rows)
        keys = heads(layer, layer.attention.k_proj(read[:, 1:]))
        values = heads(layer, layer.attention.v_proj(read[:, 1:]))
        rows = block(layer, rows, read, keys, values)
        output, stream = rows[:, :1], rows[:, 1:]
      outputs.append(output[:, 0])
    with torch.set_grad_enabled(not self.cut_off):
      final = self.vit.layernorm(stream)[:, 0]
    return [final, *outputs]

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    features = [F.normalize(x.float(), dim=-1) for x in self.features(images)]
    return self.head(torch.cat(features, -1))


def heads(layer: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
  attention = layer.attention
  split = attention.num_attention_heads, attention.head_dim
  return rows.unflatten(-1, split).transpose(1, 2)


def block(
  layer: torch.nn.Module,
  rows: torch.Tensor,
  read: torch.Tensor,
  keys: torch.Tensor,
  values: torch.Tensor,
) -> torch.Tensor:
  """A block on `rows`, whose LN_0 is `read`."""
  query = heads(layer, layer.attention.q_proj(read))
  mean = F.scaled_dot_product_attention(query, keys, values)
  mean = mean.transpose(1, 2).flatten(2)
  rows = rows + layer.attention.o_proj(mean)
  return rows + layer.mlp(layer.layernorm_after(rows))
