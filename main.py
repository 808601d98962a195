"""Trains a method on a task and tests it; --help tells more."""

import sys

try:
  from vqt_jax import cli
except ValueError as e:  # JAX's, of its variables.
  print(
    f"error: JAX does not take a variable of the environment: {e}."
    " Correct it, or unset it.",
    file=sys.stderr,
  )
  sys.exit(2)

main = cli.main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
