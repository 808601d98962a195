"""The built-in dataset "digits": scikit-learn's handwritten digits in TFDS.

1,797 grey images of 8x8 pixels, ten classes, from the test part of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), as
scikit-learn ships it (BSD-3-Clause). Nothing is downloaded.

Split: 100 images of each class are for training (1,000), the other 797 for
testing (74 to 83 of each class), drawn with a fixed seed. The digits are of 13
writers, who are in both splits.
"""

import contextlib
import io
import os

import numpy as np

from vqt_jax import errors
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds

SPLIT_SEED = 0
TRAIN_PER_CLASS = 100
MAX_INK = 16  # Stored values are 0..16.


def train_indices(labels: np.ndarray) -> np.ndarray:
  """Return the sorted numbers of the images (of 1,797) that are for training.

  Args:
    labels: int (n,), in scikit-learn's order.
  """
  generator = np.random.Generator(np.random.PCG64(SPLIT_SEED))
  chosen = [
    generator.permutation(np.flatnonzero(labels == digit))[:TRAIN_PER_CLASS]
    for digit in range(10)
  ]
  return np.sort(np.concatenate(chosen))


class Digits(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of the dataset; keys are scikit-learn's indices."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description="Scikit-learn's handwritten digits, 8x8 pixels.",
      homepage="https://doi.org/10.24432/C50P49",
      license="CC BY 4.0",
      citation=(
        "@misc{optical_digits, author={Alpaydin, E. and Kaynak, C.},"
        " title={Optical Recognition of Handwritten Digits}, year={1998},"
        " publisher={UCI Machine Learning Repository},"
        " doi={10.24432/C50P49}}"
      ),
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1)),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / MAX_INK)).astype(np.uint8)
    train = train_indices(digits.target)
    test = np.setdiff1d(np.arange(len(images)), train)
    return {
      "train": self._generate_examples(images, digits.target, train),
      "test": self._generate_examples(images, digits.target, test),
    }

  def _generate_examples(self, images, labels, indices):
    for index in indices:
      image, label = images[index][..., None], int(labels[index])
      yield int(index), {"image": image, "label": label}


def prepare(data_dir: str | None) -> None:
  """Write the dataset into the TFDS folder unless it is there (in a second).

  TFDS writes into a folder of another name and renames it at the end, so a
  process that stops midway leaves nothing that looks finished, and several
  processes may do so at once.

  Raises:
    UserError: the folder cannot be written.
  """
  data_dir = os.path.expanduser(data_dir) if data_dir else None
  with quiet():
    builder = tfds.builder("digits:*.*.*", data_dir=data_dir)
    if builder.is_prepared():
      return
    unseen = io.StringIO()  # TFDS prints and draws progress bars.
    try:
      with (
        contextlib.redirect_stdout(unseen),
        contextlib.redirect_stderr(unseen),
      ):
        builder.download_and_prepare()
    # TFDS makes RuntimeErrors of those of TensorFlow.
    except (OSError, RuntimeError, tf.errors.OpError) as error:
      if not builder.is_prepared():  # Or another process was faster.
        raise errors.UserError(
          f"Cannot write the dataset 'digits' to {builder.data_path}:"
          f" {error}. Set data_dir to a folder that can be written."
        ) from error
