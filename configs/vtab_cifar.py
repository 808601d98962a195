"""Visual query tuning of ViT-B/16 (ImageNet-21k) on CIFAR-100 of VTAB-1k.

Trains one query per block (12 x 1 x 768) and a linear head on 9,984 features,
1,007,716 numbers; the 85.8 M of the backbone stay frozen. The authors' grid of
5 learning rates x 4 weight decays is searched on 800 training and 200
validation images, then five seeds train on all 1,000 and are tested on the
10,000 test images.

  python main.py --config configs/vtab_cifar.py --workdir runs/cifar

The authors' program except for its weights (noisy stream, legacy resize, ...):

  python main.py --config configs/vtab_cifar.py --workdir runs/cifar_authors \\
      --config.preset=authors
"""

from ml_collections import ConfigDict

from vqt_jax import config as config_lib


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the config; the recipe is the default."""
  config_lib.parse_arg(arg)  # Refuses all arguments.
  config = config_lib.default_config()
  config.task = "cifar100"
  config.init = "howto-i21k-B/16"
  config.variant = "B/16"
  config.image_size = 224
  config.method = "vqt"
  config.num_queries = 1
  return config
