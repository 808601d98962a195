"""Matplotlib, for figures that only go into files.

Figures need no backend of the screen, but Matplotlib cannot be imported where
`MPLBACKEND` names one that is not installed, as in the shell of a notebook.
"""

import contextlib
import os
import sys

_named = None
if "matplotlib" not in sys.modules:
  _named = os.environ.pop("MPLBACKEND", None)
try:
  import matplotlib
  import matplotlib.cm
  import matplotlib.colors
  import matplotlib.figure
  import matplotlib.lines
  import matplotlib.patches
  import matplotlib.ticker
  import matplotlib.transforms
finally:
  if _named is not None:
    os.environ["MPLBACKEND"] = _named
if _named:  # For others in this process.
  with contextlib.suppress(ValueError):
    matplotlib.rcParams["backend"] = _named

__all__ = ["matplotlib"]
