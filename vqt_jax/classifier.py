"""Visual query tuning as an estimator of scikit-learn."""

from collections.abc import Sequence
import dataclasses
import io
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
import PIL.Image
import sklearn.base
import sklearn.utils.validation

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.data import decoding
from vqt_jax.data import division
from vqt_jax.data import image_files
from vqt_jax.data import listing
from vqt_jax.models import methods
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import numerics
from vqt_jax.training import preemption
from vqt_jax.training import run
from vqt_jax.tuned import inputs
from vqt_jax.tuned import model as model_lib

# Fields of a config that images and labels take the place of.
_OF_DATA = (
  "task",
  "methods",
  "data_dir",
  "splits",
  "image_key",
  "label_key",
  "split_key",
  "split_seed",
  "num_classes",
  "fit",
  "skip_bad",
)
# Of methods that train queries, heads and editors on a few images.
_LR, _EPOCHS = (0.5, 0.25, 0.1, 0.05), 50
_SHIPPED = pathlib.Path(__file__).parent / "assets" / "fashion_vit.npz"


class Classifier(sklearn.base.ClassifierMixin, sklearn.base.BaseEstimator):
  """A classifier of images: a frozen ViT, and what is trained on it.

  X are n images: paths, PIL images, or uint8 arrays, also (n, height, width)
  and (n, height, width, channels).

  Attributes:
    model_: the trained `vqt_jax.Model`.
    classes_: sorted labels.
  """

  def __init__(
    self,
    backbone: str | os.PathLike | None = None,
    method: str = "vqt",
    *,
    image_size: int | None = None,
    image_fit: str = "squash",
    lr: Sequence[float] | None = None,
    weight_decay: Sequence[float] = (1e-4,),
    epochs: int | None = None,
    seeds: Sequence[int] = (0,),
    options: dict[str, Any] | None = None,
    verbose: bool = False,
  ):
    """Keep the settings; `fit` checks them.

    Args:
      backbone: as `load_backbone` takes it; None: the small one that is
        shipped.
      method: as `config.method`.
      image_size: pixels; None: 28 for the shipped backbone, else 224.
      image_fit: "squash", "crop" or "pad": how images are made to fit.
      lr: learning rates to try, per 256 images; the best one on a fifth of the
        images is trained on all. None: 0.5, 0.25, 0.1 and 0.05, but as
        published for "combo" and "auto". This and the next two do not apply to
        "instant", "linear" and "head2toe", whose heads are computed.
      weight_decay: weight decays to try.
      epochs: passes over the images; None: 50, but of "combo" and "auto" 40
        or more, see `config.epochs`.
      seeds: of the trained models, which answer together.
      options: further fields of a config, such as {"num_queries": 5}.
      verbose: whether to print progress.
    """
    self.backbone = backbone
    self.method = method
    self.image_size = image_size
    self.image_fit = image_fit
    self.lr = lr
    self.weight_decay = weight_decay
    self.epochs = epochs
    self.seeds = seeds
    self.options = options
    self.verbose = verbose

  def fit(self, X: Any, y: Sequence[Any]) -> "Classifier":
    """Train on images X (n) with labels y (n,).

    Raises:
      UserError: an image cannot be read, a class has too few of them, or a
        setting makes no sense.
      KeyboardInterrupt: it was asked to stop.
    """
    images, y = list(inputs.split(_with_channels(X))), np.asarray(y)
    if y.shape != (len(images),):
      raise errors.UserError(
        f"y: expected {len(images)} labels, one for each image in X, found"
        f" shape {y.shape}."
      )
    try:
      classes, numbers = np.unique(y, return_inverse=True)
    except TypeError as e:
      raise errors.UserError(
        "y: expected labels that can be sorted, such as numbers or names; some"
        f" are missing or of different types: {e}."
      ) from e
    console = console_lib.Console(None if self.verbose else io.StringIO())
    with tempfile.TemporaryDirectory(prefix="vqt_jax_") as scratch:
      folder = pathlib.Path(scratch)
      task = self._task(images, numbers, tuple(map(str, classes)), folder)
      config = resolve.resolve(self._config())
      with numerics.jax_defaults():
        try:
          run.run(config, folder / "run", console, task)
        except preemption.Stopped as e:  # What it saved goes with the folder.
          raise KeyboardInterrupt from e
      model = model_lib.load(folder / "run")
    chosen = model.info["results"]["chosen"]  # Nothing was left for a test.
    info = model.info | {"results": {"chosen": chosen}}
    self.classes_ = classes
    self.model_ = dataclasses.replace(model, info=info)
    return self

  def _config(self) -> config_dict.Config:
    config = config_dict.default_config()
    config.init = self.backbone or str(_SHIPPED)
    config.method = self.method
    config.image_size = self.image_size or (224 if self.backbone else 28)
    config.weight_decay, config.seeds = self.weight_decay, self.seeds
    if not methods.parse(self.method).trains_network:
      config.lr, config.epochs = _LR, _EPOCHS
    if self.lr is not None:
      config.lr = self.lr
    if self.epochs is not None:
      config.epochs = self.epochs
    options = dict(self.options or {})
    for name in options:
      if name.partition(".")[0] in _OF_DATA:
        raise errors.UserError(
          f"options: {name!r} describes data, which fit(X, y) is given; leave"
          " it out."
        )
    config.update(options)
    return config

  def _task(
    self,
    images: list[Any],
    numbers: np.ndarray,
    names: tuple[str, ...],
    folder: pathlib.Path,
  ) -> image_files.FileTask:
    """Make a task of images; those that are no files are written to a folder.

    Its test split is its val split: nothing is held out.
    """
    if len(set(names)) < 2:
      raise errors.UserError(
        f"y: expected at least two classes, found {', '.join(names) or 'none'}."
      )
    labelled = []
    for i, (image, number) in enumerate(zip(images, numbers)):
      file = _as_file(image, folder / f"{i}.png")
      name = str(file) if file.parent != folder else f"image {i}"
      labelled.append(listing.Labelled(file, name, names[number], ""))
    splits = division.divide(
      numbers.tolist(),
      division.random_keys([str(i) for i in range(len(labelled))], 0),
      image_files.same_bytes([image.file for image in labelled]),
      {"train": 0.8, "val": 0.2},
      names,
    )
    part = {
      name: tuple(x for x, split in zip(labelled, splits) if split == name)
      for name in ("train", "val")
    }
    task = image_files.FileTask(
      name="X",
      place=folder,
      class_names=names,
      images=part | {"test": part["val"]},
      fit=self.image_fit,
    )
    if faults := image_files.find_faults(task):
      name = min(faults)
      raise errors.UserError(
        f"X: {len(faults)} of {len(images)} images cannot be used, such as"
        f" {name}: {faults[name]}."
      )
    return task

  def predict_proba(self, X: Any) -> np.ndarray:
    """Probabilities of the classes, (n, classes)."""
    sklearn.utils.validation.check_is_fitted(self)
    return self.model_.predict_proba(_with_channels(X))

  def predict(self, X: Any) -> np.ndarray:
    """The most probable labels, (n,)."""
    best = self.predict_proba(X).argmax(axis=-1)
    return self.classes_[best]

  def save(self, directory: files.PathLike) -> None:
    """Write a bundle, which `vqt_jax.load` reads."""
    sklearn.utils.validation.check_is_fitted(self)
    self.model_.save(directory)


def _as_file(image: Any, path: pathlib.Path) -> pathlib.Path:
  """Return the file of an image; write one if it has none."""
  if isinstance(image, str | os.PathLike):
    return pathlib.Path(image).absolute()
  if not isinstance(image, bytes):
    if not isinstance(image, PIL.Image.Image):
      image = inputs.to_pillow(image)
    content = io.BytesIO()
    PIL.Image.fromarray(decoding.decode(image)).save(content, "PNG")
    image = content.getvalue()
  with files.explain_temporary_errors():
    path.write_bytes(image)
  return path


def _with_channels(X: Any) -> Any:
  """Return an array of grey images (n, height, width) as (n, ..., 1)."""
  return X[..., None] if getattr(X, "ndim", 0) == 3 else X
