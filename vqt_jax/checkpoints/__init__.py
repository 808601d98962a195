"""Pre-trained ViTs in and out: Big Vision and vision_transformer files."""

from vqt_jax.checkpoints.load import load_backbone
from vqt_jax.checkpoints.load import read_config
from vqt_jax.checkpoints.public import PUBLIC
from vqt_jax.checkpoints.resize import check_image_size
from vqt_jax.checkpoints.save import save_npz

__all__ = [
    "PUBLIC",
    "check_image_size",
    "load_backbone",
    "read_config",
    "save_npz",
]
