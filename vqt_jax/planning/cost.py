"""Compiles programs ahead of time and counts their operations.

A compiler's own cost analysis counts the body of a loop once; here and in `hlo`
it counts once per iteration. The devices themselves are not needed.
"""

from collections.abc import Callable
import math
import re
from typing import Any

import jax
from jax.extend import core


class Exceeds(Exception):
  """Raised if a program does not fit into the devices' memory.

  Attributes:
    needed: bytes on each device, if the compiler tells; else None.
  """

  def __init__(self, needed: int | None):
    super().__init__(f"{needed} bytes")
    self.needed = needed


def compile_for(
  mesh: jax.sharding.Mesh, function: Callable[..., Any], *args: Any
) -> jax.stages.Compiled:
  """Compile a jitted function ahead of time for the devices of a mesh.

  Args:
    mesh: its devices need not be there.
    function: made by `jax.jit`.
    *args: its arguments, or `jax.ShapeDtypeStruct` with shardings.

  Raises:
    Exceeds: it does not fit.
  """
  with jax.set_mesh(mesh):
    lowered = function.lower(*args)
    try:
      return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      size = re.search(
        r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT])", str(e)
      )
      if not size:
        raise Exceeds(None) from e
      number, unit = (x for x in size.groups() if x)
      power = 10 * (1 + "KMGT".index(unit))
      raise Exceeds(int(float(number) * 2**power)) from e


def matmuls(
  function: Callable[..., Any], *args: Any, trips: int | None = None
) -> int:
  """Count operations of all matrix products and convolutions of one call.

  2 per multiply-add, over all devices; the body of a scan times its length.

  Args:
    function: made by `jax.jit`.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`.
    trips: of a loop whose length is an argument.

  Raises:
    ValueError: a product sits in such a loop, and `trips` is not given.
  """
  return _of_jaxpr(function.trace(*args).jaxpr.jaxpr, trips)


def _of_jaxpr(jaxpr: core.Jaxpr, trips: int | None) -> int:
  return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation, trips) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    inner = math.prod(left[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = math.prod(kernel) // out_features
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name.startswith("dot_product_attention_"):  # cuDNN's.
    batch, tokens, heads, size = equation.invars[0].aval.shape
    products = 2 if "_fwd_" in name else 5  # Scores are computed again.
    return products * 2 * batch * heads * tokens**2 * size
  counts = [
    _of_jaxpr(getattr(inner, "jaxpr", inner), trips)
    for value in params.values()
    for inner in (value if isinstance(value, (tuple, list)) else (value,))
    if isinstance(inner, (core.Jaxpr, core.ClosedJaxpr))
  ]
  if name == "while" and any(counts):
    if trips is None:
      raise ValueError("A matrix product sits in a loop of unknown length.")
    return sum(counts) * trips
  if name == "cond":
    return max(counts)
  if name == "shard_map":  # Its shapes are those of a device's part.
    axes = params["newly_manual_axes"]
    return sum(counts) * math.prod(params["mesh"].shape[x] for x in axes)
  return sum(counts) * (params["length"] if name == "scan" else 1)
