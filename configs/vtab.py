"""Any VTAB-1k task (or all), method and backbone, by string arguments.

  python main.py --config configs/vtab.py:task=dtd,variant=S/16 \\
      --workdir runs/dtd
  python main.py --config configs/vtab.py:task=svhn,method=linear \\
      --workdir runs/svhn_linear --config.init=ckpt.npz
  python main.py --config configs/vtab.py:task=all,variant=B/16 \\
      --workdir runs/vtab

Arguments:
  task         a VTAB-1k task, "all" for each of the 19 in turn, "digits", or
               any classification dataset of TFDS
  method       "vqt", "instant", "linear", or another one, see --help
  num_queries  queries per block; 0: the authors' number for the task
  variant      e.g. "S/16": the ImageNet-21k checkpoint of this size
  init         another checkpoint, of that variant if it is given too
  image_size   pixels
  data_dir     folder of the prepared TFDS datasets
  preset       "authors": their program except for its weights

For a dataset that is no VTAB task, 800 + 200 training images and the test split
are used; `--config.splits.train=...` etc. change that.
"""

from ml_collections import ConfigDict

from vqt_jax import config as config_lib
from vqt_jax.data import vtab


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the config for e.g. "task=dtd,variant=S/16,num_queries=10"."""
  args = config_lib.parse_arg(
    arg,
    task="cifar100",
    method="vqt",
    num_queries=0,
    variant="",
    init="",
    image_size=224,
    data_dir="",
    preset="",
  )
  task = vtab.find_task(args["task"])
  if task:
    args["task"] = task.name

  config = config_lib.default_config()
  variant = args["variant"] or "B/16"
  args["init"] = args["init"] or f"howto-i21k-{variant}"
  config.update(args)
  return config
