"""Matplotlib, imported at first use, for figures that only go into files.

Such figures need no interactive backend, but Matplotlib cannot be imported if
`MPLBACKEND` names one that is not installed, as in the shell of a notebook.
"""

import contextlib
import functools
import os
import sys
import types


def __getattr__(name: str) -> types.ModuleType:
  if name != "matplotlib":
    raise AttributeError(name)
  return _matplotlib()


@functools.cache
def _matplotlib() -> types.ModuleType:
  named = None
  if "matplotlib" not in sys.modules:
    named = os.environ.pop("MPLBACKEND", None)
  try:
    import matplotlib
    import matplotlib.cm
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.font_manager
    import matplotlib.lines
    import matplotlib.patches
    import matplotlib.text
    import matplotlib.ticker
    import matplotlib.transforms
  finally:
    if named is not None:
      os.environ["MPLBACKEND"] = named
  if named:  # For others in this process.
    with contextlib.suppress(ValueError):
      matplotlib.rcParams["backend"] = named
  return matplotlib
