"""How a run scales to a slice of 256 chips, asked of the compiler alone.

Plans a training step (VQT, T=1, 100 classes, one run) through the backbone, or
from the store with extraction, for backbones and slices of every size; prints a
row for each. Images in a step, and those that are held, grow with the chips.

  PYTHONPATH=/tmp/libtpu python -m benchmarks.plan_tables --json plans.json
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.planning import plan
from vqt_jax.planning import programs
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import units

PER_CHIP = 64  # images in a step
STEPS = 4  # in an epoch
VARIANTS = "B/16,L/16,H/14,g/14"
SLICES = (
  "v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16,v6e:2x2,v6e:4x4,v6e:8x8,v6e:16x16,"
  "v4:2x2x1,v4:2x2x4,v4:4x4x4,v4:4x8x8"
)


def job_of(variant: str, where: str, features: str) -> programs.PlanContext:
  """A step of `PER_CHIP` images on each chip, of `STEPS` times as many."""
  config = config_dict.default_config()
  config.init, config.variant = "gs://some/where.npz", variant
  config.lr, config.weight_decay, config.seeds = (0.1,), (1e-4,), (0,)
  config.keep_fraction = (1.0,)
  config.features = features
  job = plan.make_context(resolve.resolve(config), where)
  images = PER_CHIP * job.mesh.shape["data"]
  config = job.config.copy_and_resolve_references()
  config.batch_size = config.eval_batch_size = images
  counts = dict.fromkeys(job.counts, STEPS * images)
  return dataclasses.replace(job, config=config, counts=counts)


def reduced(estimate: plan.ResourceEstimate) -> float:
  """Return the bytes summed over devices in a step: mostly gradients."""
  return sum(
    each.times * each.size / estimate.program.steps
    for each in estimate.collectives
    if each.kind == "all-reduce"
  )


def figures(variant: str, where: str, features: str) -> list[dict[str, Any]]:
  """What training and extraction (if any) need, per chip; compiles them."""
  job, rows = job_of(variant, where, features), []
  todo = [programs.search(job)]
  if job.stored:
    todo.append(programs.extraction(job))
  for program in todo:
    needs = plan.measure(program, job.mesh)
    seconds = needs.seconds(job.chip)
    rows.append(
      {
        "backbone": variant,
        "slice": where,
        "features": features,
        "chips": job.mesh.size,
        "program": "training" if needs.program.trained else "extraction",
        "memory": needs.memory,
        "total": needs.total,
        "of": job.chip.memory,
        "gradients": reduced(needs),
        "sent": needs.sent,
        "flops": needs.flops,
        "traffic": needs.traffic,
        "seconds": seconds,
      }
    )
  return rows


def row_of(found: dict[str, Any]) -> list[str]:
  memory, seconds = found["memory"] or {}, found["seconds"] or {"": 0.0}
  slowest = max(seconds, key=seconds.get)
  mib = units.format_mib
  parts = ("weights", "data", "trials", "temporary")
  return [
    f"{found['backbone']} {found['program']}",
    found["slice"],
    found["chips"],
    *[units.format_mib(memory.get(part, 0), 0) for part in parts],
    f"{(found['total'] or 0) / found['of']:.0%}",
    mib(found["gradients"]),
    mib(found["sent"]),
    f"{1000 * seconds[slowest]:,.2f}",
    slowest,
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--variants", default=VARIANTS)
  parser.add_argument("--slices", default=SLICES)
  parser.add_argument("--features", default="live", help="or device")
  parser.add_argument("--json", default="", help="what is there already stays")
  options = parser.parse_args()
  rows = []
  if options.json and os.path.exists(options.json):
    with open(options.json) as file:
      rows = json.load(file)
  done = {(row["backbone"], row["slice"], row["features"]) for row in rows}
  for where in options.slices.split(","):
    for variant in options.variants.split(","):
      if (variant, where, options.features) in done:
        continue
      rows += figures(variant, where, options.features)
      print(variant, where, file=sys.stderr, flush=True)
      if options.json:
        with open(options.json, "w") as file:
          json.dump(rows, file, indent=1)
  columns = [
    "",
    "slice",
    "chips",
    "weights",
    "data",
    "trials",
    "temporary",
    "of it",
    "gradients",
    "sent",
    "ms at least",
    "bound by",
  ]
  console = console_lib.Console()
  console.header(["MiB a chip, and a step"])
  console.table(columns, list(map(row_of, rows)))


if __name__ == "__main__":
  main()
