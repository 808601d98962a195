"""Pre-trained ViTs in and out: files, their formats, and where they are."""

from vqt_jax.checkpoints.architecture import check_finite
from vqt_jax.checkpoints.architecture import check_floats
from vqt_jax.checkpoints.containers import local_path
from vqt_jax.checkpoints.download import without_secrets
from vqt_jax.checkpoints.folders import fetch_folder
from vqt_jax.checkpoints.folders import is_address
from vqt_jax.checkpoints.hub import find_cached
from vqt_jax.checkpoints.hub_upload import upload
from vqt_jax.checkpoints.load import load_backbone
from vqt_jax.checkpoints.load import read_config
from vqt_jax.checkpoints.positions import check_image_size
from vqt_jax.checkpoints.positions import size_from_fields
from vqt_jax.checkpoints.public import PUBLIC
from vqt_jax.checkpoints.public import find_name
from vqt_jax.checkpoints.save import save_backbone
from vqt_jax.checkpoints.save import save_npz

__all__ = [
  "PUBLIC",
  "check_finite",
  "check_floats",
  "check_image_size",
  "fetch_folder",
  "find_cached",
  "find_name",
  "is_address",
  "load_backbone",
  "local_path",
  "read_config",
  "save_backbone",
  "save_npz",
  "size_from_fields",
  "upload",
  "without_secrets",
]
