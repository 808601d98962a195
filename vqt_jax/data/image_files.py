"""Tasks on image files: a folder per class, or a table of files and labels."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import stat
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.data import decoding
from vqt_jax.data import division
from vqt_jax.data import listing
from vqt_jax.data import preprocess
from vqt_jax.data import source
from vqt_jax.data.rows import Batch
from vqt_jax.data.rows import ProcessRows

# Shares of the images of each class, where no splits are given.
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}

_PARTS = {
  "train": ("train",),
  "val": ("val",),
  "trainval": ("train", "val"),
  "test": ("test",),
}
# Threads, since Pillow works without Python's lock; some wait for the disk.
_WORKERS = 2 * (os.cpu_count() or 1)
_AHEAD = 2  # Batches that are decoded while one is used.


@dataclasses.dataclass(frozen=True)
class FileTask:
  """A classification task on image files.

  Attributes:
    name: of the folder or table.
    place: its path.
    class_names: sorted.
    images: "train", "val", "test" -> images, in random order.
    fit: how images are made to fit, one of `decoding.FITS`.
    divided: names of the splits that were not given, but divided here.
    notes: what a user should know.
  """

  name: str
  place: pathlib.Path
  class_names: tuple[str, ...]
  images: Mapping[str, tuple[listing.Labelled, ...]]
  fit: str = "squash"
  divided: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  group = ""
  splits = {split: "+".join(parts) for split, parts in _PARTS.items()}

  @property
  def dataset(self) -> str:
    return self.name

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @functools.cached_property
  def class_numbers(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self.class_names)}

  def of(self, split: str) -> list[listing.Labelled]:
    """Images of a split, or of "trainval", in stored order."""
    return [image for part in _PARTS[split] for image in self.images[part]]

  def counts(self) -> dict[str, np.ndarray]:
    """Images of each class, (C,), by "train", "val" and "test"."""
    return {
      split: np.bincount(load_labels(self, split), minlength=self.num_classes)
      for split in self.images
    }


def make_task(
  place: str | os.PathLike,
  *,
  image_key: str = "",
  label_key: str = "",
  split_key: str = "",
  shares: Mapping[str, float] = SHARES,
  split_seed: int = 0,
  fit: str = "squash",
) -> FileTask:
  """Make the task of a folder or table; lists files, but decodes none.

  Splits that are not given are taken from what is to be trained on.

  Args:
    place, image_key, label_key, split_key: as of `listing.list_labelled`.
    shares: split -> share of the images of each class.
    split_seed: of the division.
    fit: how images are made to fit, one of `decoding.FITS`.

  Raises:
    UserError: no images, wrong rows, one class only, or a class with too few
      images to be divided.
  """
  if fit not in decoding.FITS:
    raise errors.unknown_name("fit", fit, decoding.FITS)
  labelled = listing.list_labelled(
    place, image_key=image_key, label_key=label_key, split_key=split_key
  )
  path = pathlib.Path(os.path.expanduser(place))
  names = _sorted_names({image.label for image in labelled})
  if len(names) == 1:
    raise errors.UserError(
      f"All {len(labelled)} images in {path} are of one class, {names[0]!r}:"
      " there is nothing to tell apart. Expected a folder, or a label, for"
      " each of two classes or more."
    )
  numbers = {name: i for i, name in enumerate(names)}
  keys = division.random_keys([x.name for x in labelled], split_seed)
  groups = same_bytes([image.file for image in labelled])
  given = {image.split for image in labelled} - {""}
  divided = [split for split in SHARES if split not in given]
  if given and "train" in divided:
    raise errors.UserError(
      f"{path} has images for {' and '.join(sorted(given))}, but none to train"
      " on: expected some in train."
    )
  splits = [image.split or "train" for image in labelled]
  if divided:
    pool = [i for i, split in enumerate(splits) if split == "train"]
    parts = ["train", *(split for split in divided if split != "train")]
    whole = sum(shares[split] for split in parts)
    found = division.divide(
      [numbers[labelled[i].label] for i in pool],
      [keys[i] for i in pool],
      [groups[i] for i in pool],
      {split: shares[split] / whole for split in parts},
      names,
    )
    for i, split in zip(pool, found):
      splits[i] = split
  ordered = sorted(range(len(labelled)), key=keys.__getitem__)
  return FileTask(
    name=path.name if path.is_dir() else path.stem,
    place=path,
    class_names=names,
    images={
      split: tuple(labelled[i] for i in ordered if splits[i] == split)
      for split in SHARES
    },
    fit=fit,
    divided=tuple(divided),
    notes=tuple(_notes_on_copies(labelled, groups, splits)),
  )


def same_bytes(files: Sequence[pathlib.Path]) -> list[int]:
  """Number files such that those with the same bytes have the same number.

  Only files of the same size are read.
  """
  sizes = [_version(file)[0] for file in files]
  shared = collections.Counter(sizes)
  compared = [i for i, size in enumerate(sizes) if size and shared[size] > 1]
  with futures.ThreadPoolExecutor(_WORKERS) as pool:
    digests = pool.map(_digest, [files[i] for i in compared])
    found, first = list(range(len(files))), {}
    for i, digest in zip(compared, digests):
      found[i] = first.setdefault(digest, i) if digest else i
  return found


def _version(file: pathlib.Path) -> tuple[int, int]:
  """Size and time of change of a file; zeros if it is none, or missing."""
  try:
    found = os.stat(file)
  except OSError:
    return 0, 0
  is_file = stat.S_ISREG(found.st_mode)
  return (found.st_size, found.st_mtime_ns) if is_file else (0, 0)


def _digest(file: pathlib.Path) -> bytes | None:
  try:
    with open(file, "rb") as opened:
      return hashlib.file_digest(opened, "sha256").digest()
  except OSError:
    return None


def _notes_on_copies(
  labelled: Sequence[listing.Labelled],
  groups: Sequence[int],
  splits: Sequence[str],
) -> Iterator[str]:
  """Say which images are there more than once, and where this matters."""
  members = collections.defaultdict(list)
  for i, group in enumerate(groups):
    members[group].append(i)
  copied = [group for group in members.values() if len(group) > 1]
  if not copied:
    return
  example = " = ".join(labelled[i].name for i in copied[0][:2])
  copies = sum(map(len, copied)) - len(copied)
  note = f"{copies} of {len(labelled)} images are copies of others ({example})"
  for what, of in (
    ("class", [image.label for image in labelled]),
    ("split", splits),
  ):
    torn = [g for g in copied if len({of[i] for i in g}) > 1]
    if torn:
      example = " = ".join(labelled[i].name for i in torn[0][:2])
      note += f"; {len(torn)} are in more than one {what} ({example})"
  yield note


def _sorted_names(names: Iterable[str]) -> tuple[str, ...]:
  """Sort classes by name, or by value if all are whole numbers."""
  try:
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  except ValueError:
    return tuple(sorted(names))


@source.check_prepared.register
def check_prepared(task: FileTask) -> None:
  for split, images in task.images.items():
    if not images:
      raise errors.UserError(f"No image in {task.place} is for {split}.")


@source.num_examples.register
def num_examples(task: FileTask, split: str) -> int:
  return len(task.of(split))


@source.num_bytes.register
def num_bytes(task: FileTask, split: str) -> int:
  return sum(_version(image.file)[0] for image in task.of(split))


@source.is_concatenation.register
def is_concatenation(
  task: FileTask, parts: tuple[str, ...], whole: str
) -> bool:
  return tuple(parts) == _PARTS[whole]


@source.images_fingerprint.register
def images_fingerprint(task: FileTask, split: str) -> dict[str, Any]:
  rows = [[image.name, *_version(image.file)] for image in task.of(split)]
  return {"fit": task.fit, "files": _sha256(rows)}


@source.dataset_identity.register
def dataset_identity(task: FileTask) -> dict[str, Any]:
  rows = [
    [split, image.name, image.label, _version(image.file)[0]]
    for split, images in task.images.items()
    for image in images
  ]
  return {
    "dataset": task.name,
    "image_key": "",
    "num_classes": task.num_classes,
    "splits": {
      split: {"slices": task.splits[split], "images": num_examples(task, split)}
      for split in task.splits
    },
    "sha256": _sha256(rows),
  }


def _sha256(rows: list[Any]) -> str:
  return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@source.notes.register
def notes(task: FileTask) -> list[str]:
  return list(task.notes)


@source.find_faults.register
def find_faults(
  task: FileTask,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
  """Decode every image once; see `source.find_faults`."""
  images = [image for part in task.images.values() for image in part]
  faults = {}
  with futures.ThreadPoolExecutor(_WORKERS) as pool:
    find = lambda image: _fault(image.file, _version(image.file))
    found = pool.map(find, images)
    for done, (image, fault) in enumerate(zip(images, found), 1):
      if fault:
        faults[image.name] = fault
      progress(done, len(images))
  return dict(sorted(faults.items()))


@functools.cache
def _fault(file: pathlib.Path, version: tuple[int, int]) -> str | None:
  """Fault of a version of a file; each is looked at once in a process."""
  del version
  return decoding.find_fault(file)


@source.leave_out.register
def leave_out(task: FileTask, faults: Mapping[str, str]) -> FileTask:
  images = {
    split: tuple(image for image in part if image.name not in faults)
    for split, part in task.images.items()
  }
  if not any(images.values()):
    raise errors.UserError(
      f"None of the {len(faults)} images in {task.place} can be used; the"
      f" first one is {min(faults)}: {faults[min(faults)]}."
    )
  task = dataclasses.replace(task, images=images)
  check_prepared(task)
  return task


@source.pick.register
def pick(task: FileTask, split: str, positions: Sequence[int]) -> FileTask:
  some = tuple(task.images[split][i] for i in positions)
  return dataclasses.replace(task, images={**task.images, split: some})


@source.example_names.register
def example_names(task: FileTask, split: str) -> list[str]:
  return [image.name for image in task.of(split)]


@source.load_labels.register
def load_labels(task: FileTask, split: str) -> np.ndarray:
  numbers = task.class_numbers
  return np.array([numbers[x.label] for x in task.of(split)], np.int32)


@source.read.register
def read(
  task: FileTask,
  split: str,
  rows: ProcessRows,
  *,
  start: int,
  shuffle: int | None,
  image_size: preprocess.ImageSize,
  value_range: str,
  resize: str,
) -> Iterator[Batch]:
  """Decode in threads, ahead of use; see `source.read`."""
  size = preprocess.checked_size(image_size)
  if resize != "bilinear":
    raise errors.UserError(
      f"config.resize={resize} is for datasets of TFDS: image files are resized"
      " with antialiasing. Leave it out."
    )
  check_prepared(task)
  order = np.arange(num_examples(task, split))
  if shuffle is not None:
    order = np.random.default_rng(shuffle).permutation(order)
  first = rows.process_index * rows.count
  batches = (
    order[step + first : step + first + rows.count]
    for step in range(start, len(order), rows.batch_size)
  )
  return _decode_ahead(task, split, batches, size, value_range)


def _decode_ahead(
  task: FileTask,
  split: str,
  batches: Iterable[np.ndarray],
  size: tuple[int, int],
  value_range: str,
) -> Iterator[Batch]:
  """Yield batches of so many images of a split, decoded ahead of use."""
  images, labels = task.of(split), load_labels(task, split)

  def decode(number: int, pixels: np.ndarray) -> None:
    image = decoding.read(images[number].file, size, task.fit)
    pixels[:] = decoding.scale(image, value_range)

  def begin(numbers: np.ndarray) -> tuple[Batch, list[futures.Future]]:
    pixels = np.empty((len(numbers), *size, 3), np.float32)
    jobs = [pool.submit(decode, *job) for job in zip(numbers, pixels)]
    return {"image": pixels, "label": labels[numbers]}, jobs

  def finish(batch: Batch, jobs: list[futures.Future]) -> Batch:
    for job in jobs:
      job.result()
    return batch

  pool, queue = futures.ThreadPoolExecutor(_WORKERS), collections.deque()
  try:
    for numbers in batches:
      queue.append(begin(numbers))
      if len(queue) > _AHEAD:
        yield finish(*queue.popleft())
    while queue:
      yield finish(*queue.popleft())
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
