"""TensorFlow and TFDS: imported at first use, on the CPU only, and silent.

Importing this module imports neither. `tf` and `tfds` become the real modules
when an attribute is first used; TensorFlow then sees no accelerator, so that it
takes no memory away from JAX. `tfds_code` is TFDS without TensorFlow, which
takes seconds to import: for what TFDS's code says of itself, names and versions
of datasets, and nothing that reads one.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import sys
import tempfile

from absl import logging
from etils import epy

# The note on oneDNN (matrix products, of which decoding and resizing have none)
# only goes away with oneDNN itself.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Keras makes a folder at home; for a user without one, one called "~" here.
if os.path.expanduser("~") == "~":
  os.environ.setdefault("KERAS_HOME", f"{tempfile.gettempdir()}/.keras")


def _drop_missing_backend() -> None:
  """Forget a backend of Matplotlib that is not installed here.

  Such as that of a notebook, in its shell: TFDS imports Matplotlib, which ends
  then. A backend that is installed stays.
  """
  scheme, _, module = os.environ.get("MPLBACKEND", "").partition("module://")
  if not module or scheme or "matplotlib" in sys.modules:
    return
  try:
    found = importlib.util.find_spec(module)
  except ImportError:  # Of the package that it is in.
    found = None
  if not found:
    del os.environ["MPLBACKEND"]


_drop_missing_backend()


def _set_up(_: str) -> None:
  # Also after TFDS alone, which would start TensorFlow unrestricted.
  import tensorflow

  for kind in ("GPU", "TPU"):
    tensorflow.config.set_visible_devices([], kind)


with epy.lazy_imports(success_callback=_set_up):
  import tensorflow as tf  # noqa: F401
  import tensorflow_datasets as tfds  # noqa: F401
with epy.lazy_imports():
  import tensorflow_datasets as tfds_code  # noqa: F401


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Suppress what TFDS logs below the level of an error."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)
