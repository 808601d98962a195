"""A config as a ConfigDict, and as JSON."""

from collections.abc import Mapping
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections import FieldReference

from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.config import values as values_lib


class Config(ConfigDict):
  """A ConfigDict that checks the names and types of its fields.

  Values are converted to the type of their field, see `values.convert`; a group
  of fields can be set to a dict of those that change.

  Raises, when a field is set:
    UserError: there is no such field, or the value is of another type.
  """

  def __init__(self, *args: Any, group: str = "", **kwargs: Any):
    """Initialise like a ConfigDict."""
    object.__setattr__(self, "_group", group)
    super().__init__(*args, **kwargs)

  def __setitem__(self, name: str, value: Any) -> None:
    full_name = self._group + name
    if name not in self and self.is_locked:
      fields.find(full_name)
    group, dot, rest = name.partition(".")
    if dot:
      self[group][rest] = value
      return
    if name not in self:
      if hasattr(value, "items"):
        value = Config(value, group=f"{full_name}.")
    elif isinstance(self[name], Config):
      if not hasattr(value, "items"):
        fields.find(full_name)  # Raises: it is a group.
      self[name].update(value)
      return
    elif not isinstance(value, FieldReference):
      value = values_lib.convert(full_name, value, self[name])
    super().__setitem__(name, value)

  def update(self, *other: Any, **changes: Any) -> None:
    """Set fields, those of a group one by one."""
    for name, value in dict(*other, **changes).items():
      self[name] = value


def default_config() -> Config:
  """Return a config with the default of every field, see `fields.FIELDS`."""
  config = Config()
  for name, field in fields.FIELDS.items():
    group, dot, _ = name.partition(".")
    if dot and group not in config:
      config[group] = {}
    config[name] = field.default
  return config.lock()


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Return field -> value, with names such as "splits.train"."""
  flat = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Return a config as JSON preserves it: plain dicts, lists and scalars."""
  return json.loads(json.dumps(config.to_dict()))


def drop_retired(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Flatten a config and drop fields that no longer exist.

  Raises:
    UserError: such a field has a value whose effect is gone as well.
  """
  flat = flatten(config)
  for name, supported in fields.RETIRED.items():
    value = flat.pop(name, supported)
    value = tuple(value) if isinstance(value, list) else value
    if supported is not None and value != supported:
      raise errors.UserError(
        f"config.{name}={value}: this field no longer exists, and every run has"
        f" {supported} instead. Leave it out, or use the version of vqt_jax"
        " that wrote this config."
      )
  return flat


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Compare two results of `to_json`: field -> (old, new) where they differ.

  In the old one, written by an earlier version, fields may be missing, which
  have their default then (but all was trained by gradients before there was
  `solver`), and there may be fields that no longer exist.
  """
  new = flatten(new)
  missing = flatten(to_json(default_config()))
  if new.get("solver"):
    missing["solver"] = "gradient"
  old = missing | drop_retired(old)
  return {
    name: (old.get(name), new.get(name))
    for name in {**old, **new}
    if old.get(name) != new.get(name)
  }
