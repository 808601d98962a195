"""Folders of `save_backbone`, loaded and run by transformers and timm.

  python -m benchmarks.foreign_round_trip save FOLDER
  pip install torch transformers timm   (elsewhere, if you like)
  python benchmarks/foreign_round_trip.py compare FOLDER

`save` writes every golden of `tests/goldens/foreign` in the layouts of both
libraries, one with a LoRA folded in, and some ViTs of Big Vision. `compare`
prints for each the largest difference of the tokens after the last block or
final LayerNorm, of the pooled feature and of the logits of a pre-trained head,
over the largest value or 1. It fails if one exceeds 2e-5, or a library reports
keys that are missing or unexpected.

They are compared with what the golden's own library computed; where that did
not record what is compared here, and for the others, with this package.
"""

import json
import logging
import pathlib
import sys

import numpy as np

TOLERANCE = 2e-5
# Changes of a tiny ViT of Big Vision.
_BIG_VISION = {
  "tok": {"num_classes": 5},
  "gap": {"pool_type": "gap", "gelu": "exact"},
  "map": {"pool_type": "map", "mlp_dim": 48},
  "mae": {"pool_type": "mae", "mlp_dim": 37},
  "sincos2d": {"posemb": "sincos2d"},
  "rectangles": {"patch_size": (4, 3), "image_size": (12, 15)},
}


def save(folder: pathlib.Path) -> None:
  """Write each backbone, and beside it images and what is expected of them."""
  import jax

  from tests import helpers
  from tests.checkpoints import test_families
  import vqt_jax

  def write(name, backbone, golden, images):
    stream = test_families.run(backbone, images)
    expected = {
      "blocks": golden.get("blocks", stream.blocks)[-1],
      "encoded": golden.get("encoded", stream.encoded),
      "pooled": golden.get("pooled", stream.final),
      "logits": golden.get("logits", stream.logits),
    }
    for layout in ("hf", "timm"):
      place = folder / f"{name}-{layout}"
      try:
        vqt_jax.save_backbone(place, backbone, layout)
      except vqt_jax.UserError as error:
        print(f"{place.name}: {error}")
        continue
      there = {k: x for k, x in expected.items() if x is not None}
      np.savez(f"{place}.npz", images=images, **there)

  folder.mkdir(parents=True, exist_ok=True)
  for name in test_families.NAMES:
    golden = test_families.expected(name)
    images = golden["images"]
    backbone = test_families.load(name, image_size=images.shape[1:3])
    for key in test_families.NOT_COMPARED.get(name, ()):
      del golden[key]
    write(name, backbone, golden, images)
    if name == "hf_dinov2":
      tuner = vqt_jax.make_tuner("lora", backbone.config, 3)
      leaves, tree = jax.tree.flatten(tuner.shapes())
      rng = np.random.default_rng(0)
      drawn = [rng.normal(scale=0.1, size=x.shape) for x in leaves]
      drawn = [x.astype(np.float32) for x in drawn]
      variables = jax.tree.unflatten(tree, drawn)
      model = helpers.tuned_model(backbone, tuner, variables)
      folded = model.folded().backbone
      before, after = (
        test_families.run(each, images).final for each in (backbone, folded)
      )
      print(f"LoRA moves the feature by {np.abs(after - before).max():.2g}")
      write("hf_dinov2_lora", folded, {}, images)
  for name, changes in _BIG_VISION.items():
    backbone = helpers.tiny_backbone(**changes)
    images = helpers.tiny_examples(backbone, 2, 2)["image"]
    write(f"big_vision_{name}", backbone, {}, images)


def compare(folder: pathlib.Path) -> None:
  """Run what `save` wrote with its library; exit with 1 if it differs."""
  failed = False
  for file in sorted(folder.glob("*.npz")):
    place, expected = file.with_suffix(""), dict(np.load(file))
    images = expected["images"].transpose(0, 3, 1, 2)
    run = _transformers if place.name.endswith("-hf") else _timm
    kind, found, keys = run(place, images)
    worst = {}
    for name, array in found.items():
      wanted = expected[name]
      scale = max(1.0, np.abs(wanted).max())
      worst[name] = float(np.abs(array - wanted).max() / scale)
    failed |= bool(keys) or max(worst.values()) > TOLERANCE
    numbers = ", ".join(f"{name} {x:.1e}" for name, x in worst.items())
    print(f"{place.name:28} {kind:26} {numbers} {keys or ''}")
  sys.exit(failed)


def _transformers(place, images):
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  config = json.loads((place / "config.json").read_text())
  kind = config["architectures"][0]
  more = {}
  if config["model_type"] == "vit":  # Its pooler is a layer of its own.
    more["add_pooling_layer"] = False
  has_head = kind == "ViTForImageClassification"
  auto = transformers.AutoModel
  if has_head:
    auto, more = transformers.AutoModelForImageClassification, {}
  model, report = auto.from_pretrained(place, output_loading_info=True, **more)
  transformers.AutoImageProcessor.from_pretrained(place)
  keys = [name for names in report.values() for name in names]
  pixels, found = torch.from_numpy(images.copy()), {}
  model.eval()
  with torch.no_grad():
    if has_head:
      found["logits"] = model(pixels).logits.numpy()
      model = model.vit
    out = model(pixels)
  tokens = out.last_hidden_state
  pooled = out.get("pooler_output")
  if pooled is None:
    pooled = tokens[:, 0] if config["model_type"] == "vit" else tokens.mean(1)
  name = "blocks" if kind.startswith("CLIP") else "encoded"
  found |= {name: tokens.numpy(), "pooled": pooled.numpy()}
  return kind, found, keys


def _timm(place, images):
  import timm
  import torch

  reported = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: reported.append(record.getMessage())
  logging.getLogger("timm").addHandler(handler)
  model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
  with torch.no_grad():
    tokens = model.forward_features(torch.from_numpy(images.copy()))
    pooled = model.forward_head(tokens, pre_logits=True)
    logits = model.forward_head(tokens)
  identity = isinstance(model.norm, torch.nn.Identity)
  found = {
    "blocks" if identity else "encoded": tokens.numpy(),
    "pooled": pooled.numpy(),
  }
  if model.num_classes:
    found["logits"] = logits.numpy()
  return model.default_cfg["architecture"], found, reported


if __name__ == "__main__":
  {"save": save, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
