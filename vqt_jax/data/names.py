"""Names of datasets, their folders, and explanations of wrong names.

A request is `name[/config][:version]`. It means the folder of that name in the
data folder, whatever its characters; where there is none, a dataset of TFDS's
code, whose names are Python's.
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import pathlib
import re
from typing import Any

from etils import epath

from vqt_jax import errors
from vqt_jax.data import listing
from vqt_jax.data import vtab
from vqt_jax.data.tensorflow_lazy import tfds_code

# The project's own dataset; see `digits.py`.
DIGITS = "digits"

NEWEST = "*.*.*"

_REQUEST = re.compile(r"([^/:\\]+)(?:/([^/:\\]+))?(?::(.*))?")
_NUMBER = r"(0|[1-9]\d*|\*)"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}")
_HUBS = ("hf", "huggingface", "kaggle", "openml", "torchvision")
_MOST_FOLDERS = 50  # are looked into.


@dataclasses.dataclass(frozen=True)
class Request:
  """A dataset that is asked for.

  Attributes:
    name: of the dataset.
    config: of the dataset, or "".
    version: may have stars.
    data_dir: TFDS folder; None is TFDS's own.
  """

  name: str
  config: str
  version: str
  data_dir: str | None

  @property
  def dataset(self) -> str:
    return f"{self.name}/{self.config}" if self.config else self.name

  @property
  def place(self) -> epath.Path:
    """Folder of the dataset, with all its configs and versions."""
    return data_folder(self.data_dir) / self.name

  def __str__(self) -> str:
    return f"{self.dataset}:{self.version}"


def parse_request(text: str, data_dir: str | None) -> Request:
  """Parse a request; without a version it is for the newest.

  Raises:
    UserError: it is a path, for another hub, or otherwise not a request.
  """
  hub = text.partition(":")[0].lower()
  if hub in _HUBS or ("://" in text and hub != "gs"):
    last = re.split("[:/]", text.rstrip("/"))[-1]
    raise errors.UserError(
      f"{text!r} is a dataset of another hub or site, which is not read from"
      " here: expected a VTAB-1k task, a name in TFDS, a folder in data_dir, or"
      " the path of a folder or table of images (docs/your_images.md)."
      + (f" TFDS has {last!r}." if is_tfds_name(last) else "")
    )
  if hub == "gs" or is_path(text):
    raise errors.UserError(_explain_path(text))
  found = _REQUEST.fullmatch(text)
  if not found:
    raise errors.UserError(
      f"{text!r} is not a dataset request; expected name[/config][:version],"
      " for example 'cifar10', 'eurosat/rgb' or 'svhn_cropped:3.0.0'."
    )
  name, config, version = found.groups()
  version = NEWEST if version is None else version
  return Request(name, config or "", version, data_dir)


def check_known(text: str, data_dir: str | None) -> None:
  """Refuse the name of no task, at once: without TensorFlow or a network.

  Raises:
    UserError: it is not a request, or neither TFDS nor the folder has such a
      dataset.
  """
  known = text == vtab.ALL or vtab.find_task(text)
  if known or is_path(text) or "://" in (data_dir or ""):
    return
  request = parse_request(text, data_dir)
  if not (is_tfds_name(request.name) or request.place.is_dir()):
    raise errors.UserError(explain_unknown(request))


def is_path(text: str) -> bool:
  """Return whether a task is named by the path of its images."""
  return text.startswith(("/", ".", "~"))


def is_written_by_tfds(text: str) -> bool:
  """Return whether a path is of a dataset of TFDS, or a version of one."""
  path = pathlib.Path(os.path.expanduser(text))
  if not path.exists():
    return bool(_VERSION.fullmatch(path.name))
  levels = ("", "*/", "*/*/")  # Of the version, the config, the dataset.
  return any(any(path.glob(f"{x}dataset_info.json")) for x in levels)


def find_version_folder(request: Request) -> epath.Path | None:
  """Return the folder of the newest version that is asked for, or None.

  Raises:
    UserError: what is asked for is not a version.
  """
  if not _VERSION.fullmatch(request.version):
    known = is_tfds_name(request.name)
    explain = _explain_no_version if known else explain_unknown
    raise errors.UserError(explain(request))
  folder = request.place / request.config
  versions = _matching(_versions_in(folder), request)
  if not versions:
    return None
  folder /= str(versions[-1])
  return folder if (folder / "features.json").exists() else None


def is_tfds_name(name: str) -> bool:
  """Return whether TFDS can prepare a dataset of that name (again)."""
  known = tfds_code.list_builders(with_community_datasets=False)
  return name == DIGITS or name in known


def data_folder(data_dir: str | None) -> epath.Path:
  """Path of the TFDS folder; None is TFDS's own."""
  folder = data_dir or tfds_code.core.constants.DATA_DIR
  return epath.Path(os.path.expanduser(folder))


def explain_unknown(request: Request) -> str:
  """Say that there is no such dataset, and which one may be meant."""
  if request.place.is_dir():
    return _explain_not_in_folder(request)
  return (
    f"Unknown task or dataset {request.dataset!r}: expected a VTAB-1k task, a"
    " name in TFDS, or a folder in data_dir"
    f" ({request.data_dir or 'not given'})."
    + (
      _suggest_names(request)
      or f" The VTAB-1k tasks are: {', '.join(vtab.VTAB)}."
    )
  )


def explain_unusable(request: Request, error: Exception) -> str:
  """Say what is wrong with a request that TFDS refuses."""
  if is_tfds_name(request.name):
    configs = tfds_code.builder_cls(request.name).builder_configs
    if request.config and request.config not in configs:
      known = ", ".join(configs) or "none"
      return (
        f"Dataset {request.name!r} has no config {request.config!r}. Its"
        f" configs: {known}."
      )
    if not _matching(_tfds_versions(request), request):
      return _explain_no_version(request)
  lines = str(error).strip().splitlines() or [type(error).__name__]
  reason = lines[0].rpartition('}": ')[2].rstrip(".")
  return f"Dataset {request.dataset!r} cannot be used: {reason}."


def _explain_path(text: str) -> str:
  path = epath.Path(os.path.expanduser(text))
  if tfds_code.core.Version.is_valid(path.name):
    path = path.parent
  return (
    f"{text!r} is the path of a dataset: expected its name. If TFDS wrote it"
    f" there, set data_dir to {os.fspath(path.parent)!r} and task to"
    f" {path.name!r}."
  )


def _explain_not_in_folder(request: Request) -> str:
  """Say what a dataset's folder holds in place of what is asked for."""
  name, place = request.name, request.place
  versions = _versions_in(place / request.config)
  if versions and not _matching(versions, request):
    return _explain_no_version(request)
  if not versions:
    configs = [path.name for path in place.iterdir() if _versions_in(path)]
    if configs:
      listed = ", ".join(f"{name}/{config}" for config in sorted(configs))
      return f"Dataset {request.dataset!r} is not in {place}. There: {listed}."
    if image := _first_image(place):
      path = os.fspath(place)
      return (
        f"{place} holds images ({image.relative_to(place)}, ...), not a dataset"
        " that TFDS wrote. To train on them, give their path as the task:"
        f" {path if is_path(path) else f'./{path}'}"
      )
  return (
    f"No dataset {str(request)!r} in {place}: expected"
    f" {name}/[config/]version/ with dataset_info.json and features.json, as"
    " TFDS writes them."
  )


def _explain_no_version(request: Request) -> str:
  listed = lambda versions: ", ".join(map(str, versions)) or "none"
  here = _versions_in(request.place / request.config)
  made = _tfds_versions(request)
  return (
    f"Dataset {request.dataset!r} has no version {request.version!r}. In"
    f" {request.place.parent}: {listed(here)}"
    + (f"; TFDS can prepare: {listed(made)}" if made else "")
    + ". Without a version the newest is taken."
  )


def _tfds_versions(request: Request) -> list[Any]:
  """Versions that TFDS's code can prepare, newest first."""
  if not is_tfds_name(request.name):
    return []
  cls = tfds_code.builder_cls(request.name)
  configs = cls.builder_configs
  config = configs.get(request.config) or next(iter(configs.values()), None)
  found = [cls.VERSION, *cls.SUPPORTED_VERSIONS]
  if config:
    found += [config.version, *config.supported_versions]
  found = {tfds_code.core.Version(version) for version in found if version}
  return sorted(found, reverse=True)


def _versions_in(folder: epath.Path) -> list[Any]:
  """Versions that have a folder in a folder, oldest first."""
  is_version = tfds_code.core.Version.is_valid
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    names = [path.name for path in folder.iterdir()]
    return sorted(
      tfds_code.core.Version(name) for name in names if is_version(name)
    )
  return []


def _matching(versions: list[Any], request: Request) -> list[Any]:
  """Select the versions that a request asks for."""
  if not _VERSION.fullmatch(request.version):
    return []
  return [each for each in versions if each.match(request.version)]


def _suggest_names(request: Request) -> str:
  """A sentence with the nearest known names, or ""."""
  known = {*vtab.VTAB, *vtab.OFFICIAL_NAMES, DIGITS}
  known.update(tfds_code.list_builders(with_community_datasets=False))
  folder = request.place.parent
  if folder.is_dir():
    known.update(path.name for path in folder.iterdir() if path.is_dir())
  near = difflib.get_close_matches(request.name, sorted(known), 5, 0.5)
  return f" Nearest names: {', '.join(map(repr, near))}." if near else ""


def _first_image(folder: epath.Path) -> epath.Path | None:
  """Path of an image in a local folder or below it, or None."""
  walk = itertools.islice(os.walk(folder), _MOST_FOLDERS)
  for place, folders, names in walk:
    folders.sort()
    for name in sorted(names):
      if listing.is_image_name(name):
        return epath.Path(place) / name
  return None
