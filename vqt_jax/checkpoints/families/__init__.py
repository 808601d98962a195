"""ViTs of transformers, timm and OpenCLIP, as weights of our encoder.

To add a family, write a `family.Family` in a module of its own or beside its
relatives, and list it in `known.FAMILIES`.
"""

from vqt_jax.checkpoints.families.known import FAMILIES
from vqt_jax.checkpoints.families.reading import inspect
from vqt_jax.checkpoints.families.reading import recognise

__all__ = ["FAMILIES", "inspect", "recognise"]
