"""What a step needs on TPUs, asked of their compiler; no TPU takes part.

Compiles linear probe, VQT and full fine-tuning ahead of time for slices and
prints a table for each: per chip and step, temporary memory, arguments,
operations and communication. With --methods every method that gradients train,
editors also with their blocks computed again for the gradient. libtpu holds the
compiler; keep it out of the environment that trains, where JAX would look for a
TPU at every start:

  pip install --no-deps --target /tmp/libtpu "libtpu==0.0.42.*"
  PYTHONPATH=/tmp/libtpu python -m benchmarks.tpu_memory
  PYTHONPATH=/tmp/libtpu python -m benchmarks.tpu_memory --methods \\
      --topologies v5e:2x2,v6e:2x2

Temporary memory is `temp_size_in_bytes` of the compiler's memory analysis. Its
buffer assignment (`xla_dump_to`) allots less of the main memory for the larger
steps, and beside it up to all of the on-chip VMEM.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # The host; the compiler is asked by name.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")

import jax
from jax.experimental import topologies
from jax.sharding import AxisType
import numpy as np
from rich import box
from rich import console as rich_console
from rich import table as rich_table

from benchmarks import cases
from vqt_jax.models import vit_config as vit_config_lib
from vqt_jax.planning import cost
from vqt_jax.planning import hlo
from vqt_jax.runtime import units
from vqt_jax.training import step as step_lib

STEPS = 2  # So that the loop over steps stays one.
WHERE = ("call", "step", "block")  # By how many loops are around.


def slice_mesh(topology: str, model: int) -> jax.sharding.Mesh:
  """The mesh of `mesh.make_mesh`, of a slice that need not be there."""
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except RuntimeError as e:
    if "not installed" not in str(e):
      raise
    wanted = [x for x in importlib.metadata.requires("jax") if "libtpu" in x]
    package = wanted[0].split(";")[0].strip()
    sys.exit(
      "libtpu, which holds the compiler for TPUs, is not installed. Get it"
      f' with: pip install --no-deps --target /tmp/libtpu "{package}" and run'
      " this again with PYTHONPATH=/tmp/libtpu."
    )
  devices = np.array(devices).reshape(-1, model)
  auto = (AxisType.Auto,) * 2
  return jax.sharding.Mesh(devices, ("data", "model"), axis_types=auto)


def evaluation(train: cases.Case) -> cases.Case:
  """`eval_steps` of the same tuner on the same data."""

  def build():
    state, frozen, settings, data, order, mask, _ = train.build()
    variables = {name: state.trained[name] for name in ("tuner", "head")}
    ready = (step_lib.TrainedTrials(variables, settings.normalize),)
    return ready, frozen["backbone"], data, order, mask

  return cases.Case(
    train.name + ", evaluation",
    step_lib.eval_steps,
    (train.static[:1],),
    build,
  )


def measure(case: cases.Case, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Compiles for the slice; figures are per chip, operations per step."""
  args = case.shapes(mesh)
  operations = cost.matmuls(case.function, *case.shapes())
  figures = {
    "step": case.name,
    "flops": operations // (STEPS * mesh.size),
    "exceeds": False,
  }
  try:
    program = cost.compile_for(mesh, case.function, *args)
  except cost.Exceeds as e:
    return figures | {"exceeds": True, "needed_bytes": e.needed}
  memory = program.memory_analysis()
  return figures | {
    "temp_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "collectives": talk(program.as_text()),
  }


def talk(text: str) -> dict[str, tuple[int, int]]:
  """Communication in a compiled program: "kind per place" -> (count, bytes)."""
  found = collections.defaultdict(lambda: (0, 0))
  for each in hlo.collectives(text):
    place = f"{each.kind} per {WHERE[min(each.loops, 2)]}"
    count, size = found[place]
    found[place] = (count + 1, size + each.size)
  return dict(found)


def row_of(figures: dict[str, Any]) -> list[str]:
  mib = lambda name: units.format_mib(figures[name], 0)
  if figures["exceeds"]:
    needed = figures["needed_bytes"]
    memory = [
      f"{units.format_mib(needed, 0)} needed" if needed else "too much",
      "",
    ]
  else:
    memory = [mib("temp_bytes"), mib("argument_bytes")]
  lines = [
    f"{count} {kind} ({units.format_mib(size)} MiB)"
    for kind, (count, size) in figures.get("collectives", {}).items()
  ]
  operations = f"{figures['flops'] / 1e9:,.0f}"
  return [figures["step"], *memory, operations, "\n".join(lines)]


def steps_of(
  config: vit_config_lib.ViTConfig,
  mesh: jax.sharding.Mesh,
  options: argparse.Namespace,
) -> list[cases.Case]:
  """Steps to compile for a slice."""
  make = cases.all_methods if options.methods else cases.all_steps
  steps = make(
    config,
    options.batch_per_chip * mesh.shape["data"],
    rows=options.rows,
    steps=STEPS,
  )
  if not options.methods:
    steps[3:3] = map(evaluation, steps[1:3])
  return [case for case in steps if options.only in case.name]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--topologies", default="v5e:2x2", help="slices of TPUs, with commas"
  )
  parser.add_argument("--model", type=int, default=1, help="chips per backbone")
  parser.add_argument("--variant", default="B/16")
  parser.add_argument("--image_size", type=int, default=224, help="pixels")
  parser.add_argument("--batch_per_chip", type=int, default=64, help="images")
  parser.add_argument("--rows", type=int, default=0, help="resident images")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--methods", action="store_true", help="all, live")
  parser.add_argument("--only", default="", help="part of the steps' names")
  parser.add_argument("--json", default="", help="file for all figures")
  options = parser.parse_args()

  config = cases.vit_config(options.variant, options.image_size, options.dtype)
  rows = []
  for topology in options.topologies.split(","):
    mesh = slice_mesh(topology, options.model)
    table = rich_table.Table(
      "step",
      "temp MiB",
      "arguments MiB",
      "GFLOP",
      "communication",
      title=f"ViT-{options.variant}, {options.image_size} px, {options.dtype},"
      f" {options.batch_per_chip} images per chip, {topology}",
      box=box.SIMPLE,
    )
    for column in table.columns[1:4]:
      column.justify = "right"
    for case in steps_of(config, mesh, options):
      figures = measure(case, mesh)
      rows.append({"topology": topology, **figures})
      table.add_row(*row_of(figures))
      print(topology, case.name, file=sys.stderr, flush=True)
      if options.json:  # What is there if the rest is interrupted.
        with open(options.json, "w") as file:
          json.dump({"options": vars(options), "rows": rows}, file, indent=2)
    rich_console.Console(width=110).print(table)


if __name__ == "__main__":
  main()
