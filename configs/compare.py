"""Several methods on one task: one table and one picture of them.

  python main.py --config configs/compare.py:task=dtd,methods=linear,vqt,lora \\
      --workdir runs/dtd_methods
  python main.py --config configs/compare.py:task=digits,settings=4 \\
      --workdir runs/digits_methods

Arguments:
  methods      separated by commas; "all" (the default): each alone, and
               vqt+vpt_deep and vqt+adaptformer
  settings     number of settings to try of each method: so many of its rates,
               with one weight decay; 0: all its rates with all weight decays
  task         as for configs/vtab.py, except "all"; "digits": with the settings
               of configs/digits.py
  num_queries, variant, init, image_size, data_dir
               as for configs/vtab.py
"""

from ml_collections import ConfigDict

from vqt_jax import config as config_lib
from vqt_jax import errors
from vqt_jax.configs import digits
from vqt_jax.configs import vtab
from vqt_jax.models import methods as methods_lib


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the config for e.g. "task=dtd,methods=linear,vqt,settings=4"."""
  args = config_lib.parse_arg(
    arg,
    methods=(methods_lib.ALL,),
    settings=0,
    task="cifar100",
    num_queries=0,
    variant="",
    init="",
    image_size=0,
    data_dir="",
  )
  methods = args.pop("methods")
  if not methods:
    raise errors.UserError(
      "Config argument methods= names no method: expected e.g."
      " methods=linear,vqt, or methods=all."
    )
  given = {name: value for name, value in args.items() if value}
  if args["task"] == "digits":
    config = digits.get_config()
    config.update(given)
  else:
    settings = given.pop("settings", 0)
    given = ",".join(f"{name}={value}" for name, value in given.items())
    config = vtab.get_config(given)
    config.settings = settings
  config.methods = ",".join(methods)
  return config
