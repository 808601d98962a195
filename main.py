"""Trains a method on a task and tests it; --help tells more."""

import sys

from vqt_jax import cli

main = cli.main
parse = cli.parse

if __name__ == "__main__":
  sys.exit(main(sys.argv))
