"""Your own images: a folder per class, or a table of files and labels.

  python main.py --config configs/folder.py:path=photos --workdir runs/photos
  python main.py --config configs/folder.py:path=photos,method=instant \\
      --workdir runs/first_try
  python main.py --config configs/folder.py:path=birds.csv,label=species \\
      --workdir runs/birds --config.init=CHECKPOINT --config.image_size=224

`photos` holds photos/CLASS/IMAGE, or photos/{train,val,test}/CLASS/IMAGE; a
table (.csv, .tsv, .jsonl) has columns of paths and labels, and may have one of
splits. docs/your_images.md tells all.

Arguments:
  path        the folder or table; default: photos
  image       column of the paths, if its name is not usual
  label       column of the labels
  split       column of the splits
  fit         "squash", "crop" or "pad": how images are made to fit
  method      "auto" (default): a quick answer, then the best; or "instant",
              "vqt", or another one, see --help
  init        checkpoint of the backbone; default: the small one that is shipped
  image_size  pixels; default: 28 for the shipped backbone, else 224

Methods but auto search four learning rates with one weight decay. Then come
three seeds.
"""

from importlib import resources

from ml_collections import ConfigDict

from vqt_jax import config as config_lib
from vqt_jax.models import methods as methods_lib


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the config for e.g. "path=photos,method=instant"."""
  args = config_lib.parse_arg(
    arg,
    path="photos",
    image="",
    label="",
    split="",
    fit="squash",
    method="auto",
    init="",
    image_size=0,
  )
  path = args["path"]
  shipped = resources.files("vqt_jax") / "assets" / "fashion_vit.npz"
  config = config_lib.default_config()
  config.task = path if path.startswith(("/", ".", "~")) else f"./{path}"
  config.image_key, config.label_key = args["image"], args["label"]
  config.split_key, config.fit = args["split"], args["fit"]
  config.method = args["method"]
  config.init = args["init"] or str(shipped)
  config.image_size = args["image_size"] or (224 if args["init"] else 28)
  config.settings, config.seeds = 4, (42, 44, 82)
  if not methods_lib.parse(config.method).trains_network:
    config.epochs = 50
  # At larger rates queries magnify rounding, and results depend on it.
  config.reader_lr.vqt = (0.5, 0.25, 0.1, 0.05)
  return config
