"""Train a method on a task and test it; --help tells more."""

import sys

try:
  from vqt_jax import cli
except ValueError as e:  # Raised by JAX, for its environment variables.
  print(
    f"error: JAX rejects a variable of the environment: {e}."
    " Correct it, or unset it.",
    file=sys.stderr,
  )
  sys.exit(2)

main = cli.main

if __name__ == "__main__":
  sys.exit(main(sys.argv))
