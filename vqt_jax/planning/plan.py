"""Estimates what a run needs before it starts: `main.py --plan v5e:4x4`.

Every program of the run is compiled ahead of time, from shapes alone, for a
slice of TPUs that need not be there or for this machine. Memory is what the
compiler reports; operations and bytes are counted (`cost`, `hlo`). Times are
lower bounds: what the chip would take if arithmetic, memory or links, whichever
is slowest, were busy all the time. They leave out reading and decoding images,
compiling, and saving.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import ml_collections

from vqt_jax import checkpoints
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.config import resolve
from vqt_jax.data import vtab
from vqt_jax.features import examples
from vqt_jax.features import images
from vqt_jax.features import storage
from vqt_jax.planning import cost
from vqt_jax.planning import hlo
from vqt_jax.planning import programs
from vqt_jax.planning import tpus
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import units
from vqt_jax.training import grid
from vqt_jax.training import setup

TRIES = 6  # Batches that are compiled to find the largest that fits.


@dataclasses.dataclass(frozen=True)
class ResourceEstimate:
  """Resources that a program needs, per chip.

  Attributes:
    program: the program.
    memory: part -> bytes; None: it does not compile.
    total: bytes in all; None: unknown.
    flops: operations of matrix products in a step.
    traffic: bytes from and to the main memory in a step; None: unknown.
    collectives: of a call.
  """

  program: programs.Program
  memory: dict[str, int] | None
  total: int | None
  flops: float
  traffic: float | None
  collectives: list[hlo.Collective]

  def fits(self, chip: tpus.Chip) -> bool:
    return self.memory is not None and self.total <= chip.memory

  @property
  def sent(self) -> float:
    """Bytes that a chip sends in a step."""
    return sum(each.sent for each in self.collectives) / self.program.steps

  def seconds(self, chip: tpus.Chip) -> dict[str, float] | None:
    """Least seconds of a step by resource; None: not known."""
    if self.traffic is None or not chip.flops:
      return None
    return {
      "arithmetic": self.flops / chip.flops,
      "memory": self.traffic / chip.bandwidth,
      "links": self.sent / chip.links,
    }


def make_context(
  config: ml_collections.ConfigDict, where: str
) -> programs.PlanContext:
  """Look up what a config names, without reading weights or images.

  Raises:
    UserError: something that the user can correct.
  """
  if config.task == vtab.ALL:
    raise errors.UserError(
      "A plan is for one task: name it, e.g. --config.task=cifar100."
    )
  if config.methods:
    raise errors.UserError(
      "A plan is for one method: add e.g. --config.methods= --config.method="
      f"{config.methods.split(',')[-1]}."
    )
  chip, devices = tpus.find(where)
  platform = devices[0].platform
  vit_config = checkpoints.read_config(
    config.init, **setup.backbone_options(config, platform)
  )
  task = setup.find_task(config)
  tuner = setup.find_tuner(config, vit_config, task)
  mesh = setup.find_mesh(config, vit_config, devices)
  counts = {x: data.expected_examples(task, x) for x in data.SPLITS}
  config = resolve.fill_epochs(config, counts["trainval"])
  context = programs.PlanContext(
    config=config,
    tuner=tuner,
    chip=chip,
    mesh=mesh,
    counts=counts,
    loaded_splits={x: examples.loaded_split(task, x) for x in data.SPLITS},
    storage="",
    reason="",
    available=0,
  )
  available = _available(context, where)
  count = context.counts[context.loaded_splits["trainval"]]
  chosen, reason = storage.choose(
    config,
    tuner,
    context.layout.bytes_in(count),
    count * images.bytes_per_image(vit_config.image_size),
    available,
    platform,
  )
  if chosen == "stream":
    examples.check_batch_size(config.batch_size, mesh)
  return dataclasses.replace(
    context, storage=chosen, reason=reason, available=available["device"]
  )


def _available(context: programs.PlanContext, where: str) -> dict[str, int]:
  """Return `storage.available_bytes`; the disk of a slice is unlimited."""
  if where == tpus.HERE:
    return storage.available_bytes(context.config.store_dir, context.mesh)
  each = context.chip.memory * storage.DEVICE_SHARE
  host = context.chip.host_memory * storage.HOST_SHARE
  return {
    "device": int(each * context.mesh.shape["data"]),
    "host": int(host * context.mesh.size),
    "disk": 2**63,
  }


def measure(
  program: programs.Program, mesh: jax.sharding.Mesh
) -> ResourceEstimate:
  """Compile a program and count what it needs."""
  with jax.set_mesh(mesh):  # As it is compiled, so that it is traced once.
    flops = cost.matmuls(program.function, *program.args, trips=program.steps)
  flops /= mesh.size * program.steps
  try:
    parts = {
      "weights": _resident(program.weights, mesh),
      "data": _resident(program.data, mesh),
      "trials": _resident(program.trained, mesh),
    }
    done = cost.compile_for(mesh, program.function, *program.args)
  except cost.Exceeds as e:
    return ResourceEstimate(program, None, e.needed, flops, None, [])
  text, sizes = done.as_text(), done.memory_analysis()
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  parts["temporary"] = sizes.temp_size_in_bytes + program.results * results
  return ResourceEstimate(
    program,
    parts,
    sum(parts.values()),
    flops,
    hlo.traffic(text, program.steps) / program.steps,
    hlo.collectives(text, program.steps),
  )


def _resident(tree: Any, mesh: jax.sharding.Mesh) -> int:
  """Return the bytes of arrays on each device, padding included."""
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return 0
  nothing = jax.jit(lambda *x: 0, keep_unused=True)
  done = cost.compile_for(mesh, nothing, *leaves)
  return done.memory_analysis().argument_size_in_bytes


def largest_batch(
  context: programs.PlanContext,
) -> tuple[int | None, int | None]:
  """Search for the largest batch that fits, and the least that does not.

  Over all devices, in the first training stage; None: there is none. No batch
  is larger than the split.
  """
  shards = context.mesh.shape["data"]
  size = most = context.counts[programs.first_stage(context).split]
  fits, fails = None, None
  for _ in range(TRIES):
    if _with_batch(context, size).fits(context.chip):
      fits = size
    else:
      fails = size
    if fits == most:
      break
    middle = ((fits or 0) + fails) // 2 // shards * shards
    if middle <= (fits or 0):
      break
    size = middle
  return fits, fails


def _with_batch(context: programs.PlanContext, size: int) -> ResourceEstimate:
  config = context.config.copy_and_resolve_references()
  config.batch_size = size
  other = dataclasses.replace(context, config=config)
  return measure(programs.search(other), context.mesh)


def run(
  config: ml_collections.ConfigDict,
  where: str,
  console: console_lib.Console | None = None,
) -> bool:
  """Print the plan of a config; return whether it fits."""
  console = console or console_lib.Console()
  context = make_context(config, where)
  console.header(_describe(context, where))
  todo, found = programs.all_programs(context), []
  with console.progress("compile", len(todo), "program") as line:
    for program in todo:
      found.append(measure(program, context.mesh))
      line.update(len(found))
  _show_memory(console, context, found)
  _show_steps(console, context, found)
  _show_protocol(console, context, found)
  fits = all(estimate.fits(context.chip) for estimate in found)
  batch = None
  if config.solver != "exact":
    batch, too_large = largest_batch(context)
    console.note(_batch_line(context, batch, too_large), "batch")
  if fits:
    console.note("it fits", "verdict")
  else:
    console.note(_advice(context, found, batch), "verdict")
  return fits


def _describe(context: programs.PlanContext, where: str) -> list[str]:
  c, shape = context.tuner.config, context.mesh.shape
  pixels = "x".join(map(str, dict.fromkeys(c.image_size)))
  count = context.counts[context.loaded_splits["trainval"]]
  layout = context.on_device("trainval")
  each = layout.bytes_per_image
  size = units.format_bytes
  kept = (
    f"{count:,} images x {size(each)} = {size(count * each)} of"
    f" {'keys and values' if layout.projected else 'features'}, kept"
    f" {storage.FEATURE_STORAGE[context.storage]}"
    if context.stored
    else f"{count:,} images, through the backbone every step"
  )
  return [
    f"plan of {context.tuner.method} on {context.config.task}   ViT-{c.variant}"
    f" {checkpoints.without_secrets(context.config.init)}, {pixels} px,"
    f" {c.dtype}",
    f"{where}: {context.mesh.size} x {context.chip.name}, data"
    f" {shape['data']} x model {shape['model']},"
    f" {units.format_bytes(context.chip.memory)} each",
    f"{kept}, {context.reason}",
  ]


def _show_memory(console, context, found: Sequence[ResourceEstimate]) -> None:
  parts = ("weights", "data", "trials", "temporary")
  rows = []
  for estimate in found:
    memory = estimate.memory or {}
    sizes = [units.format_mib(memory.get(part)) for part in parts]
    share = estimate.total and f"{estimate.total / context.chip.memory:.0%}"
    rows.append(
      [
        estimate.program.name,
        f"{estimate.program.images:,}",
        estimate.program.trials,
        *sizes,
        units.format_mib(estimate.total),
        share or "too much",
      ]
    )
  columns = [
    "memory of a chip, MiB",
    "images",
    "at once",
    *parts,
    "all",
    "of it",
  ]
  console.table(columns, rows)


def _show_steps(console, context, found: Sequence[ResourceEstimate]) -> None:
  rows, collectives = [], []
  for estimate in found:
    seconds = estimate.seconds(context.chip)
    slowest = seconds and max(seconds, key=seconds.get)
    rows.append(
      [
        estimate.program.name,
        f"{estimate.flops / 1e9:,.1f}",
        units.format_mib(estimate.traffic),
        units.format_mib(estimate.sent),
        f"{1000 * seconds[slowest]:,.3f}" if seconds else "",
        slowest or "",
      ]
    )
    collectives += [
      [estimate.program.name, *row] for row in _collective_rows(estimate)
    ]
  columns = [
    "a step, of a chip",
    "GFLOP",
    "memory traffic, MiB",
    "sent, MiB",
    "ms at least",
    "bound by",
  ]
  console.table(columns, rows)
  columns = ["communication of a step", "", "times", "of", "MiB", "where"]
  if collectives:
    console.table(columns, collectives)


def _collective_rows(estimate: ResourceEstimate) -> list[list[str]]:
  """Return table rows: kind, times, dtypes, size and place of collectives."""
  rows, where = [], {}
  for each in estimate.collectives:
    inner = each.loops - (estimate.program.steps > 1)
    place = "each block" if inner > 0 else "once"
    key = (each.kind, "+".join(each.dtypes), place)
    times, size = where.get(key, (0, 0))
    times += each.times / estimate.program.steps
    where[key] = times, size + each.times * each.size / estimate.program.steps
  for (kind, dtypes, place), (times, size) in where.items():
    size = units.format_mib(size, 3)
    rows.append([kind, f"{times:.3g}", dtypes, size, place])
  return rows


def _show_protocol(console, context, found: Sequence[ResourceEstimate]) -> None:
  rows, total = [], 0.0
  for estimate in found:
    seconds = estimate.seconds(context.chip)
    if seconds is None:
      continue
    whole = estimate.program.in_all * max(seconds.values())
    total += whole
    rows.append(
      [estimate.program.name, f"{estimate.program.in_all:,}", f"{whole:,.2f}"]
    )
  if len(rows) == len(found):
    rows.append(["all", "", f"{total:,.2f}"])
  if rows:
    console.table(["whole protocol", "steps", "seconds at least"], rows)
  c = context.config
  if c.protocol == "best":
    beyond = grid.most(len(c.lr), len(c.weight_decay)) if c.extend_grid else 0
    console.note(
      "protocol=best adds a wider search, folds and seeds, which are not"
      f" counted here; of the search up to {beyond} settings are beyond the"
      " grid",
      "best",
    )


def _batch_line(context, fits: int | None, fails: int | None) -> str:
  if fits is None:
    return "no batch was found that fits"
  if fails is None:
    return f"{fits:,} images fit: all there are to train on"
  return f"{fits:,} images fit, {fails:,} do not"


def _model(context) -> str:
  """Return the flag for the least number of devices that share a backbone."""
  heads = context.tuner.config.num_heads
  parts = next(n for n in range(2, max(heads, 2) + 1) if heads % n == 0)
  return f"--config.mesh.model={parts}"


def _advice(
  context, found: Sequence[ResourceEstimate], batch: int | None
) -> str:
  """Return what does not fit, and what to change, by the largest part."""
  worst = max(found, key=lambda estimate: estimate.total or 2**63)
  name = worst.program.name
  parts = worst.memory or {"temporary": 1}
  largest = max(parts, key=parts.get)
  if largest == "weights":
    advice = f"spread the backbone: {_model(context)}, or more"
  elif largest == "data" and context.storage == "device":
    advice = "keep features elsewhere: --config.features=host"
  elif largest == "data" and context.storage == "images":
    advice = "read images in every epoch: --config.data=stream"
  elif name in ("extraction", "test"):
    advice = "run fewer images at once: --config.eval_batch_size="
    advice += str(max(1, worst.program.images // 2))
  elif context.tuner.editor and not context.config.remat:
    advice = "compute blocks again in the gradient: --config.remat=True"
  elif batch and batch < context.config.batch_size:
    advice = f"take a smaller batch: --config.batch_size={batch}"
  else:
    advice = f"take a larger slice, or {_model(context)}"
  estimate = (
    f"{units.format_mib(worst.total)} MiB"
    if worst.total
    else "more than there is"
  )
  return (
    f"it does not fit: {name} needs {estimate} of"
    f" {units.format_mib(context.chip.memory)} MiB a chip; {advice}"
  )
