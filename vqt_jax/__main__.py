"""Visual query tuning of frozen Vision Transformers.

  vqt-jax prepare cifar100
  vqt-jax train --config vtab_cifar --workdir runs/cifar
  vqt-jax compare runs/linear runs/vqt
  vqt-jax predict runs/photos new/
  vqt-jax evaluate runs/photos holdout/
  vqt-jax export runs/photos --output photos.stablehlo
  vqt-jax serve runs/photos runs/dtd
  vqt-jax share runs/photos --to hf://OWNER/NAME

prepare   download and prepare datasets
train     train a method on a task and test it
compare   compare finished runs
predict   classify images with what a run has trained
evaluate  judge what a run has trained on labelled images
export    write it as a program for JAX or TensorFlow
serve     answer images over HTTP, and on a page
share     upload it to the Hugging Face hub

`vqt-jax COMMAND --help` tells more; `python -m vqt_jax` is the same as vqt-jax.
"""

import importlib
import sys

import vqt_jax
from vqt_jax import errors
from vqt_jax.runtime import logfile

COMMANDS = {
  "prepare": "vqt_jax.data.prepare",
  "train": "vqt_jax.cli",
  "compare": "vqt_jax.compare",
  "predict": "vqt_jax.predict",
  "evaluate": "vqt_jax.evaluate",
  "export": "vqt_jax.export",
  "serve": "vqt_jax.serve",
  "share": "vqt_jax.share",
}


def main() -> int:
  """Run the command that the command line names; return the exit status."""
  name, *rest = sys.argv[1:] or ["--help"]
  if name in ("-h", "--help"):
    logfile.print_to_stdout(__doc__)
    return 0
  if name == "--version":
    print(vqt_jax.__version__)
    return 0
  if name not in COMMANDS:
    error = errors.unknown_name("command", name, COMMANDS)
    print(f"error: {error}", file=sys.stderr)
    return 2
  module = importlib.import_module(COMMANDS[name])
  return module.main([f"vqt-jax {name}", *rest])


if __name__ == "__main__":
  sys.exit(main())
