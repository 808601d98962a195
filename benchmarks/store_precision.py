"""What storing features in fewer bits costs in accuracy.

  python -m benchmarks.store_precision --config configs/digits.py

Runs the protocol of a config from features as the backbone computes them, and
from the same ones rounded to bfloat16, and to 8-bit integers with one scale per
token (kept in the config's dtype then: this measures the rounding only).
"""

import argparse
from collections.abc import Callable
import io
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
from rich import box
from rich import console as rich_console
from rich import table as rich_table

import vqt_jax
from vqt_jax import accuracy
from vqt_jax import cli
from vqt_jax.config import resolve
from vqt_jax.features import store
from vqt_jax.runtime import console as console_lib


def exact(tokens: jax.Array) -> jax.Array:
  return tokens


def bfloat16(tokens: jax.Array) -> jax.Array:
  # As a number of bits, so that no compiler takes the rounding out.
  return jax.lax.reduce_precision(tokens, exponent_bits=8, mantissa_bits=7)


def int8(tokens: jax.Array) -> jax.Array:
  """Symmetric, the largest of a token's numbers is 127."""
  scale = jnp.abs(tokens).max(axis=-1, keepdims=True) / 127
  return jnp.round(tokens / scale) * scale


ROUNDINGS = {exact: 4, bfloat16: 2, int8: 1}  # Bytes of a number.


def outcome(config, rounding: Callable[[jax.Array], jax.Array]):
  """Results of the protocol on rounded features."""
  runner = store.extractor

  def rounded(layout):
    def run(params, images):
      part = runner(layout)(params, images)
      return {**part, "tokens": rounding(part["tokens"])}

    return run

  quiet = console_lib.Console(io.StringIO())
  with tempfile.TemporaryDirectory() as folder:
    with mock.patch.object(store, "runner", rounded):
      return vqt_jax.train(config, pathlib.Path(folder) / "run", quiet)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  _, rest = parser.parse_known_args()
  argv = ["main.py", "--workdir=unused", *rest]
  config = resolve.resolve(cli.parse(argv).config)
  config.features, config.feature_dtype = "device", "float32"
  config.store_dir = ""  # No file may keep what is rounded here.
  table = rich_table.Table(
    "features",
    "bytes of a number",
    "chosen",
    "val %",
    "test %",
    "of each",
    title=f"{config.method} on {config.task}",
    box=box.SIMPLE,
  )
  for rounding, size in ROUNDINGS.items():
    results = outcome(config, rounding)
    test, chosen = results["test_accuracy"], results["chosen"]
    search = results["search"]
    val = search["val_accuracy"][search["chosen"]] if search else float("nan")
    table.add_row(
      rounding.__name__,
      str(size),
      f"{chosen['lr']:g}, {chosen['weight_decay']:g}",
      f"{100 * val:.1f}",
      accuracy.told(test),
      " ".join(f"{100 * a:.1f}" for a in test["per_seed"].values()),
    )
  rich_console.Console(width=110).print(table)


if __name__ == "__main__":
  main()
