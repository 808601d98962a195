"""Ways to compute the frozen blocks on a GPU, each set beside the package's.

  python -m benchmarks.gpu_forward --variant=B/16 --batch_size=64

Random weights, tokens of 224 px that are on the device. Each way changes one
thing of the package's blocks (the first row), the last ones several:

  one product      queries, keys and values by one product
  rows             products on [B N, D] instead of [B, N, D]
  unrolled         the blocks one after another instead of a scan
  tokens to ...    filled up to a multiple; attention leaves the others out
  cuDNN, XLA       attention
  tanh             GELU's approximation instead of erf

Prints the median of a pass in ms, its ratio to the first row, how much of the
bound it reaches, and the largest difference of its class tokens from the first
row's. The bound is the time of the blocks' products at the speed of one large
product, measured here.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cases
from benchmarks import flops
from vqt_jax.models import fused_attention
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import devices

REPEATS = 20
PROJECTIONS = ("query", "key", "value")
LARGE = 8192  # Rows and columns of the large product.


@dataclasses.dataclass(frozen=True)
class Way:
  """How blocks are computed; the defaults are the plainest."""

  one_product: bool = False
  rows: bool = False
  unrolled: bool = False
  multiple: int = 1
  cudnn: bool = False
  gelu: str = "exact"


def ways(cudnn: bool) -> dict[str, Way]:
  """Return name -> way, of a machine with cuDNN's attention or without."""
  plain = Way(cudnn=cudnn)
  changes = {
    "written out": {},
    "one product": {"one_product": True},
    "rows": {"rows": True},
    "unrolled": {"unrolled": True},
    "tokens to 8": {"multiple": 8},
    "tokens to 16": {"multiple": 16},
    "tanh": {"gelu": "tanh"},
    "one product, rows": {"one_product": True, "rows": True},
    "one product, rows, unrolled": {
      "one_product": True,
      "rows": True,
      "unrolled": True,
    },
    "one product, rows, unrolled, tokens to 8": {
      "one_product": True,
      "rows": True,
      "unrolled": True,
      "multiple": 8,
    },
  }
  if cudnn:
    changes["XLA"] = {"cudnn": False}
  return {
    name: dataclasses.replace(plain, **each) for name, each in changes.items()
  }


def packaged(
  config: vit_config.ViTConfig, params: Any, tokens: jax.Array
) -> jax.Array:
  """Class tokens (B, D) after the package's blocks."""
  encoder = vit.Encoder(config)
  z, _, _ = encoder.apply({"params": params}, tokens)
  return z[:, 0]


def join_projections(params: Any) -> Any:
  """Return the parameters with one kernel for queries, keys and values."""
  blocks = dict(params["encoderblock"])
  attention = blocks["MultiHeadDotProductAttention_0"]
  flat = lambda leaf: leaf.reshape(*leaf.shape[:-2], -1)
  joined = jax.tree.map(
    lambda *leaves: jnp.concatenate(list(map(flat, leaves)), axis=-1),
    *(attention[name] for name in PROJECTIONS),
  )
  blocks["MultiHeadDotProductAttention_0"] = {
    "joined": joined,
    "out": attention["out"],
  }
  return {**params, "encoderblock": blocks}


def written_out(
  config: vit_config.ViTConfig, way: Way, params: Any, tokens: jax.Array
) -> jax.Array:
  """The same of `packaged` in one of the ways."""
  count = tokens.shape[1]
  extra = -count % way.multiple
  z = jnp.pad(tokens, ((0, 0), (0, extra), (0, 0)))
  blocks = params["encoderblock"]
  body = lambda z, p: (block(config, way, count, p, z), None)
  if not way.unrolled:
    z, _ = jax.lax.scan(body, z, blocks)
  else:
    for i in range(config.depth):
      z, _ = body(z, jax.tree.map(lambda x, i=i: x[i], blocks))
  return z[:, 0]


def block(
  config: vit_config.ViTConfig,
  way: Way,
  count: int,
  params: Mapping[str, Any],
  z: jax.Array,
) -> jax.Array:
  """One block on (B, N, D), of whose N tokens the first `count` are real."""
  batch, tokens, width = z.shape
  heads = (config.num_heads, config.head_dim)
  flat = (batch * tokens,) if way.rows else (batch, tokens)

  def dense(x, p):
    kernel = p["kernel"].astype(config.dtype)
    out = kernel.reshape(x.shape[-1], -1)
    y = x.reshape(*flat, -1) @ out + p["bias"].astype(config.dtype).reshape(-1)
    return y.reshape(batch, tokens, -1)

  attention = params["MultiHeadDotProductAttention_0"]
  x = _layer_norm(config, params["LayerNorm_0"], z)
  if way.one_product:
    q, k, v = jnp.split(dense(x, attention["joined"]), 3, axis=-1)
  else:
    q, k, v = (dense(x, attention[name]) for name in PROJECTIONS)
  q, k, v = (y.reshape(batch, tokens, *heads) for y in (q, k, v))
  lengths = None
  if count < tokens:
    lengths = jnp.full(batch, count, jnp.int32)
  y = jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn" if way.cudnn else "xla",
  )
  z = z + dense(y.reshape(batch, tokens, width), attention["out"])
  x = _layer_norm(config, params["LayerNorm_1"], z)
  mlp = params["MlpBlock_0"]
  hidden = jax.nn.gelu(dense(x, mlp["Dense_0"]), approximate=way.gelu == "tanh")
  return z + dense(hidden, mlp["Dense_1"])


def _layer_norm(config, params, z):
  x = z.astype(jnp.float32)
  x = jax.nn.standardize(x, epsilon=config.layer_norm_epsilon)
  return (x * params["scale"] + params["bias"]).astype(config.dtype)


def measure(function: Any, *arguments: Any) -> tuple[float, jax.Array]:
  """Return the median time of a call, compiled, waited for; and its result."""
  run = jax.jit(function)
  result, found = jax.block_until_ready(run(*arguments)), []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    found.append(time.perf_counter() - start)
  return statistics.median(found), result


def bound(config: vit_config.ViTConfig, batch_size: int, large: int) -> float:
  """Seconds of the blocks' products at the speed of one large product."""
  x = jnp.ones((large, large), config.dtype)
  speed = 2 * large**3 / measure(jnp.matmul, x, x)[0]
  return batch_size * flops.blocks(config) / speed


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variant", default="B/16")
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--batch_size", type=int, default=64, help="images")
  parser.add_argument("--dtype", default="bfloat16", help="of matrix products")
  parser.add_argument("--large", type=int, default=LARGE)
  options = parser.parse_args()
  devices.set_gpu_flags()  # As main.py does.
  config = cases.vit_config(options.variant, options.image_size, options.dtype)
  config = dataclasses.replace(config, gelu="exact")
  params = jax.jit(vit.init_params, static_argnums=0)(config, jax.random.key(0))
  params = params["Transformer"]
  shape = (options.batch_size, config.num_tokens, config.width)
  tokens = jax.random.normal(jax.random.key(1), shape, config.dtype)

  least = bound(config, options.batch_size, options.large)
  first, want = measure(functools.partial(packaged, config), params, tokens)
  rows, joined = [("vqt_jax", first, 0.0)], join_projections(params)
  for name, way in ways(fused_attention.is_available()).items():
    run = functools.partial(written_out, config, way)
    taken, got = measure(run, joined if way.one_product else params, tokens)
    difference = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    rows.append((name, taken, float(difference.max())))
  _show(rows, least, options)


def _show(
  rows: list[tuple[str, float, float]], least: float, options: Any
) -> None:
  console = console_lib.Console(sys.stdout)
  console.note(
    f"ViT-{options.variant}, {options.image_size} px, batch"
    f" {options.batch_size}, {options.dtype}, {jax.devices()[0].device_kind},"
    f" bound {1e3 * least:.2f} ms"
  )
  console.table(
    ("blocks", "ms", "ratio", "of bound", "difference"),
    [
      (
        name,
        f"{1e3 * taken:.2f}",
        f"{taken / rows[0][1]:.2f}",
        f"{100 * least / taken:.0f} %",
        f"{difference:.1e}",
      )
      for name, taken, difference in rows
    ],
  )


if __name__ == "__main__":
  main()
