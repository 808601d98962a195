"""Tasks and their examples as arrays and batches of numpy.

They are datasets of TFDS (importing this does not import TensorFlow; its first
use does), or image files in folders and tables.
"""

from vqt_jax.data import image_files
from vqt_jax.data import tfds_source
from vqt_jax.data.builders import is_prepared
from vqt_jax.data.builders import prepare_command
from vqt_jax.data.builders import size_warning
from vqt_jax.data.classes import balanced_weights
from vqt_jax.data.classes import check_classes
from vqt_jax.data.image_files import FileTask
from vqt_jax.data.pipeline import batches
from vqt_jax.data.pipeline import load_arrays
from vqt_jax.data.pipeline import train_batches
from vqt_jax.data.source import check_prepared
from vqt_jax.data.source import dataset_identity
from vqt_jax.data.source import example_names
from vqt_jax.data.source import expected_examples
from vqt_jax.data.source import find_faults
from vqt_jax.data.source import images_fingerprint
from vqt_jax.data.source import is_concatenation
from vqt_jax.data.source import leave_out
from vqt_jax.data.source import load_labels
from vqt_jax.data.source import notes
from vqt_jax.data.source import num_bytes
from vqt_jax.data.source import num_examples
from vqt_jax.data.source import pick
from vqt_jax.data.task import SPLITS
from vqt_jax.data.task import Task
from vqt_jax.data.task import TfdsTask
from vqt_jax.data.tasks import make_task
from vqt_jax.data.vtab import VTAB

SOURCES = (image_files, tfds_source)  # Known to `source` once imported.

__all__ = [
  "FileTask",
  "SOURCES",
  "SPLITS",
  "VTAB",
  "Task",
  "TfdsTask",
  "balanced_weights",
  "batches",
  "check_classes",
  "check_prepared",
  "dataset_identity",
  "example_names",
  "expected_examples",
  "find_faults",
  "images_fingerprint",
  "is_concatenation",
  "is_prepared",
  "leave_out",
  "load_arrays",
  "load_labels",
  "make_task",
  "notes",
  "num_bytes",
  "num_examples",
  "pick",
  "prepare_command",
  "size_warning",
  "train_batches",
]
