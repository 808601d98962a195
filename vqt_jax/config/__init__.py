"""Configs: the table of fields, presets and recipes, checks, config files.

A config file builds on `default_config` and reads its string argument with
`parse_arg`.
"""

from vqt_jax.config.config_dict import default_config
from vqt_jax.config.files import parse_arg

__all__ = ["default_config", "parse_arg"]
