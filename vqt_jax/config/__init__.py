"""Configs: fields, the recipes that fill them, and their checks.

A config file builds on `default_config`, and reads the string after its name's
colon with `parse_arg`.
"""

from vqt_jax.config.fields import default_config
from vqt_jax.config.fields import parse_arg

__all__ = ["default_config", "parse_arg"]
