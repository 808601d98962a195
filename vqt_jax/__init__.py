"""Visual query tuning of frozen Vision Transformers, in JAX and Flax."""

import os

# Errors only from the C++ code of JAX and TensorFlow, which reads it at import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from etils import epy

from vqt_jax.errors import UserError
from vqt_jax.version import __version__

with epy.lazy_api_imports(globals()):  # At first use: JAX takes a second.
  from vqt_jax.checkpoints import load_backbone
  from vqt_jax.checkpoints import save_backbone
  from vqt_jax.checkpoints import save_npz
  from vqt_jax.classifier import Classifier
  from vqt_jax.experiments.train import train
  from vqt_jax.models.backbone import Backbone
  from vqt_jax.models.tuner import Output
  from vqt_jax.models.tuner import Tuner
  from vqt_jax.models.tuner import apply
  from vqt_jax.models.tuner import make_tuner
  from vqt_jax.models.vit import Stream
  from vqt_jax.models.vit_config import ViTConfig
  from vqt_jax.tuned.model import Model
  from vqt_jax.tuned.model import Models
  from vqt_jax.tuned.model import load

__all__ = [
  "Backbone",
  "Classifier",
  "Model",
  "Models",
  "Output",
  "Stream",
  "Tuner",
  "UserError",
  "ViTConfig",
  "__version__",
  "apply",
  "load",
  "load_backbone",
  "make_tuner",
  "save_backbone",
  "save_npz",
  "train",
]
