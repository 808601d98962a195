"""Reads the results of a finished run."""

from typing import Any

from vqt_jax import errors
from vqt_jax.runtime import files

RESULTS = "results.json"


def read(workdir: files.Path) -> dict[str, Any]:
  """What `write` left of a finished run.

  Raises:
    UserError: it is damaged, or something else.
  """
  path = workdir / RESULTS
  again = "the same command does the run again."
  try:
    results = files.read_json(path)
  except errors.UserError as e:
    raise errors.UserError(f"{e} Delete it, and {again}") from e
  if not isinstance(results, dict) or "tested" not in results:
    raise errors.UserError(
      f"{path} does not hold results of a run. Move it elsewhere, and {again}"
    )
  return results
