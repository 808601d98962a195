"""The families that are read and written."""

from vqt_jax.checkpoints.families import hugging_face
from vqt_jax.checkpoints.families import openclip
from vqt_jax.checkpoints.families import timm

# The first one that fits a file is taken.
FAMILIES = (
  hugging_face.VIT,
  hugging_face.DINOV2,
  hugging_face.DINOV2_GATED,
  hugging_face.DINOV3,
  hugging_face.DINOV3_GATED,
  hugging_face.CLIP,
  hugging_face.SIGLIP,
  timm.CLIP,
  timm.VIT,
  timm.VIT_GATED,
  timm.DINOV3,
  timm.DINOV3_GATED,
  openclip.OPENCLIP,
)
