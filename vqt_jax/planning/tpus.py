"""Slices of TPUs by name, and the figures of their chips.

Sources: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and, for
the links of v4, https://arxiv.org/abs/2304.01433 (six of 50 GB/s each way).
Memory is what the compiler of libtpu 0.0.42 lets a program use. The rate of
links is one way, over all links of a chip.
"""

import dataclasses
import importlib.metadata
import os
from typing import Any

import jax
from jax.experimental import topologies

from vqt_jax import errors
from vqt_jax.runtime import devices as devices_lib
from vqt_jax.runtime import memory as memory_lib

GIB = 2**30
HERE = "here"
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
  "2x2x1",
  "2x2x2",
  "2x2x4",
  "2x4x4",
  "4x4x4",
  "4x4x8",
  "4x8x8",
  "8x8x8",
  "8x8x16",
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of a chip.

  Attributes:
    name: on the terminal.
    memory: bytes that programs may use.
    host_memory: bytes of its host, divided by the host's chips.
    flops: bfloat16 operations per second; None: not known.
    bandwidth: bytes per second to and from its memory; None: not known.
    links: bytes per second that it sends to other chips; None: not known.
    slices: topologies that exist.
    options: of `topologies.get_topology_desc`.
  """

  name: str
  memory: int
  host_memory: int
  flops: float | None = None
  bandwidth: float | None = None
  links: float | None = None
  slices: tuple[str, ...] = ()
  options: tuple[tuple[str, Any], ...] = ()


_MEGACORE = (("chip_config_name", "megacore"),)  # Two cores are one device.
CHIPS = {
  "v4": Chip(
    "TPU v4",
    int(30.75 * GIB),
    101 * GIB,
    275e12,
    1.2e12,
    300e9,
    _DEEP,
    _MEGACORE,
  ),
  "v5e": Chip(
    "TPU v5e", int(15.75 * GIB), 64 * GIB, 197e12, 819e9, 200e9, _FLAT
  ),
  "v5p": Chip(
    "TPU v5p",
    int(95.74 * GIB),
    112 * GIB,
    459e12,
    2.765e12,
    600e9,
    _DEEP,
    _MEGACORE,
  ),
  "v6e": Chip(
    "TPU v6e", int(31.25 * GIB), 192 * GIB, 918e12, 1.6e12, 400e9, _FLAT
  ),
}


def find(where: str) -> tuple[Chip, list[jax.Device]]:
  """Return chip and devices of a slice, e.g. "v5e:4x4", or of "here".

  Devices of a slice need not be there: programs can only be compiled for them,
  with libtpu's compiler. To be called before JAX looks for devices.

  Raises:
    UserError: there is no such slice, or no libtpu.
  """
  if where == HERE:
    return _here()
  generation, _, shape = where.partition(":")
  if generation not in CHIPS:
    raise errors.unknown_name("kind of TPU", generation, [*CHIPS, HERE])
  chip = CHIPS[generation]
  if shape not in chip.slices:
    raise errors.UserError(
      f"Unknown slice {where!r}. There are:"
      f" {', '.join(f'{generation}:{x}' for x in chip.slices)}."
    )
  jax.config.update("jax_platforms", "cpu")  # The compiler is asked by name.
  os.environ.update(
    {
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Others may use the chips meanwhile.
    }
  )
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  options = dict(chip.options)
  if shape == "1x1":
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    slice_ = topologies.get_topology_desc(
      platform="tpu", topology_name=where, **options
    )
  except RuntimeError as e:
    raise errors.UserError(_trouble(where, e)) from e
  return chip, list(slice_.devices)


def _here() -> tuple[Chip, list[jax.Device]]:
  devices_lib.find_devices()
  devices = jax.devices()
  kind, count = devices[0].device_kind, jax.local_device_count()
  known = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
  }
  chip = CHIPS[known[kind]] if kind in known else Chip(kind, 0, 0)
  return dataclasses.replace(
    chip,
    memory=memory_lib.device_memory(),
    host_memory=memory_lib.host_memory() // count,
  ), devices


def _trouble(where: str, error: RuntimeError) -> str:
  if "not installed" not in str(error):
    return f"The compiler for TPUs does not take {where}: {error}"
  wanted = [x for x in importlib.metadata.requires("jax") if "libtpu" in x]
  package = wanted[0].split(";")[0].strip()
  return (
    "libtpu, which holds the compiler for TPUs, is not installed. Get it"
    f' with: pip install --no-deps --target /tmp/libtpu "{package}" and put'
    " PYTHONPATH=/tmp/libtpu before this command."
  )
