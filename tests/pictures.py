"""Pictures are saved empty where nobody looks: to draw one is half of a run."""

from collections.abc import Callable
from typing import Any

from matplotlib import figure as figure_lib

from vqt_jax.reports import run_pictures

_savefig = figure_lib.Figure.savefig
_read = run_pictures.read


def _save_empty(figure: figure_lib.Figure, *args: Any, **kwargs: Any) -> None:
  _savefig(figure_lib.Figure((1, 1)), *args, **kwargs)


def leave_empty(replace: Callable[[Any, str, Any], None]) -> None:
  """Has figures saved without what is in them; `replace` as `setattr`.

  And reports of runs without images.
  """
  replace(figure_lib.Figure, "savefig", _save_empty)
  replace(run_pictures, "read", lambda *args: [])


def draw(replace: Callable[[Any, str, Any], None]) -> None:
  """Has them saved as they are, again."""
  replace(figure_lib.Figure, "savefig", _savefig)
  replace(run_pictures, "read", _read)
