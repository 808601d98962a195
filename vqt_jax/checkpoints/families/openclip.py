"""Image towers of OpenCLIP. (Those that are timm's are in `timm`.)

Settings are in `open_clip_config.json`.
"""

from vqt_jax.checkpoints.families import family
from vqt_jax.errors import UserError


def _settings(
  shapes: family.Shapes, configs: family.Configs, source: str
) -> family.Settings:
  config = configs.get("open_clip_config.json", {})
  model, images = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
  tower = model.get("vision_cfg", {})
  width = shapes["conv1.weight"][0]
  pooling = tower.get("pool_type", "tok")
  if pooling not in ("tok", "avg"):
    raise UserError(f"{source} pools by {pooling!r}; expected one of tok, avg.")
  if pooling == "avg":
    pooling = "mae" if tower.get("final_ln_after_pool") else "gap"
  norm, gelu = tower.get("norm_kwargs") or {}, "exact"
  if model.get("quick_gelu"):
    gelu = "quick"
  elif (tower.get("act_kwargs") or {}).get("approximate") == "tanh":
    gelu = "tanh"
  fields = {
    "pool_type": pooling,
    "layer_norm_epsilon": norm.get("eps", 1e-5),
    "gelu": gelu,
  }
  if tower:
    fields["num_heads"] = width // tower.get("head_width", 64)
  for key, field in (
    ("width", "width"),
    ("layers", "depth"),
    ("patch_size", "patch_size"),
  ):
    if key in tower:
      fields[field] = tower[key]
  value_range = "clip"
  if "mean" in images and "std" in images:
    value_range = family.name_scaling(images["mean"], images["std"], source)
  assumed = ("value_range",) * ("mean" not in images)
  assumed += ("gelu",) * (not model)
  return family.Settings(
    fields, value_range, tower.get("image_size"), assumed, antialias=True
  )


OPENCLIP = family.Family(
  name="an image tower of OpenCLIP",
  layout="openclip",
  patches="conv1.weight",
  fits=lambda shapes: "class_embedding" in shapes,
  top={
    "class_embedding": "cls",
    "positional_embedding": "pos_embedding",
    "conv1": "embedding",
    "ln_pre": "pre_norm",
    "ln_post": "Transformer/encoder_norm",
  },
  blocks="transformer.resblocks.",
  block={
    "ln_1": family.NORM_0,
    "attn.in_proj_": family.QKV,
    "attn.out_proj": family.OUT,
    "ls_1.gamma": family.OUT_SCALE,
    "ln_2": family.NORM_1,
    "mlp.c_fc": family.DENSE_0,
    "mlp.c_proj": family.DENSE_1,
    "ls_2.gamma": family.DENSE_1_SCALE,
  },
  settings=_settings,
  left_out=(*family.OTHER_TOWER, r"proj"),
  optional="embedding/bias",
)
