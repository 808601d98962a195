"""The results file of a finished run."""

from typing import Any

from vqt_jax import errors
from vqt_jax.runtime import files

RESULTS = "results.json"


def read(workdir: files.Path) -> dict[str, Any]:
  """Read the results of a finished run.

  Raises:
    UserError: the file is damaged, or is none of results.
  """
  path = workdir / RESULTS
  advice = "the same command runs it again."
  try:
    results = files.read_json(path)
  except errors.UserError as e:
    raise errors.UserError(f"{e} Delete it, and {advice}") from e
  if not isinstance(results, dict) or "tested" not in results:
    raise errors.UserError(
      f"{path} does not hold results of a run. Move it elsewhere, and {advice}"
    )
  return results
