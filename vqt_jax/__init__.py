"""Visual query tuning of frozen Vision Transformers, in JAX and Flax."""

from vqt_jax import train
from vqt_jax.backbone import Backbone
from vqt_jax.checkpoints import load_backbone
from vqt_jax.checkpoints import save_npz
from vqt_jax.errors import UserError
from vqt_jax.tuner import Output
from vqt_jax.tuner import Tuner
from vqt_jax.tuner import apply
from vqt_jax.tuner import make_tuner
from vqt_jax.vit import Stream
from vqt_jax.vit import ViTConfig

__all__ = [
    "Backbone",
    "Output",
    "Stream",
    "Tuner",
    "UserError",
    "ViTConfig",
    "apply",
    "load_backbone",
    "make_tuner",
    "save_npz",
    "train",
]
