"""Training steps that users would run in PyTorch instead; see `peers.py`.

The backbone is Hugging Face's ViT (transformers) with its fused attention, and
random weights; LoRA is PEFT's.
"""

from collections.abc import Callable
import time
from typing import Any

import peft
import torch
from torch.nn import functional as F
import transformers

from benchmarks import cases
from vqt_jax import vit as vit_lib


def steps(
    name: str, config: vit_lib.ViTConfig, batch_size: int, compiled: bool
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
    config: vit_lib.ViTConfig,
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
      "seconds": seconds, "first": first, "peak": peak,
      "versions": f"{versions}, transformers {transformers.__version__}",
  }  # fmt: skip


def backbone(config: vit_lib.ViTConfig) -> torch.nn.Module:
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


def _model(name: str, config: vit_lib.ViTConfig) -> torch.nn.Module:
  vit = backbone(config)
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


class Final(torch.nn.Module):
  """A head on the class token."""

  def __init__(self, vit: torch.nn.Module, config: vit_lib.ViTConfig):
    super().__init__()
    self.vit = vit
    self.head = torch.nn.Linear(config.width, cases.NUM_CLASSES)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    return self.head(self.vit(images).last_hidden_state[:, 0])


class Vqt(torch.nn.Module):
  """VQT with one query a block, without dropout in the frozen stream.

  As the authors' program runs it queries travel through a block with the
  stream, so that autograd keeps the whole backbone and goes through it, for
  gradients that are zero. With `cut_off` it sees neither.
  """

  def __init__(
      self, vit: torch.nn.Module, config: vit_lib.ViTConfig, cut_off: bool
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
