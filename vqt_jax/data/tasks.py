"""Lookup of tasks by the names that a config has for them."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import image_files
from vqt_jax.data import labels
from vqt_jax.data import names
from vqt_jax.data import vtab
from vqt_jax.data.task import SPLITS
from vqt_jax.data.task import Task
from vqt_jax.data.task import TfdsTask
from vqt_jax.data.tensorflow_lazy import tfds

# VTAB-1k's sizes, for datasets with TFDS's usual two splits.
DEFAULT_SPLITS = {
  "train": "train[:800]",
  "val": "train[800:1000]",
  "test": "test",
}


def make_task(
  name: str,
  *,
  data_dir: str | None = None,
  splits: Mapping[str, str] | None = None,
  image_key: str | None = None,
  label_key: str | None = None,
  num_classes: int | None = None,
  split_key: str = "",
  split_seed: int = 0,
  fit: str = "squash",
) -> Task:
  """Return the task with a name. Decodes no image, and for VTAB reads no file.

  Args:
    name: one of VTAB's 19 (`VTAB`, or its official name), or any classification
      dataset of TFDS, or in `data_dir`, as `name[/config][:version]`. With a
      version a name of VTAB means the TFDS dataset: `cifar100:*.*.*`. Or the
      path of a folder or table of images, which begins with `/`, `.` or `~`.
    data_dir: TFDS folder; empty or None is TFDS's own.
    splits: "train", "val", "trainval", "test" -> TFDS split strings. Default of
      those that are missing or empty: `train[:800]`, `train[800:1000]`, train
      and val together, `test`. For a folder or table, shares such as "20%" of
      splits that are not given there; default 20 % for val and for test.
    image_key: name of the image feature. Default: the one the dataset names for
      supervised learning, or the only one. For a table, the column of paths.
    label_key: name of the label feature, or column; default as for the image.
    num_classes: default: that of the label feature.
    split_key: column of the splits of a table.
    split_seed: of the division of a folder or table.
    fit: how the images of a folder or table are made to fit; see
      `decoding.FITS`.

  Raises:
    UserError: a name or feature is unknown, several features may be meant, or a
      setting is given for a VTAB task, where all is fixed.
  """
  data_dir = data_dir or None
  given = {key: text for key, text in (splits or {}).items() if text}
  if unknown := sorted(set(given) - set(SPLITS)):
    raise errors.UserError(
      f"Unknown splits {unknown}; a task has: {', '.join(SPLITS)}."
    )
  if names.is_path(name) and not names.is_written_by_tfds(name):
    if num_classes:
      raise errors.UserError(
        f"num_classes={num_classes}: a folder or table of images, such as"
        f" {name}, tells its classes itself. Leave it out."
      )
    return image_files.make_task(
      name,
      image_key=image_key or "",
      label_key=label_key or "",
      split_key=split_key,
      shares=_shares(given),
      split_seed=split_seed,
      fit=fit,
    )
  if split_key or fit != "squash":
    setting = f"split_key={split_key}" if split_key else f"fit={fit}"
    raise errors.UserError(
      f"{setting} is for folders and tables of images, by their path; {name!r}"
      " is a dataset of TFDS, whose images are resized as VTAB's are. For a"
      f" folder of that name: ./{name}"
    )
  task = vtab.find_task(name)
  if task is None:
    return _tfds_task(name, data_dir, given, image_key, label_key, num_classes)
  if given or image_key or label_key or num_classes:
    raise errors.UserError(
      f"{name!r} is a VTAB-1k task: its splits, features and classes are"
      " fixed. For the whole dataset with settings of your own, give its TFDS"
      f" name with a version: {task.builder!r}."
    )
  return dataclasses.replace(task, data_dir=data_dir)


def _shares(given: Mapping[str, str]) -> dict[str, float]:
  """Parse shares such as "20%"; train has what val and test leave."""
  shares = {
    "val": image_files.SHARES["val"],
    "test": image_files.SHARES["test"],
  }
  for split, text in given.items():
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if not found or split not in image_files.SHARES:
      raise errors.UserError(
        f"splits.{split}={text!r}: for a folder or table of images expected the"
        " share of val and of test, such as 20%; the splits of a dataset of"
        " TFDS are not for it."
      )
    shares[split] = float(found[1]) / 100
  shares = {"train": 1 - shares["val"] - shares["test"], **shares}
  if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
    listed = ", ".join(f"{key} {100 * x:g} %" for key, x in shares.items())
    raise errors.UserError(
      f"The shares of the splits, {listed}, are not all above 0 and 100 % in"
      " all: give splits.val and splits.test."
    )
  return {split: shares[split] for split in image_files.SHARES}


def _tfds_task(
  name: str,
  data_dir: str | None,
  splits: dict[str, str],
  image_key: str | None,
  label_key: str | None,
  num_classes: int | None,
) -> TfdsTask:
  """Make a task on any TFDS dataset, which tells its features itself."""
  request = str(names.parse_request(name, data_dir))
  info = builders.find_builder(request, data_dir).info
  if not isinstance(info.features, tfds.features.FeaturesDict):
    raise errors.UserError(
      f"Dataset {name!r} has no named features, so it is not for"
      " classification."
    )
  image_key, label_key = _keys(name, info, image_key, label_key)
  number = _num_classes(name, label_key, info, num_classes)
  named = getattr(info.features[label_key], "names", None) or ()
  filled = DEFAULT_SPLITS | splits
  filled.setdefault("trainval", f"{filled['train']}+{filled['val']}")
  return TfdsTask(
    name=name,
    builder=request,
    num_classes=number,
    splits={split: filled[split] for split in SPLITS},
    label=labels.feature(label_key),
    image_key=image_key,
    data_dir=data_dir,
    class_names=tuple(named) if len(named) >= number else (),
  )


def _keys(
  name: str, info: Any, image_key: str | None, label_key: str | None
) -> tuple[str, str]:
  """Find the names of the image and the label feature."""
  features = dict(sorted(info.features.items()))  # TFDS's order varies.
  images = [key for key, value in features.items() if _is_image(value)]
  integers = [key for key, value in features.items() if _is_integer(value)]
  label = tfds.features.ClassLabel
  classes = [key for key in integers if isinstance(features[key], label)]
  if not images:
    found = "; ".join(f"{key}: {value}" for key, value in features.items())
    raise errors.UserError(
      f"No feature of dataset {name!r} can be the image: expected pictures of"
      f" 8 bits and 1, 3 or 4 channels. It has {found[:300]}."
    )
  return (
    _key(name, "image", image_key, images, images, info),
    _key(name, "label", label_key, integers, classes, info),
  )


def _key(
  name: str,
  kind: str,
  given: str | None,
  usable: list[str],
  likely: list[str],
  info: Any,
) -> str:
  """Check the given name of a `kind` of feature, or find the likely one."""
  if given in usable:
    return given
  if given:
    there = given in info.features
    found = f"is {info.features[given]}" if there else "does not exist"
    raise errors.UserError(
      f"{kind}_key {given!r} of dataset {name!r} {found}. Features that can be"
      f" the {kind}: {', '.join(usable) or 'none'}."
    )
  supervised = [key for key in info.supervised_keys or () if key in likely]
  for choice in (supervised, likely):
    if len(choice) == 1:
      return choice[0]
  near = [task.name for task in vtab.VTAB.values() if task.dataset == name]
  raise errors.UserError(
    f"Which feature of dataset {name!r} is the {kind}? Candidates:"
    f" {', '.join(likely) or 'none'}. Set {kind}_key."
    + (f" VTAB-1k tasks on it: {', '.join(near)}." if near else "")
  )


def _is_image(value: Any) -> bool:
  """Return whether a feature is a picture of 8 bits: grey, RGB or RGBA."""
  return (
    isinstance(value, tfds.features.Image)
    and value.np_dtype == np.uint8
    and value.shape[-1] != 2
  )


def _is_integer(value: Any) -> bool:
  """Return whether a feature is one integer, such as a `ClassLabel`."""
  return (
    isinstance(value, tfds.features.Tensor)
    and value.shape == ()
    and np.issubdtype(value.np_dtype, np.integer)
  )


def _num_classes(
  name: str, label_key: str, info: Any, num_classes: int | None
) -> int:
  number = num_classes or getattr(info.features[label_key], "num_classes", None)
  if not number:
    raise errors.UserError(
      f"Dataset {name!r} does not tell how many classes {label_key!r} has."
      " Set num_classes."
    )
  return number
