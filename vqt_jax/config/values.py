"""Values of fields: names, types, and conversion."""

from collections.abc import Sequence
import os
from typing import Any

from ml_collections import ConfigDict

from vqt_jax import errors

_TYPE_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "text",
}


def check_field(name: str, defaults: ConfigDict) -> Any:
  """The default of a field, e.g. "num_queries" or "splits.train".

  Raises:
    UserError: no such field, with the nearest ones.
  """
  fields = flatten(defaults)
  inside = [f"config.{f}" for f in fields if f.startswith(f"{name}.")]
  if inside:
    raise errors.UserError(
      f"config.{name} is a group of fields; set {', '.join(inside)}."
    )
  if name not in fields:
    alike = [field for field in fields if "." in name or "." not in field]
    raise errors.unknown_name("config field", name, alike)
  return fields[name]


def expected(default: Any) -> str:
  """What a field with this default takes, in words."""
  if isinstance(default, tuple):
    kind = {bool: "true or false", int: "whole numbers", float: "numbers"}
    kind = kind[type(default[0])]
    if len(default) == 1:
      return f"{kind} separated by commas"
    return f"{kind} separated by commas, e.g. {default[0]},{default[1]}"
  return _TYPE_NAMES[type(default)]


def flatten(config: ConfigDict | dict) -> dict[str, Any]:
  """Field -> value, with names such as "splits.train"."""
  flat = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def convert(name: str, value: Any, like: Any) -> Any:
  """A value as its field holds it.

  Args:
    name: of the field.
    value: of the field's type, or what stands for it: a scalar or array of
      NumPy or JAX, a whole number for a number, a path for text; for a tuple
      any sequence, or one element.
    like: a value of the field.

  Raises:
    UserError: it is of another type.
  """
  found = value
  if hasattr(value, "tolist"):
    value = value.tolist()
  if not isinstance(like, tuple):
    converted = _scalar(value, type(like))
    fine = converted is not None
  else:
    if isinstance(value, str) or not isinstance(value, Sequence):
      value = (value,)
    converted = tuple(_scalar(x, type(like[0])) for x in value)
    fine = converted and None not in converted
  if not fine:
    found = " ".join(repr(found).split())
    raise errors.UserError(
      f"config.{name}: expected {expected(like)}, found {found}."
    )
  return converted


def _scalar(value: Any, kind: type) -> Any:
  """A value as a bool, int, float or str; None where it is none."""
  if kind is str and isinstance(value, os.PathLike):
    value = os.fspath(value)
  if kind is float and type(value) is int:
    value = float(value)
  return kind(value) if type(value) is kind else None
