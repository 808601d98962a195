"""One training step, side by side: time, memory and operations.

Linear probe, VQT through the backbone, VQT from the feature store and full
fine-tuning, on random weights and images:

  python -m benchmarks.step
  python -m benchmarks.step --variants=S/14 --batch_size=8 --repeats=9
  python -m benchmarks.step --repeats=0 --json=step.json     (compiles only)

Columns:
  ms       median over `repeats` rounds, each of which runs every step once
  /linear  ms over the linear probe's
  GFLOP    operations of all matrix products, scans counted at their length
  /bound   GFLOP over what the step ought to cost: the frozen forward pass plus
           the counted cost of reading and head (see `flops.py`)
  XLA      operations of the compiled step as the compiler counts them, that is
           with elementwise ones, and with all loops unrolled for the count
  /bound   XLA over XLA's count of the frozen forward pass plus reading and head
  temp     MiB of temporary memory of the compiled step
  peak     MiB of the same with arguments (weights, batch, optimiser)
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from typing import Any
from unittest import mock

import jax
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from benchmarks import cases
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.planning import cost as cost_lib
from vqt_jax.runtime import units

COLUMNS = (
  "step",
  "ms",
  "/linear",
  "GFLOP",
  "/bound",
  "XLA",
  "/bound",
  "temp",
  "peak",
)


@contextlib.contextmanager
def unrolled_loops():
  """Lets scans be traced as straight code, each step of which is counted."""
  scan_as_told = jax.lax.scan
  scan = lambda *args, **kw: scan_as_told(*args, **{**kw, "unroll": True})
  over = lambda f, xs: scan(lambda _, x: (None, f(x)), None, xs)[1]
  with mock.patch.multiple(jax.lax, scan=scan, map=over):
    yield


def compiled_flops(function: Any, static: int, args: tuple[Any, ...]) -> float:
  """What XLA counts for a call with all loops unrolled.

  Args:
    function: made by `jax.jit`; what it wraps is traced anew.
    static: how many of its first arguments are static.
    args: arrays or shapes.
  """
  fresh = jax.jit(
    lambda *args: function.__wrapped__(*args),
    static_argnums=tuple(range(static)),
  )
  with unrolled_loops():
    cost = fresh.lower(*args).compile().cost_analysis()
  return cost["flops"]


@jax.jit(static_argnums=0)
def _forward(tuner, params, images):
  config = tuner.config
  images = images.reshape(-1, *config.image_size, 3)
  return tuner_lib.run_backbone(config, False, params, images).final


def measure(case: cases.Case, forward: float) -> dict[str, Any]:
  """Operations and memory of a step; compiles it.

  Args:
    case: the step.
    forward: `compiled_flops` of its frozen forward pass, or 0 if not wanted.
  """
  args = case.shapes()
  memory = case.function.lower(*args).compile().memory_analysis()
  arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
  figures = {
    "step": case.name,
    "flops": cost_lib.matmuls(case.function, *args),
    "flops_bound": case.expected,
    "temp_bytes": memory.temp_size_in_bytes,
    "peak_bytes": sum(
      (arguments, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    ),
  }
  if forward:
    xla = compiled_flops(case.function, len(case.static), args)
    figures["xla_flops"] = xla
    if case.reading is not None:
      live = case.expected > case.reading
      figures["xla_flops_bound"] = case.reading + (forward if live else 0)
  return figures


def time_steps(steps: list[cases.Case], repeats: int) -> list[list[float]]:
  """Seconds per call of every step, in turns, after one call to warm up."""
  seconds = [[] for _ in steps]
  args = [list(case.arrays()) for case in steps]
  for turn in range(repeats + 1):
    for case, mine, taken in zip(steps, args, seconds):
      each = case.seconds(mine)
      if turn:
        taken.append(each)
  return seconds


def forward_flops(steps: list[cases.Case]) -> float:
  """`compiled_flops` of the frozen forward pass on one call's images."""
  tuner = steps[0].static[0]
  _, frozen, _, data, *_ = steps[0].shapes()[len(steps[0].static) :]
  return compiled_flops(_forward, 1, (tuner, frozen["backbone"], data["image"]))


def benchmark(
  variant: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
  """Figures of all steps on one backbone."""
  config = cases.vit_config(variant, options.image_size, options.dtype)
  steps = cases.all_steps(config, options.batch_size)
  forward = 0.0 if options.no_unroll else forward_flops(steps)
  rows = [measure(case, forward) for case in steps]
  if options.repeats:
    for row, seconds in zip(rows, time_steps(steps, options.repeats)):
      row["seconds"] = seconds
  return [{"variant": variant, **row} for row in rows]


def show(rows: list[dict[str, Any]], title: str) -> None:
  """Prints a table of one backbone's figures."""
  table = rich_table.Table(*COLUMNS, title=title, box=box.SIMPLE)
  for column in table.columns[1:]:
    column.justify = "right"
  median = lambda row: statistics.median(row["seconds"])
  for row in rows:
    cells = ["", "", f"{row['flops'] / 1e9:,.1f}"]
    if "seconds" in row:
      cells[0] = f"{1e3 * median(row):,.0f}"
      cells[1] = f"{median(row) / median(rows[0]):.2f}"
    cells += [f"{row['flops'] / row['flops_bound']:.3f}", "", ""]
    if "xla_flops" in row:
      cells[4] = f"{row['xla_flops'] / 1e9:,.1f}"
      if "xla_flops_bound" in row:
        cells[5] = f"{row['xla_flops'] / row['xla_flops_bound']:.3f}"
    for name in ("temp_bytes", "peak_bytes"):
      cells.append(units.format_mib(row[name], 0))
    table.add_row(row["step"], *cells)
  rich_console.Console(width=100).print(table)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variants", default="S/14,B/16", help="comma-separated")
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--batch_size", type=int, default=16, help="images")
  parser.add_argument("--dtype", default="float32", help="of matrix products")
  parser.add_argument("--repeats", type=int, default=5, help="0: only compile")
  parser.add_argument(
    "--no_unroll", action="store_true", help="leave out XLA's count"
  )
  parser.add_argument("--json", default="", help="file for all figures")
  options = parser.parse_args()

  device = jax.devices()[0]
  machine = {
    "device": device.device_kind,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }
  rows = []
  for variant in options.variants.split(","):
    rows += benchmark(variant, options)
    mine = [row for row in rows if row["variant"] == variant]
    title = (
      f"ViT-{variant}, {options.image_size} px, batch {options.batch_size},"
      f" {options.dtype}, {device.device_kind} ({os.cpu_count()} cores)"
    )
    show(mine, title)
  if options.json:
    with open(options.json, "w") as file:
      json.dump(
        {"machine": machine, "options": vars(options), "rows": rows},
        file,
        indent=2,
      )


if __name__ == "__main__":
  main()
