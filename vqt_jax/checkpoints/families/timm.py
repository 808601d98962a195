"""Vision Transformers of timm: `vision_transformer.py`, and DINOv3 of `eva.py`.

Its `config.json` has the name of the architecture, `pretrained_cfg` with mean,
deviation and size of images, and what differs from the architecture. What that
name stands for is in the tables here.
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import math
import re
from typing import Any

from vqt_jax.checkpoints.families import family
from vqt_jax.errors import UserError
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import scaling

# Architectures whose tensors do not show that they are no plain ViTs: rotary
# positions, norms behind their operations.
_REFUSED = re.compile(
  r"(?!vit_|deit3?_|flexivit_)|.*(_pe_|rope|relpos|rpn|_xp_)"
)
_TANH = re.compile(
  r"vit_(base_patch32|(so400m|giantopt)_patch16)_siglip_"
  r"|vit_large_patch16_siglip_(gap_)?512"
)
# Arguments that are read here, that tensors show, or that only training uses.
_READ = re.compile(
  "img_size|patch_size|in_chans|num_classes|global_pool|embed_dim|depth"
  "|num_heads|num_kv_heads|mlp_ratio|qkv_bias|qkv_fused|qk_norm"
  "|scale_attn_norm|scale_mlp_norm|scale_mlp|scale_attn_inner|proj_bias"
  "|init_values|attn_only_layer_scale|class_token|pos_embed|no_embed_class"
  "|reg_tokens|num_reg_tokens|pre_norm|final_norm|fc_norm|use_fc_norm"
  "|dynamic_img_size|strict_img_size|drop_rate|pos_drop_rate|patch_drop_rate"
  "|proj_drop_rate|attn_drop_rate|drop_path_rate|weight_init|fix_init"
  "|embed_norm_layer|act_layer|mlp_layer|swiglu_mlp|swiglu_align_to|attn_type"
  "|use_abs_pos_emb|use_post_norm|use_pre_transformer_norm"
  "|use_post_transformer_norm|ref_feat_shape|rope_rotate_half|rope_temperature"
  "|rope_shift_coords|rope_jitter_coords|rope_rescale_coords|head_init_scale"
  "|attn_pool_mlp_ratio|model_name|pretrained"
)
# Others -> the values that they have in the models that are read.
_ONLY = {
  "use_rot_pos_emb": True,
  "rope_type": "dinov3",
  "rope_grid_indexing": "ij",
}
_POOLING = {"token": "tok", "avg": "gap", "map": "map"}
# Width -> attention heads.
_HEADS = {
  **{192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 832: 13},
  **{896: 14, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16},
}
_DINOV3_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}


def _settings(
  shapes: family.Shapes,
  configs: family.Configs,
  source: str,
  *,
  gated: bool = False,
  rotary: bool = False,
) -> family.Settings:
  """Read the settings of a ViT, of timm's repositories or OpenCLIP's.

  Args:
    shapes: relative name -> shape.
    configs: by file name.
    source: name in errors.
    gated: whether MLPs are.
    rotary: whether it is DINOv3.

  Raises:
    UserError: the architecture is no plain ViT.
  """
  config = configs.get("config.json", {})
  if "open_clip_config.json" in configs and "architecture" not in config:
    config = _from_open_clip(configs["open_clip_config.json"])
  name = str(config.get("architecture", ""))
  args = config.get("model_args", {})
  pooling = config.get("global_pool", args.get("global_pool"))
  images = config.get("pretrained_cfg", config)
  if name and _REFUSED.match(name):
    raise UserError(
      f"{source} is a {name}, which is not a plain ViT; take a vit_* of timm"
      " without relative or rotary positions, or a DINOv3."
    )
  only = _ONLY if rotary else {}
  for key, value in args.items():
    # None, False and 0 switch off whatever there is.
    fits = value == only[key] if key in only else not value
    if not fits and not _READ.fullmatch(key):
      raise UserError(
        f"{source} was made with {key}={value!r} by its config, which is not"
        " read: take a model without it."
      )
  if "attn_pool.latent" in shapes and (rotary or "fc_norm.weight" in shapes):
    raise UserError(
      f"{source} pools by attention before its last LayerNorm, or over its"
      " class token and registers: expected attention pooling of a vit_*."
    )
  width = shapes["patch_embed.proj.weight"][0]
  clip_like = "norm_pre.weight" in shapes or "_clip_" in name
  clip_norms = "_clip_" in name if name else clip_like
  fields = {
    "gated_mlp": gated,
    "layer_norm_epsilon": 1e-5 if rotary or clip_norms else 1e-6,
  }
  heads = _DINOV3_HEADS if rotary else _HEADS | {1536: 24 if gated else 16}
  if "num_heads" in args:
    fields["num_heads"] = args["num_heads"]
  elif name == "vit_base_patch16_gap_224":
    fields["num_heads"] = 16
  elif width in heads and "embed_dim" not in args:  # Else its own are kept.
    fields["num_heads"] = heads[width]
  if rotary:
    fields["posemb"] = "rope"
    fields["rope_theta"] = args.get("rope_temperature", 100.0)
  if pooling:
    if pooling not in _POOLING:
      raise UserError(
        f"{source} pools by {pooling!r}; expected one of {', '.join(_POOLING)}."
      )
    fields["pool_type"] = _POOLING[pooling]
  if "fc_norm.weight" in shapes and pooling in (None, "", "avg"):
    fields["pool_type"] = "mae"
  activation = "quick_gelu" if "quickgelu" in name else "gelu"
  if _TANH.match(name):
    activation = "gelu_tanh"
  if gated and args.get("act_layer") not in (None, "silu", "swish"):
    raise UserError(
      f"The gated MLPs of {source} have the activation {args['act_layer']!r};"
      " expected silu."
    )
  if not gated:
    activation = args.get("act_layer") or activation
    fields["gelu"] = family.find_gelu(activation, source)
  assumed = () if name or gated else ("gelu",)
  if "mean" in images and "std" in images:
    value_range = family.name_scaling(images["mean"], images["std"], source)
  else:
    value_range = "clip" if clip_like else "imagenet" if rotary else "-1..1"
    assumed += ("value_range",)
  size = images.get("input_size")
  return family.Settings(
    fields,
    value_range,
    size[1:] if size else None,
    assumed,
    antialias=True,
    # All registered ones rotate halves; the default of `Eva` is neighbours.
    interleaved=rotary
    and not args.get("rope_rotate_half", width in _DINOV3_HEADS),
  )


def _from_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the content of timm's config.json for a tower of OpenCLIP."""
  tower = config.get("model_cfg", {}).get("vision_cfg", {})
  images = dict(config.get("preprocess_cfg", {}))
  if size := tower.get("image_size"):
    images["input_size"] = [
      3,
      *(size if isinstance(size, list) else [size] * 2),
    ]
  return {
    "architecture": tower.get("timm_model_name", ""),
    "global_pool": tower.get("timm_pool"),
    "model_args": tower.get("timm_model_kwargs") or {},
    "pretrained_cfg": images,
  }


_TOP = {
  "cls_token": "cls",
  "reg_token": "registers",
  "pos_embed": "pos_embedding",
  "patch_embed.proj": "embedding",
  "norm_pre": "pre_norm",
  "norm": "Transformer/encoder_norm",
  "fc_norm": "Transformer/encoder_norm",
  "attn_pool.latent": f"{family.MAP}/probe",
  "attn_pool.q": f"{family.MAP}/{family.QUERY}",
  "attn_pool.kv": tuple(
    f"{family.MAP}/{leaf}" for leaf in (family.KEY, family.VALUE)
  ),
  "attn_pool.proj": f"{family.MAP}/{family.OUT}",
  "attn_pool.norm": f"{family.MAP}/{family.NORM_0}",
  "attn_pool.mlp.fc1": f"{family.MAP}/{family.DENSE_0}",
  "attn_pool.mlp.fc2": f"{family.MAP}/{family.DENSE_1}",
  "head": "head",
}
_BLOCK = {
  "norm1": family.NORM_0,
  "attn.qkv": family.QKV,
  "attn.proj": family.OUT,
  "ls1.gamma": family.OUT_SCALE,
  "norm2": family.NORM_1,
  "mlp.fc1": family.DENSE_0,
  "mlp.fc2": family.DENSE_1,
  "ls2.gamma": family.DENSE_1_SCALE,
}


# Our names of activations -> timm's.
_GELUS = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


def _outline(
  backbone: backbone_lib.Backbone, zeros: Collection[str]
) -> family.Outline:
  """Describe a backbone as an architecture of timm with other arguments.

  Some arguments are classes or functions, which a file cannot hold: they are
  those of the architecture.

  Args:
    backbone: to be written.
    zeros: see `Family`.
  """
  c, rotary = backbone.config, backbone.config.posemb == "rope"
  pooling = {theirs: name for name, theirs in _POOLING.items()}
  pooling = {**pooling, "mae": "avg"}.get(c.pool_type, "token")
  packed = c.gated_mlp and not rotary
  norm_after_pooling = c.pool_type == "mae"
  args = {
    "img_size": c.image_size,
    "patch_size": c.patch_size,
    "embed_dim": c.width,
    "depth": c.depth,
    "num_heads": c.num_heads,
    "mlp_ratio": _ratio(c.mlp_dim * (2 if packed else 1), c.width),
    "class_token": c.has_class_token,
    "global_pool": pooling,
  }
  biases = {f"{name}/bias" for name in (family.QUERY, family.VALUE)}
  if rotary:
    has_bias = not biases <= set(zeros)
    name = "vit_small_plus" if c.gated_mlp else "vit_small"
    name += "_patch16_dinov3"
    args |= {
      "num_reg_tokens": c.registers,
      "qkv_bias": has_bias,
      "rope_rotate_half": True,
      "use_fc_norm": norm_after_pooling,
    }
    if c.gated_mlp:
      args["swiglu_align_to"] = 1
  else:
    name = "vit_base_patch16_224"
    if c.gated_mlp:
      name = "vit_giant_patch14_reg4_dinov2"
    elif c.layer_norm_epsilon == 1e-5:
      name = "vit_base_patch16_clip_224"
    if not c.gated_mlp:
      args["act_layer"] = _GELUS[c.gelu]
    args |= {
      "reg_tokens": c.registers,
      "no_embed_class": c.registers > 0,
      "pre_norm": c.pre_norm,
      "fc_norm": norm_after_pooling,
      "init_values": None,
    }
  absent = {
    r"cls_token": not c.has_class_token,
    r"reg_token": not c.registers,
    r"pos_embed|ls[12]\.gamma|attn\.qkv\.bias": rotary,
    r"attn\.[qv]_bias": rotary and not has_bias,
    r"mlp\.fc1\..*": rotary and c.gated_mlp,
    r"mlp\.fc1_[gx]\..*": not c.gated_mlp,
    r"ls[12]\.gamma": True,
    r"patch_embed\.proj\.bias": c.pre_norm,
    r"norm_pre\..*": not c.pre_norm,
    r"norm\..*": norm_after_pooling,
    r"fc_norm\..*": not norm_after_pooling,
    r"attn_pool\..*": c.pool_type != "map",
    r"head\..*": not c.num_classes,
  }
  mean, std = scaling.find_scaling(backbone.value_range)
  config = {
    "architecture": name,
    "num_classes": c.num_classes or 0,
    "num_features": c.width,
    "global_pool": pooling,
    "model_args": args,
    "pretrained_cfg": {
      "mean": mean,
      "std": std,
      "input_size": (3, *c.image_size),
      "interpolation": "bilinear",
      "crop_pct": 1.0,
      "num_classes": c.num_classes or 0,
      "first_conv": "patch_embed.proj",
      "classifier": "head",
    },
  }
  return family.Outline(
    {"config.json": config},
    absent=tuple(name for name, is_so in absent.items() if is_so),
    class_position=c.has_class_token and not c.registers,
  )


def _ratio(hidden: int, width: int) -> float:
  """The number of which timm's `int(width * ratio)` is the hidden size."""
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else math.nextafter(ratio, 1e9)


def _is_packed(shapes: family.Shapes) -> bool:
  """Return whether the first layer of MLPs holds their gate as well."""
  first = shapes.get("blocks.0.mlp.fc1.weight", (0,))
  second = shapes.get("blocks.0.mlp.fc2.weight", (0, 0))
  return len(second) == 2 and first[0] == 2 * second[1] > 0


def _is_dinov3(shapes: family.Shapes) -> bool:
  return "pos_embed" not in shapes and "blocks.0.gamma_1" in shapes


VIT = family.Family(
  name="a ViT of timm",
  layout="timm-vit",
  patches="patch_embed.proj.weight",
  top=_TOP,
  blocks="blocks.",
  block=_BLOCK,
  settings=_settings,
  fits=lambda shapes: not _is_packed(shapes) and not _is_dinov3(shapes),
  left_out=(*family.OTHER_TOWER, r"/visual\.head\..*"),
  optional=r".*/(query|key|value)/bias",
  outline=_outline,
)
CLIP = dataclasses.replace(
  VIT,
  fits=lambda shapes: VIT.fits(shapes) and "norm_pre.weight" in shapes,
  optional=f"embedding/bias|{VIT.optional}",
)
VIT_GATED = dataclasses.replace(
  VIT,
  block={**_BLOCK, "mlp.fc1": (family.GATE, family.DENSE_0)},
  settings=functools.partial(_settings, gated=True),
  fits=lambda shapes: _is_packed(shapes) and not _is_dinov3(shapes),
)
_DINOV3 = {
  **_BLOCK,
  "gamma_1": family.OUT_SCALE,
  "gamma_2": family.DENSE_1_SCALE,
  "attn.q_bias": f"{family.QUERY}/bias",
  "attn.v_bias": f"{family.VALUE}/bias",
}
DINOV3 = dataclasses.replace(
  VIT,
  name="a DINOv3 of timm",
  layout="timm-dinov3",
  block=_DINOV3,
  settings=functools.partial(_settings, rotary=True),
  fits=lambda shapes: (
    _is_dinov3(shapes) and "blocks.0.mlp.fc1_g.weight" not in shapes
  ),
  left_out=(r"rope\.periods",),
)
DINOV3_GATED = dataclasses.replace(
  DINOV3,
  block={
    **_DINOV3,
    "mlp.fc1_g": family.GATE,
    "mlp.fc1_x": family.DENSE_0,
    "mlp.fc1": (family.GATE, family.DENSE_0),
  },
  settings=functools.partial(_settings, gated=True, rotary=True),
  fits=lambda shapes: (
    _is_dinov3(shapes)
    and ("blocks.0.mlp.fc1_g.weight" in shapes or _is_packed(shapes))
  ),
)
