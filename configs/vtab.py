"""Any VTAB-1k task, method and backbone, by string arguments.

  python main.py --config configs/vtab.py:task=dtd,variant=S/16 \\
      --workdir runs/dtd
  python main.py --config configs/vtab.py:task=svhn,method=linear \\
      --workdir runs/svhn_linear --config.init=ckpt.npz

Arguments:
  task         a VTAB-1k task, "digits", or any classification dataset of TFDS
  method       "vqt" or "linear"
  num_queries  queries per block; 0: what the authors use for this task
  variant      e.g. "S/16": the ImageNet-21k checkpoint of this size
  init         another checkpoint, which must then be of that variant, if given
  image_size   pixels
  data_dir     folder of the prepared TFDS datasets
  preset       "authors": their program in every respect

Of a dataset that is no VTAB task, 800 + 200 training images and the test split
are used; `--config.splits.train=...` and the like change that.
"""

from ml_collections import ConfigDict

from vqt_jax import config as config_lib
from vqt_jax.data import vtab

# Where the authors use more than one query per block (their demo settings).
NUM_QUERIES = {
    "smallnorb_elevation": 10,
    "clevr_distance": 10,
    "svhn": 20,
    "dmlab": 20,
    "dsprites_location": 20,
    "smallnorb_azimuth": 20,
    "kitti": 20,
}


def get_config(arg: str | None = None) -> ConfigDict:
  """The settings for e.g. "task=dtd,variant=S/16,num_queries=10"."""
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
  task = vtab.find(args["task"])
  if task:
    args["task"] = task.name

  config = config_lib.default_config()
  if not args["num_queries"]:
    args["num_queries"] = NUM_QUERIES.get(args["task"], 1)
  variant = args["variant"] or "B/16"
  args["init"] = args["init"] or f"howto-i21k-{variant}"
  config.update(args)
  return config
