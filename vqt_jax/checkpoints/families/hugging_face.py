"""Vision Transformers of Hugging Face's transformers.

Settings are in `config.json`, which may leave out what is the default of the
model's class, and in `preprocessor_config.json`.
"""

from collections.abc import Collection, Mapping
import functools
import types
from typing import Any

from vqt_jax.checkpoints.families import family
from vqt_jax.errors import UserError
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import scaling

# Keys of config.json -> fields.
_KEYS = {
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "patch_size": "patch_size",
  "layer_norm_eps": "layer_norm_epsilon",
  "rope_theta": "rope_theta",
  "num_register_tokens": "registers",
}
# What config.json of any family may leave out.
_DEFAULTS = {"num_attention_heads": 12, "image_size": 224}
_MODEL_TYPES = (
  "vit",
  "vit_mae",
  "dinov2",
  "dinov2_with_registers",
  "dinov3_vit",
  "clip",
  "clip_vision_model",
  "siglip",
  "siglip_vision_model",
)


def _settings(
  shapes: family.Shapes,
  configs: family.Configs,
  source: str,
  *,
  model_types: tuple[str, ...],
  value_range: str,
  defaults: Mapping[str, Any],
  fixed: Mapping[str, Any] = types.MappingProxyType({}),
  gated: bool = False,
  fields: Mapping[str, Any],
) -> family.Settings:
  """Read the settings of a ViT.

  Args:
    shapes: relative name -> shape.
    configs: by file name.
    source: name in errors.
    model_types: of the family, and of models that contain it.
    value_range: of the family, if there is no preprocessor_config.json.
    defaults: keys that config.json may leave out, besides `_DEFAULTS`.
    fixed: keys that are so whatever config.json says.
    gated: whether its MLPs are.
    fields: that all ViTs of the family have.

  Raises:
    UserError: the config is of another family, or its activation is unknown.
  """
  config = configs.get("config.json", {})
  model_type = config.get("model_type", model_types[0])
  if model_type not in _MODEL_TYPES:
    raise UserError(
      f"{source} is a {model_type!r} by its config.json, which is not a plain"
      f" ViT that is known: expected one of {', '.join(_MODEL_TYPES)}."
    )
  if model_type not in model_types:
    raise UserError(
      f"config.json of {source} says model_type {model_type!r},"
      f" but its tensors have the names of {model_types[0]!r}: put the"
      " config.json of these weights beside them."
    )
  found = {
    **_DEFAULTS,
    **defaults,
    **config.get("vision_config", config),
    **fixed,
  }
  fields = dict(fields) | {
    field: found[key]
    for key, field in _KEYS.items()
    if found.get(key) is not None
  }
  if not config:
    fields.pop("num_heads", None)
  processor = configs.get("preprocessor_config.json", {})
  if processor.get("do_normalize", True) is False:
    value_range = "0..1"
  elif "image_mean" in processor and "image_std" in processor:
    value_range = family.name_scaling(
      processor["image_mean"], processor["image_std"], source
    )
  if gated and found["hidden_act"] not in ("silu", "swish"):
    raise UserError(
      f"The gated MLPs of {source} have the activation"
      f" {found['hidden_act']!r}; expected silu."
    )
  if not gated:
    fields["gelu"] = family.find_gelu(found["hidden_act"], source)
  return family.Settings(
    {**fields, "gated_mlp": gated},
    value_range,
    found.get("image_size") if config else None,
    ("value_range",) * (not processor) + ("gelu",) * (not config and not gated),
    antialias="embeddings.register_tokens" in shapes,
  )


# Our names of activations -> transformers'.
_GELUS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


def _configs(
  backbone: backbone_lib.Backbone,
  model_type: str,
  architecture: str,
  **more: Any,
) -> dict[str, Any]:
  """Describe a backbone as `save_pretrained` of model and processor does.

  Args:
    backbone: to be written.
    model_type: as in config.json.
    architecture: class of the model.
    **more: keys of config.json that not all families have.
  """
  c = backbone.config
  side = lambda pair: pair[0] if pair[0] == pair[1] else list(pair)
  mean, std = scaling.find_scaling(backbone.value_range)
  config = {
    "architectures": [architecture],
    "model_type": model_type,
    "dtype": "float32",
    "hidden_act": "silu" if c.gated_mlp else _GELUS[c.gelu],
    "image_size": side(c.image_size),
    "num_channels": 3,
  }
  for key, field in _KEYS.items():
    config[key] = getattr(c, field)
  config["patch_size"] = side(c.patch_size)
  if c.posemb != "rope":
    del config["rope_theta"]
  if not c.registers:
    del config["num_register_tokens"]
  processor = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": dict(zip(("height", "width"), c.image_size)),
    "resample": 2,  # Bilinear, as runs prepare images.
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": mean,
    "image_std": std,
  }
  return {
    "config.json": config | more,
    "preprocessor_config.json": processor,
  }


_VIT = {
  "embeddings.cls_token": "cls",
  "embeddings.register_tokens": "registers",
  "embeddings.position_embeddings": "pos_embedding",
  "embeddings.patch_embeddings.projection": "embedding",
  "layernorm": "Transformer/encoder_norm",
}
_VIT_ATTENTION = {
  "attention.attention.query": family.QUERY,
  "attention.attention.key": family.KEY,
  "attention.attention.value": family.VALUE,
  "attention.output.dense": family.OUT,
}
_PATCHES = "embeddings.patch_embeddings.projection.weight"


def _vit_settings(shapes, configs, source):
  model_type = configs.get("config.json", {}).get("model_type")
  return _settings(
    shapes,
    configs,
    source,
    model_types=("vit", "vit_mae"),
    value_range="imagenet" if model_type == "vit_mae" else "-1..1",
    defaults={
      "hidden_act": "gelu",
      "layer_norm_eps": 1e-12,
    },
    fields={"pool_type": "tok"},
  )


def _vit_outline(
  backbone: backbone_lib.Backbone, zeros: Collection[str]
) -> family.Outline:
  del zeros
  classes, name, more = backbone.config.num_classes, "ViTModel", {}
  if classes:
    name = "ViTForImageClassification"
    more["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
  return family.Outline(
    _configs(backbone, "vit", name, **more),
    prefix="vit." if classes else "",
    absent=(
      r"embeddings\.register_tokens",
      *(() if classes else (r"classifier\..*",)),
    ),
    class_position=True,
  )


VIT = family.Family(
  name="a ViT of transformers",
  layout="hf-vit",
  patches=_PATCHES,
  fits=lambda shapes: "encoder.layer.0.layernorm_before.weight" in shapes,
  top={**_VIT, "/classifier": "head"},
  blocks="encoder.layer.",
  block={
    **_VIT_ATTENTION,
    "layernorm_before": family.NORM_0,
    "layernorm_after": family.NORM_1,
    "intermediate.dense": family.DENSE_0,
    "output.dense": family.DENSE_1,
  },
  settings=_vit_settings,
  left_out=(r"pooler\..*", r"embeddings\.mask_token", r"/decoder\..*"),
  optional=r".*/(query|key|value)/bias",
  outline=_vit_outline,
)

_BLOCK_NORMS = {"norm1": family.NORM_0, "norm2": family.NORM_1}
_SCALES = {
  "layer_scale1.lambda1": family.OUT_SCALE,
  "layer_scale2.lambda1": family.DENSE_1_SCALE,
}


def _dinov2_outline(
  backbone: backbone_lib.Backbone, zeros: Collection[str]
) -> family.Outline:
  del zeros
  c = backbone.config
  model_type, name = "dinov2", "Dinov2Model"
  if c.registers:
    model_type, name = "dinov2_with_registers", "Dinov2WithRegistersModel"
  # The library has whole numbers here only, and for gated MLPs its own size.
  ratio, problems = c.mlp_dim // c.width, ()
  size = c.width * ratio
  if c.gated_mlp:
    ratio = round(c.mlp_dim * 1.5 / c.width)
    size = (int(c.width * ratio * 2 / 3) + 7) // 8 * 8
  if size != c.mlp_dim:
    problems = (f"have MLPs of {c.mlp_dim} at width {c.width}",)
  return family.Outline(
    _configs(
      backbone, model_type, name, mlp_ratio=ratio, use_swiglu_ffn=c.gated_mlp
    ),
    absent=() if c.registers else (r"embeddings\.register_tokens",),
    unused={"embeddings.mask_token": (1, c.width)},
    class_position=True,
    problems=problems,
  )


def _dinov2(gated: bool, mlp: family.Table) -> family.Family:
  settings = functools.partial(
    _settings,
    model_types=("dinov2", "dinov2_with_registers"),
    value_range="imagenet",
    fixed={"hidden_act": "silu"} if gated else {},
    defaults={
      "hidden_act": "gelu",
      "layer_norm_eps": 1e-6,
    },
    fields={"pool_type": "tok"},
    gated=gated,
  )
  mark = f"encoder.layer.0.{next(iter(mlp))}.weight"
  return family.Family(
    name="a DINOv2 of transformers",
    layout="hf-dinov2",
    patches=_PATCHES,
    fits=lambda shapes: mark in shapes,
    top=_VIT,
    blocks="encoder.layer.",
    block={**_VIT_ATTENTION, **_BLOCK_NORMS, **_SCALES, **mlp},
    settings=settings,
    left_out=(r"embeddings\.mask_token", r"/classifier\..*"),
    optional=r".*/(query|key|value)/bias",
    outline=_dinov2_outline,
  )


DINOV2 = _dinov2(False, {"mlp.fc1": family.DENSE_0, "mlp.fc2": family.DENSE_1})
DINOV2_GATED = _dinov2(
  True,
  {
    "mlp.weights_in": (family.GATE, family.DENSE_0),
    "mlp.weights_out": family.DENSE_1,
  },
)


def _dinov3_outline(
  backbone: backbone_lib.Backbone, zeros: Collection[str]
) -> family.Outline:
  c, key_bias = backbone.config, f"{family.KEY}/bias" not in zeros
  absent = () if c.gated_mlp else (r"mlp\.gate_proj\..*",)
  return family.Outline(
    _configs(
      backbone,
      "dinov3_vit",
      "DINOv3ViTModel",
      use_gated_mlp=c.gated_mlp,
      key_bias=key_bias,
    ),
    absent=absent if key_bias else (*absent, r"attention\.k_proj\.bias"),
    unused={"embeddings.mask_token": (1, 1, c.width)},
  )


def _dinov3(gated: bool) -> family.Family:
  mark = "layer.0.mlp.gate_proj.weight"
  return family.Family(
    name="a DINOv3 of transformers",
    layout="hf-dinov3",
    patches="embeddings.patch_embeddings.weight",
    fits=lambda shapes: (mark in shapes) == gated,
    top={
      "embeddings.cls_token": "cls",
      "embeddings.register_tokens": "registers",
      "embeddings.patch_embeddings": "embedding",
      "norm": "Transformer/encoder_norm",
    },
    blocks="layer.",
    block={
      "attention.q_proj": family.QUERY,
      "attention.k_proj": family.KEY,
      "attention.v_proj": family.VALUE,
      "attention.o_proj": family.OUT,
      **_BLOCK_NORMS,
      **_SCALES,
      "mlp.gate_proj": family.GATE,
      "mlp.up_proj": family.DENSE_0,
      "mlp.down_proj": family.DENSE_1,
    },
    settings=functools.partial(
      _settings,
      model_types=("dinov3_vit",),
      value_range="imagenet",
      defaults={
        "hidden_act": "silu" if gated else "gelu",
        "num_attention_heads": 6,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
      },
      gated=gated,
      fields={"pool_type": "tok", "posemb": "rope"},
    ),
    left_out=(r"embeddings\.mask_token", r"/classifier\..*"),
    optional=r".*/(query|key|value|out|gate|Dense_[01])/bias",
    outline=_dinov3_outline,
  )


DINOV3, DINOV3_GATED = _dinov3(False), _dinov3(True)

_TOWER = {
  "embeddings.class_embedding": "cls",
  "embeddings.patch_embedding": "embedding",
  "embeddings.position_embedding.weight": "pos_embedding",
  "pre_layrnorm": "pre_norm",  # A typing error of the library.
  "post_layernorm": "Transformer/encoder_norm",
  "head.probe": f"{family.MAP}/probe",
  "head.attention.in_proj_": tuple(f"{family.MAP}/{x}" for x in family.QKV),
  "head.attention.out_proj": f"{family.MAP}/{family.OUT}",
  "head.layernorm": f"{family.MAP}/{family.NORM_0}",
  "head.mlp.fc1": f"{family.MAP}/{family.DENSE_0}",
  "head.mlp.fc2": f"{family.MAP}/{family.DENSE_1}",
}


def _tower_outline(
  backbone: backbone_lib.Backbone, zeros: Collection[str]
) -> family.Outline:
  del zeros
  c = backbone.config
  if c.has_class_token:
    configs = _configs(backbone, "clip_vision_model", "CLIPVisionModel")
    absent = (r"embeddings\.patch_embedding\.bias", r"head\..*")
  else:
    has_head = c.pool_type == "map"
    configs = _configs(
      backbone,
      "siglip_vision_model",
      "SiglipVisionModel",
      vision_use_head=has_head,
    )
    absent = (r"embeddings\.class_embedding", r"pre_layrnorm\..*")
    absent += () if has_head else (r"head\..*",)
  sizes = {"patches": c.patch_size, "images": c.image_size}
  return family.Outline(
    configs,
    absent=absent,
    class_position=c.has_class_token,
    bare_tokens=True,
    problems=tuple(
      f"have {name} that are not square"
      for name, size in sizes.items()
      if size[0] != size[1]
    ),
  )


def _tower(name, layout, fits, optional="", **settings) -> family.Family:
  return family.Family(
    name=name,
    layout=layout,
    patches="embeddings.patch_embedding.weight",
    fits=fits,
    top=_TOWER,
    blocks="encoder.layers.",
    block={
      "layer_norm1": family.NORM_0,
      "self_attn.q_proj": family.QUERY,
      "self_attn.k_proj": family.KEY,
      "self_attn.v_proj": family.VALUE,
      "self_attn.out_proj": family.OUT,
      "layer_norm2": family.NORM_1,
      "mlp.fc1": family.DENSE_0,
      "mlp.fc2": family.DENSE_1,
    },
    settings=functools.partial(_settings, **settings),
    left_out=(
      *family.OTHER_TOWER,
      r"embeddings\.position_ids",
      r"/classifier\..*",
    ),
    optional=optional,
    outline=_tower_outline,
  )


CLIP = _tower(
  "an image tower of CLIP of transformers",
  "hf-clip",
  lambda shapes: "embeddings.class_embedding" in shapes,
  optional="embedding/bias",
  model_types=("clip_vision_model", "clip"),
  value_range="clip",
  defaults={
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
  },
  fields={"pool_type": "tok"},
)
SIGLIP = _tower(
  "an image tower of SigLIP of transformers",
  "hf-siglip",
  lambda shapes: "embeddings.class_embedding" not in shapes,
  model_types=("siglip_vision_model", "siglip"),
  value_range="-1..1",
  defaults={
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
  },
  fields={},
)
