"""Tasks and their examples: TFDS -> arrays and batches of numpy.

Importing this does not import TensorFlow; its first use does.
"""

from vqt_jax.data.builders import check_prepared
from vqt_jax.data.builders import dataset_identity
from vqt_jax.data.builders import expected_examples
from vqt_jax.data.builders import images_fingerprint
from vqt_jax.data.builders import is_concatenation
from vqt_jax.data.builders import is_prepared
from vqt_jax.data.builders import num_bytes
from vqt_jax.data.builders import num_examples
from vqt_jax.data.builders import prepare_command
from vqt_jax.data.builders import size_warning
from vqt_jax.data.classes import check_classes
from vqt_jax.data.pipeline import batches
from vqt_jax.data.pipeline import load_arrays
from vqt_jax.data.pipeline import load_labels
from vqt_jax.data.pipeline import train_batches
from vqt_jax.data.task import SPLITS
from vqt_jax.data.task import Task
from vqt_jax.data.tasks import make_task
from vqt_jax.data.vtab import VTAB

__all__ = [
  "SPLITS",
  "VTAB",
  "Task",
  "batches",
  "check_classes",
  "check_prepared",
  "dataset_identity",
  "expected_examples",
  "images_fingerprint",
  "is_concatenation",
  "is_prepared",
  "load_arrays",
  "load_labels",
  "make_task",
  "num_bytes",
  "num_examples",
  "prepare_command",
  "size_warning",
  "train_batches",
]
