"""Handwritten digits with the tiny ViT of this repository; nothing to download.

Trains queries and a linear head, or another method, on a small ViT pre-trained
on Fashion-MNIST (see `vqt_jax/assets/`). Data: scikit-learn's 1,797 digits, 800
to search settings on, 200 to choose by, 797 to test.

  python main.py --config configs/digits.py --workdir runs/digits
  python main.py --config configs/digits.py:method=linear \\
      --workdir runs/digits_linear

Arguments:
  method       "vqt", "instant", "linear", or another one, see --help
  num_queries  queries per block
"""

from importlib import resources

from ml_collections import ConfigDict

from vqt_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the config for e.g. "method=linear"."""
  args = config_lib.parse_arg(arg, method="vqt", num_queries=0)
  config = config_lib.default_config()
  config.update(args)
  config.task = "digits"
  config.init = str(resources.files("vqt_jax") / "assets" / "fashion_vit.npz")
  config.image_size = 28
  config.epochs = 30
  # At larger rates queries magnify rounding, and results depend on it.
  config.reader_lr.vqt = (0.5, 0.25, 0.1, 0.05, 0.02)
  config.reader_lr.linear = (2.0, 1.0, 0.5, 0.25, 0.1)
  config.weight_decay = (1e-3, 1e-4, 0.0)
  return config
