"""Values of fields: their types, in words, and their conversion."""

from collections.abc import Sequence
import os
from typing import Any

from vqt_jax import errors

_SINGULAR = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "text",
}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}


def describe_type(default: Any) -> str:
  """Name the type of a value in words, e.g. "a whole number".

  Args:
    default: a value of this type; a tuple stands for one element or more, and
      its own elements for theirs.
  """
  if isinstance(default, tuple):
    return f"{_PLURAL[type(default[0])]} separated by commas"
  return _SINGULAR[type(default)]


def convert(name: str, value: Any, default: Any) -> Any:
  """Convert a value to the type of its field.

  Args:
    name: of the field.
    value: of this type, or a value that stands for one: a scalar or an array of
      NumPy or JAX, a whole number for a number, a path for text; for a tuple
      any sequence, or a single element.
    default: a value of this type.

  Raises:
    UserError: it cannot be converted.
  """
  found = value
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(default, tuple):
    if isinstance(value, str) or not isinstance(value, Sequence):
      value = (value,)
    converted = tuple(_convert_scalar(x, type(default[0])) for x in value)
    valid = converted and None not in converted
  else:
    converted = _convert_scalar(value, type(default))
    valid = converted is not None
  if not valid:
    found = " ".join(repr(found).split())
    raise errors.UserError(
      f"config.{name}: expected {describe_type(default)}, found {found}."
    )
  return converted


def _convert_scalar(value: Any, kind: type) -> Any:
  """Return a value as a bool, int, float or str; None if it is no such."""
  if kind is str and isinstance(value, os.PathLike):
    value = os.fspath(value)
  if kind is float and type(value) is int:
    value = float(value)
  return kind(value) if type(value) is kind else None
