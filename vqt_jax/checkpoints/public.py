"""Published ViTs by name: their addresses, and what their files do not tell.

Names are Big Vision's where it has some (`howto-i21k-B/16`, `SigLIP2 B/16
256`), else the file's (`imagenet21k/ViT-B_16`).
"""

import dataclasses
import difflib
import re


@dataclasses.dataclass(frozen=True)
class PublicViT:
  """A published checkpoint.

  Attributes:
    address: `gs://BUCKET/PATH`, with `:img` where the ViT is one of two towers.
    variant: e.g. "B/16".
    image_size: side of the images it was trained on last, pixels.
    pool_type: as in `ViTConfig`.
    gelu: as in `ViTConfig`.
    value_range: key of `scaling.VALUE_RANGES`.
    refused: what it is instead of a plain ViT, or "".
  """

  address: str
  variant: str
  image_size: int = 224
  pool_type: str = "tok"
  gelu: str = "tanh"
  value_range: str = "-1..1"
  refused: str = ""


_HYBRID = "a hybrid (its patches come from a ResNet), not a plain ViT"
_FLEXI = "a FlexiViT (flexible patch size), not a plain ViT"
_NAFLEX = "a NaFlex ViT (variable grids), not a plain ViT"
_MIXER = "an MLP-Mixer, not a ViT"

# Folder, image size, pooling, and files of vision_transformer, 2020 to 2022.
_VISION_TRANSFORMER = (
  (
    "imagenet21k",
    224,
    "tok",
    "ViT-B_8 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 ViT-H_14"
    " R50+ViT-B_16 R26+ViT-B_32 R50+ViT-L_32",
  ),
  (
    "imagenet21k+imagenet2012",
    384,
    "tok",
    "ViT-B_8 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 R50+ViT-B_16",
  ),
  ("imagenet21k+imagenet2012", 224, "tok", "ViT-B_16-224 ViT-L_16-224"),
  ("sam", 224, "tok", "ViT-S_16 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32"),
  ("gsam", 224, "gap", "ViT-S_16 ViT-S_32 ViT-B_16 ViT-B_32"),
)


def _vision_transformer() -> dict[str, PublicViT]:
  """https://github.com/google-research/vision_transformer."""
  models = {}
  for folder, size, pool, files in _VISION_TRANSFORMER:
    for file in files.split():
      models[f"{folder}/{file}"] = PublicViT(
        f"gs://vit_models/{folder}/{file}.npz",
        re.sub(r"ViT-|-224", "", file).replace("_", "/"),
        size,
        pool,
        refused=_HYBRID if file.startswith("R") else "",
      )
  for size in "BL":
    name = f"Mixer-{size}_16"
    address = f"gs://mixer_models/imagenet21k/{name}.npz"
    models[name] = PublicViT(address, f"{size}/16", refused=_MIXER)
  return models


# Model -> (augmentation, weight decay, dropout, stochastic depth) of the
# recommended ImageNet-21k file; learning rate of its ImageNet-1k version.
_AUGREG = {
  "Ti/16": ("none", 0.03, 0.0, 0.0, 0.03),
  "S/32": ("none", 0.1, 0.0, 0.0, 0.01),
  "S/16": ("light1", 0.03, 0.0, 0.0, 0.03),
  "B/32": ("light1", 0.1, 0.0, 0.0, 0.01),
  "B/16": ("medium1", 0.1, 0.0, 0.0, 0.03),
  "B/8": ("medium2", 0.1, 0.0, 0.0, None),
  "L/16": ("strong1", 0.1, 0.0, 0.0, 0.01),
  "R50+L/32": ("medium1", 0.1, 0.1, 0.1, 0.01),
  "R26+S/32": ("light1", 0.1, 0.0, 0.0, 0.03),
  "R+Ti/16": ("none", 0.03, 0.0, 0.0, 0.03),
}


def _augreg() -> dict[str, PublicViT]:
  """AugReg: "How to train your ViT?", https://arxiv.org/abs/2106.10270."""
  models = {}
  for model, (aug, decay, drop, depth, rate) in _AUGREG.items():
    name = re.sub(r"[+/]", "_", model)
    refused = _HYBRID if model.startswith("R") else ""
    variant = model.split("+")[-1]
    file = (
      f"gs://vit_models/augreg/{name}-i21k-300ep-lr_0.001"
      f"-aug_{aug}-wd_{decay}-do_{drop}-sd_{depth}"
    )
    models[f"howto-i21k-{model}"] = PublicViT(
      f"{file}.npz", variant, refused=refused
    )
    if rate:
      file += f"--imagenet2012-steps_20k-lr_{rate}-res_384"
      models[f"howto-i21k-i1k-{model}"] = PublicViT(
        f"{file}.npz", variant, 384, refused=refused
      )
  return models


def _big_vision() -> dict[str, PublicViT]:
  """https://github.com/google-research/big_vision, those of one tower."""
  root = "gs://big_vision"
  models = {}
  for epochs in (90, 150, 300):
    models[f"i1k-s16-{epochs}ep"] = PublicViT(
      f"{root}/vit_s16_i1k_{epochs}ep.npz", "S/16", pool_type="gap"
    )
  for letter, name in (("S", "small"), ("B", "base"), ("L", "large")):
    for size in (224, 384):
      for data in ("1k", "21k"):
        # Trained in PyTorch, whose GELU is the exact one.
        models[f"deit3_{letter}_{size}_{data}"] = PublicViT(
          f"{root}/zoo/deit3/bv_deit_3_{name}_{size}_{data}.npz",
          f"{letter}/16",
          size,
          gelu="exact",
        )
    for epochs in ("", " 90ep", " 300ep", " 600ep"):
      file = f"flexivit_{letter.lower()}_i1k{epochs.replace(' ', '_')}.npz"
      models[f"FlexiViT-{letter} i1k{epochs}"] = PublicViT(
        f"{root}/flexivit/{file}", letter, 240, refused=_FLEXI
      )
  for epochs in (90, 300, 1000):
    models[f"FlexiViT-B i21k {epochs}ep"] = PublicViT(
      f"{root}/flexivit/flexivit_b_i21k_{epochs}ep.npz",
      "B",
      240,
      refused=_FLEXI,
    )
  for patch in (16, 30):
    models[f"ViT-B/{patch} i21k"] = PublicViT(
      f"{root}/flexivit/vit_b{patch}_i21k_300ep.npz", f"B/{patch}", 240
    )
  return models


_SIGLIP = (
  ("B/16 224", "en_b16_224_63724782"),
  ("B/16 256", "en_b16_256_60500360"),
  ("B/16 384", "en_b16_384_68578854"),
  ("B/16 512", "en_b16_512_68580893"),
  ("L/16 256", "en_l16_256_60552751"),
  ("L/16 384", "en_l16_384_63634585"),
  ("So400m/14 224", "en_so400m_224_57633886"),
  ("So400m/14 384", "en_so400m_384_58765454"),
  ("B/16-i18n 256", "i18n_b16_256_66117334"),
  ("So400m/16-i18n 256", "i18n_so400m_16_256_78061115"),
)
_SIGLIP2 = (
  ("B/32", (256,)),
  ("B/16", (224, 256, 384, 512)),
  ("L/16", (256, 384, 512)),
  ("So400m/14", (224, 384)),
  ("So400m/16", (256, 384, 512)),
  ("g-opt/16", (256, 384)),
)


def _two_towers() -> dict[str, PublicViT]:
  """Image towers of SigLIP, SigLIP 2, CLIPPO and LiT."""
  root = "gs://big_vision"
  models = {}
  for name, file in _SIGLIP:
    variant, size = name.replace("-i18n", "").split()
    address = f"{root}/siglip/webli_{file}.npz:img"
    models[f"SigLIP {name}"] = PublicViT(address, variant, int(size), "map")
  for variant, sizes in _SIGLIP2:
    short = variant.replace("/", "").lower() if variant[0] != "g" else "g-opt16"
    for size in sizes:
      models[f"SigLIP2 {variant} {size}"] = PublicViT(
        f"{root}/siglip2/siglip2_{short}_{size}.npz:img", variant, size, "map"
      )
  for variant in ("B/16", "So400m/16"):
    short = variant.replace("/", "").lower()
    models[f"SigLIP2 {variant} NaFlex"] = PublicViT(
      f"{root}/siglip2/siglip2_{short}_naflex.npz:img",
      variant,
      256,
      "map",
      refused=_NAFLEX,
    )
  init = "yfcc100m_i21k_init"
  mixed = [f"{init}_{percent}c4" for percent in (25, 50, 75)]
  for data in ("yfcc100m", init, *mixed, "100c4"):
    address = f"{root}/clippo/clippo_b16_{data}.npz:img"
    models[f"CLIPPO B/16 {data}"] = PublicViT(address, "B/16", 224, "map")
  for name in ("LiT-B16B", "LiT-B16B_2", "LiT-L16L"):
    address = f"gs://vit_models/lit/{name}.npz:img"
    models[name] = PublicViT(address, f"{name[4]}/16")
  return models


PUBLIC: dict[str, PublicViT] = {
  **_vision_transformer(),
  **_augreg(),
  **_big_vision(),
  **_two_towers(),
}


def find_name(name: str) -> str | None:
  """Return the key of `PUBLIC` that a name means, in any case and spacing."""
  return {_plain(key): key for key in PUBLIC}.get(_plain(name))


def nearest_names(name: str) -> list[str]:
  """Return the public names most like a name, best first."""
  plain = {_plain(key): key for key in PUBLIC}
  return [plain[k] for k in difflib.get_close_matches(_plain(name), plain)]


def _plain(name: str) -> str:
  return re.sub(r"[^a-z0-9+]", "", name.lower())
