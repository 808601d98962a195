"""Train a method on a task and test it; --help tells more."""

import sys

from vqt_jax import cli

main = cli.main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
