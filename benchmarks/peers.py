"""A training step here, and of what users would pick instead, side by side.

  pip install torch transformers peft
  python -m benchmarks.peers --batch_size=64 --dtype=bfloat16
  python -m benchmarks.peers --batch_size=8 --steps=1 --repeats=3   (a CPU)

PyTorch runs Hugging Face's ViT with its fused attention, step by step; LoRA is
PEFT's; VQT is written in PyTorch twice, with the data flow of the authors'
program and with the stream cut off from autograd (`peers_torch.py`). All have
random weights, 100 classes, Adam, images that lie on the device (here those of
all `steps`, there of one), and a process of their own. `--compile` adds a row
of each with `torch.compile`. `--check` compares both VQTs' logits with ours, of
the same weights.

Columns:
  ms     median over `repeats` of a step, of `steps` in a row
  ratio  over that of VQT here, through the backbone
  first  seconds of the first call or steps, with compilation
  peak   MiB of the accelerator's memory, with weights and images (or the
         features of 1,000 images); on a CPU of the process, beyond its imports
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

import jax
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from benchmarks import cases
import vqt_jax
from vqt_jax.models import vit_config
from vqt_jax.runtime import devices
from vqt_jax.runtime import units

TORCH = ("linear probe", "VQT", "VQT, stream cut off", "LoRA", "fine-tuning")
OURS = (
  "linear",
  "vqt",
  "vqt, stored",
  "vqt, stored, 20 runs",
  "lora",
  "finetune",
)
BASE = "vqt_jax: vqt"


def measure_ours(name: str, options: argparse.Namespace) -> dict[str, Any]:
  """Seconds of a step, of each repeat, and peak memory."""
  config = _config(options)
  devices.set_gpu_flags()  # As main.py does.
  method, *how = name.split(", ")
  tuner = vqt_jax.make_tuner(method, config, cases.NUM_CLASSES)
  stored, runs = "stored" in how, 20 if "20 runs" in how else 1
  case = cases.train(
    tuner,
    options.batch_size,
    stored=stored,
    runs=runs,
    steps=options.steps,
    rows=1000 if stored else 0,
  )
  arrays = list(case.arrays())
  first, *seconds = (case.seconds(arrays) for _ in range(1 + options.repeats))
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  return {
    "seconds": [each / (options.steps * runs) for each in seconds],
    "first": first,
    "peak": stats.get("peak_bytes_in_use"),
    "versions": f"jax {jax.__version__}",
    "device": device.device_kind,
  }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
  """As `measure_ours`, of any row of the table, in this process."""
  library, case = name.split(": ")
  if library == "vqt_jax":
    before = _resident()
    figures = measure_ours(case, options)
  else:
    from benchmarks import peers_torch

    before = _resident()
    figures = peers_torch.measure(
      case,
      _config(options),
      options.batch_size,
      options.steps,
      options.repeats,
      library == "torch.compile",
    )
  if figures["peak"] is None:
    figures["peak"] = _resident() - before
  return {"name": name, **figures}


def _config(options: argparse.Namespace) -> vit_config.ViTConfig:
  """Of the backbone; its GELU is that of Hugging Face's ViT."""
  config = cases.vit_config(options.variant, options.image_size, options.dtype)
  return dataclasses.replace(config, gelu="exact")


def _resident() -> int:
  """The most that this process has had in memory, bytes."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show(rows: list[dict[str, Any]], title: str) -> None:
  """Prints the table."""
  table = rich_table.Table(
    "step",
    "ms",
    "ratio",
    "first, s",
    "peak, MiB",
    title=title,
    box=box.SIMPLE,
  )
  for column in table.columns[1:]:
    column.justify = "right"
  median = {row["name"]: statistics.median(row["seconds"]) for row in rows}
  for row in rows:
    mine = median[row["name"]]
    ratio = f"{mine / median[BASE]:.2f}" if BASE in median else ""
    table.add_row(
      row["name"],
      f"{1e3 * mine:,.2f}",
      ratio,
      f"{row['first']:.1f}",
      units.format_mib(row["peak"], 0),
    )
  out = rich_console.Console(width=100)
  out.print(table)
  out.print("; ".join(dict.fromkeys(row["versions"] for row in rows)))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variant", default="B/16")
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--batch_size", type=int, default=64, help="images")
  parser.add_argument("--dtype", default="float32", help="of matrix products")
  parser.add_argument("--steps", type=int, default=8, help="in a row")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--compile", action="store_true", help="torch.compile")
  parser.add_argument("--check", action="store_true", help="no timing")
  parser.add_argument("--only", default="", help="part of the rows' names")
  parser.add_argument("--row", default="", help="measures one, prints json")
  parser.add_argument("--json", default="", help="file for all figures")
  options = parser.parse_args()
  if options.check:
    from benchmarks import peers_torch

    peers_torch.check(_config(options), options.batch_size)
    return
  if options.row:
    print(json.dumps(measure(options.row, options)))
    return
  names = [f"vqt_jax: {name}" for name in OURS]
  for library in ("torch", "torch.compile")[: 1 + options.compile]:
    names += [f"{library}: {name}" for name in TORCH]
  rows = []
  for name in names:
    if options.only in name:
      rows += _in_own_process(name)
  device = next((x["device"] for x in rows if "device" in x), "")
  title = (
    f"ViT-{options.variant}, {options.image_size} px, batch"
    f" {options.batch_size}, {options.dtype}, {device}"
    f" ({os.cpu_count()} cores)"
  )
  show(rows, title)
  if options.json:
    with open(options.json, "w", encoding="utf-8") as file:
      json.dump({"title": title, "rows": rows}, file, indent=1)


def _in_own_process(name: str) -> list[dict[str, Any]]:
  """A row's figures, or none, with a line that says why."""
  # PyTorch and JAX both take what they use, so that peaks can be compared.
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:]]
  done = subprocess.run(
    [*command, f"--row={name}"],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    print(f"{name}: {lines[-1]}", flush=True)
    return []
  print(f"{name}: done", file=sys.stderr, flush=True)
  return [json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
  main()
