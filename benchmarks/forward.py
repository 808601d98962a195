"""The frozen forward pass, against timm in PyTorch and ONNX Runtime, on a CPU.

  python -m benchmarks.forward --python=OTHER/bin/python [--variant=S/14]
      [--batch=32] [--rounds=5]

OTHER has torch, timm, onnx, onnxscript and onnxruntime. Each contender is a
process of its own that runs one batch of 224 px when it is asked to; all are
asked in turn, round after round. Prints images a second, the median over
rounds, and each against the best. "products" is the bound: only the matrix
products of the blocks, in XLA, of four images at a time, one after another.
vqt_jax computes two halves of the batch at a time, as it does with batches of a
run. On one core: `taskset -c 0` before it.
"""

from collections.abc import Sequence
import functools
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

# Variant -> timm's name of it.
MODELS = {"S/14": "vit_small_patch14_dinov2", "B/16": "vit_base_patch16_224"}
CONTENDERS = (
  ("products", "float32"),
  ("vqt_jax", "float32"),
  ("eager", "float32"),
  ("compile", "float32"),
  ("onnx", "float32"),
  ("vqt_jax", "bfloat16"),
  ("eager", "bfloat16"),
)


def ours(variant: str, dtype: str, batch: int):
  import jax

  from vqt_jax.checkpoints import architecture
  from vqt_jax.models import vit
  from vqt_jax.models import vit_config
  from vqt_jax.runtime import ahead

  sizes = architecture.decode_variant(variant)
  config = vit_config.ViTConfig(
    **sizes, image_size=(224, 224), gelu="exact", dtype=dtype
  )
  params = jax.jit(lambda key: vit.init_params(config, key))(jax.random.key(0))
  images = np.random.default_rng(0).standard_normal((batch, 224, 224, 3))
  halves = jax.numpy.split(jax.numpy.asarray(images, "float32"), 2)
  run = jax.jit(lambda p, x: vit.ViT(config).apply({"params": p}, x).final)
  return lambda: list(ahead.compute(run, ((params, x) for x in halves)))


def products(variant: str, dtype: str, batch: int):
  import jax
  import jax.numpy as jnp

  from vqt_jax.checkpoints import architecture
  from vqt_jax.models import vit_config

  sizes = architecture.decode_variant(variant)
  c = vit_config.ViTConfig(**sizes, image_size=(224, 224))
  images = min(batch, 4)
  tokens, heads = (images, c.num_tokens), (c.num_heads, c.head_dim)
  make = lambda *shape: jnp.ones(shape, dtype)
  kernels = [make(c.width, c.width) for _ in range(4)]
  kernels += [make(c.width, c.mlp_dim), make(c.mlp_dim, c.width)]

  @jax.jit
  def block(x, query, key, value, out, first, second):
    split = lambda y: y.reshape(*tokens, *heads).transpose(2, 0, 1, 3)
    q, k, v = (split(x @ kernel) for kernel in (query, key, value))
    y = jax.lax.map(
      lambda each: (each[0] @ each[1].swapaxes(1, 2)) @ each[2], (q, k, v)
    )
    y = y.transpose(1, 2, 0, 3).reshape(x.shape)
    return y @ out @ first @ second

  x = make(images * c.num_tokens, c.width)
  calls = c.depth * batch // images
  return lambda: functools.reduce(
    lambda y, _: block(y, *kernels), range(calls), x
  ).block_until_ready()


def theirs(how: str, variant: str, dtype: str, batch: int):
  import timm
  import torch

  model = timm.create_model(MODELS[variant], img_size=224, num_classes=0).eval()
  images = torch.randn(batch, 3, 224, 224)
  if how == "onnx":
    import onnxruntime

    torch.onnx.export(model, (images,), "/tmp/forward.onnx", dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(
      "/tmp/forward.onnx", options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)
  if how == "compile":
    model = torch.compile(model)

  @torch.inference_mode()
  def run():
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      return model(images)

  return run


def answer(how: str, variant: str, dtype: str, batch: str) -> None:
  """Run a batch for each line that comes in, and print its seconds."""
  make = {"vqt_jax": ours, "products": products}.get(
    how, functools.partial(theirs, how)
  )
  run = make(variant, dtype, int(batch))
  for _ in range(2):  # Compile, and warm up.
    run()
  print("ready", flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)


def start(values: Any, how: str, dtype: str):
  """Start a contender; None if it cannot do this."""
  is_ours = how in ("vqt_jax", "products")
  python = sys.executable if is_ours else values.python
  process = subprocess.Popen(
    [python, __file__, "answer", how, values.variant, dtype, str(values.batch)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
  )
  for line in process.stdout:
    if line.strip() == "ready":
      return process
  return None


def main(argv: Sequence[str]) -> None:
  from absl import flags  # OTHER has neither.
  import rich.console
  import rich.table

  values = flags.FlagValues()
  flags.DEFINE_string("python", sys.executable, "", flag_values=values)
  for name, default in (("batch", 32), ("rounds", 5)):
    flags.DEFINE_integer(name, default, "", flag_values=values)
  flags.DEFINE_string("variant", "S/14", "", flag_values=values)
  values(argv)
  running = {
    (how, dtype): process
    for how, dtype in CONTENDERS
    if (process := start(values, how, dtype))
  }
  seconds = {each: [] for each in running}
  for _ in range(values.rounds):
    for each, process in running.items():
      process.stdin.write("\n")
      process.stdin.flush()
      seconds[each].append(float(process.stdout.readline()))
  for process in running.values():
    process.stdin.close()
    process.wait()
  title = f"ViT-{values.variant}"
  table = rich.table.Table(
    "dtype", "program", "images/s", "of the best", title=title
  )
  medians = {each: np.median(times) for each, times in seconds.items()}
  for (how, dtype), median in medians.items():
    rivals = [
      m for (h, d), m in medians.items() if d == dtype and h != "products"
    ]
    best = min(rivals)
    rate = f"{values.batch / median:.1f}"
    table.add_row(dtype, how, rate, f"{best / median:.2f}")
  rich.console.Console().print(table)


if __name__ == "__main__":
  if sys.argv[1:2] == ["answer"]:
    answer(*sys.argv[2:])
  else:
    main(sys.argv)
