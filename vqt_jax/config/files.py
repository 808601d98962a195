"""Config files: their names, their string arguments, and loading them."""

import glob
from importlib import resources
import importlib.machinery
import importlib.util
import os
import re
import sys
from typing import Any

from ml_collections import ConfigDict

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import values as values_lib
from vqt_jax.runtime import files


def load(name: str) -> ConfigDict:
  """Load a config file.

  Args:
    name: FILE, or FILE:ARGUMENT, which is passed to the file's `get_config`; of
      a file in `vqt_jax/configs` its name is enough. Also the `config.json` of
      a run.

  Raises:
    UserError: there is no such file, or it fails to return a ConfigDict.
  """
  if name.endswith(".json"):
    return _load_json(name)
  name, colon, argument = name.partition(":")
  path = find(name)
  loader = importlib.machinery.SourceFileLoader("config_file", path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module
  try:
    loader.exec_module(module)
    config = module.get_config(*([argument] if colon else []))
  except errors.UserError:
    raise
  except Exception as e:  # A config file is a program: anything can happen.
    raise errors.UserError(
      f"Cannot load {path}: {type(e).__name__}: {e}."
    ) from e
  if not isinstance(config, ConfigDict):
    raise errors.UserError(
      f"{path}: expected get_config() to return a ConfigDict, found"
      f" {type(config).__name__}."
    )
  return config


def _load_json(name: str) -> ConfigDict:
  """Load a config that a run wrote."""
  found = files.read_json(name)
  if not isinstance(found, dict):
    raise errors.UserError(f"{name}: expected the config.json of a run.")
  config = config_dict.default_config()
  config.update(config_dict.drop_retired(found))
  return config


def find(name: str) -> str:
  """Return the path of a config file.

  Raises:
    UserError: there is no such file; the message suggests others.
  """
  path = os.path.expanduser(name)
  if os.path.isfile(path):
    return path
  shipped = {
    file.name: str(file)
    for file in (resources.files("vqt_jax") / "configs").iterdir()
    if file.name.endswith(".py")
  }
  short = re.sub("^configs/", "", name)
  for file_name in (short, f"{short}.py"):
    if file_name in shipped:
      return shipped[file_name]
  folder = os.path.dirname(path) or "configs"
  known = set(glob.glob(f"{glob.escape(folder)}/*.py"))
  if not known or folder == "configs":
    known.update(f"configs/{file_name}" for file_name in shipped)
  raise errors.unknown_name("config file", name, sorted(known))


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
  """Parse a config file's string argument, `name=value,name=value`.

  A name whose default is a tuple takes all values up to the next name:
  `names=a,b,c,name=value`.

  Args:
    arg: the text after the colon in `--config FILE:ARGUMENT`, or None.
    **defaults: name -> default, which also decides the type of the value.

  Returns:
    The defaults, updated by the argument.

  Raises:
    UserError: an unknown name, or a value of another type.
  """
  booleans = {"true": True, "1": True, "false": False, "0": False}
  values, name = dict(defaults), ""
  for part in filter(None, (arg or "").split(",")):
    if "=" not in part and isinstance(defaults.get(name), tuple):
      values[name] += (part.strip(),)
      continue
    name, equals, text = (x.strip() for x in part.partition("="))
    if name not in defaults:
      raise errors.unknown_name("config argument", name, defaults)
    kind = type(defaults[name])
    if kind is tuple and equals:
      values[name] = (text,) if text else ()
      continue
    try:
      if not equals:
        raise ValueError("no value")
      values[name] = booleans[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as e:
      raise errors.UserError(
        f"Config argument {part!r}: expected {name}=value, with"
        f" {values_lib.describe_type(defaults[name])} as the value."
      ) from e
  return values
