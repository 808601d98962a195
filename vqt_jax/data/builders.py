"""Datasets on disk: where they are, their sizes, and what is wrong with them.

Nothing here downloads. TFDS is asked only for what is in the data folder, and
the error for a dataset that is not there names the command that prepares it.
(TFDS itself would try the network for minutes.)
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
from typing import Any

from etils import epath
from google.protobuf import json_format

from vqt_jax import errors
from vqt_jax.data import names
from vqt_jax.data import source
from vqt_jax.data.task import SPLITS
from vqt_jax.data.task import TfdsTask
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds
from vqt_jax.data.tensorflow_lazy import tfds_code
from vqt_jax.runtime import files

# Packages whose failures are a bucket's.
_CLIENTS = ("aiohttp", "gcsfs", "google")

# Sizes that differ from the table's and are as good: the builder skips one
# broken image of SUN397, which is in none of VTAB-1k's slices.
_ALSO_RIGHT = {("sun397", "train"): 76127}


def find_builder(request: str, data_dir: str | None) -> Any:
  """Return the TFDS builder of `name[/config][:version]`, prepared or not.

  Files on disk take precedence over TFDS's code, and suffice without it.

  Args:
    request: see `names`; its version may be `*.*.*`.
    data_dir: TFDS folder, or None for TFDS's own.

  Raises:
    UserError: neither TFDS nor the folder has such a dataset, or the folder
      cannot be read.
  """
  wanted = names.parse_request(request, data_dir)
  try:
    with quiet(), _explain_bucket_errors(data_dir):
      return _find(wanted)
  except errors.UserError:
    raise
  except (
    json_format.Error,
    json.JSONDecodeError,
    UnicodeDecodeError,
    OSError,
  ) as error:
    raise errors.UserError(_explain_damage(wanted, error)) from error
  except (ValueError, AssertionError, ImportError) as error:
    message = names.explain_unusable(wanted, error)
    raise errors.UserError(message) from error
  except tf.errors.OpError as error:
    raise errors.UserError(
      f"The data folder {data_dir} cannot be read:"
      f" {error.message.splitlines()[0][:200]}. Check the address, and that"
      " you may read it."
    ) from error


def _find(wanted: names.Request) -> Any:
  if wanted.name == names.DIGITS:
    # Registers the builder.
    from vqt_jax.data import digits

    digits.prepare(wanted.data_dir)
  folder = names.find_version_folder(wanted)
  if folder:
    return tfds.builder_from_directory(folder)
  try:
    tfds_code.builder_cls(wanted.name)
  except ValueError as error:  # Not found, or no name that code can have.
    raise errors.UserError(names.explain_unknown(wanted)) from error
  return tfds.builder(str(wanted), data_dir=os.fspath(wanted.place.parent))


def is_prepared(task: TfdsTask) -> bool:
  """Return whether the task's dataset is there; raises as `find_builder`."""
  return _find_prepared(task)[1]


def _find_prepared(task: TfdsTask) -> tuple[Any, bool]:
  """The builder of a task, and whether it is prepared."""
  builder = find_builder(task.builder, task.data_dir)
  with quiet(), _explain_bucket_errors(task.data_dir):
    return builder, builder.is_prepared()


def open_builder(task: TfdsTask) -> Any:
  """Return the prepared builder of a task.

  Raises:
    UserError: it is not prepared, or in a format that cannot be read.
  """
  builder, prepared = _find_prepared(task)
  if not prepared:
    raise errors.UserError(
      f"Dataset {task.dataset!r} is not prepared in"
      f" {os.fspath(builder.data_path)}. Prepare it once with:"
      f" {prepare_command(task)}"
    )
  if builder.info.file_format.value == "array_record":
    raise errors.UserError(
      f"Dataset {task.dataset!r} in {os.fspath(builder.data_path)} is stored"
      " as ArrayRecord, which TFDS does not read with TensorFlow. Prepare it"
      " as TFRecord, in another data_dir."
    )
  return builder


def prepare_command(*tasks: TfdsTask) -> str:
  """Return the shell command that prepares the datasets of tasks.

  Args:
    *tasks: with the same data folder.
  """
  return _prepare_command([t.dataset for t in tasks], tasks[0].data_dir)


def _prepare_command(datasets: Iterable[str], data_dir: str | None) -> str:
  command = ["python", "-m", "vqt_jax.data.prepare", *dict.fromkeys(datasets)]
  if data_dir:
    command += ["--data_dir", data_dir]
  return shlex.join(command)


def repair_advice(
  dataset: str, data_dir: str | None, place: os.PathLike, otherwise: str
) -> str:
  """Say what to do about damaged files; the advice is never to delete them.

  Args:
    dataset: `name[/config]`.
    data_dir: TFDS folder, or None for TFDS's own.
    place: folder of the dataset.
    otherwise: the advice if TFDS cannot prepare the dataset again.
  """
  if not names.is_tfds_name(dataset.partition("/")[0]):
    return otherwise
  command = _prepare_command([dataset], data_dir)
  return f"Move {os.fspath(place)} away, and prepare it again with: {command}"


@source.check_prepared.register
def check_prepared(task: TfdsTask) -> None:
  builder = open_builder(task)
  for split in SPLITS:
    split_size(builder, task, split)


@source.num_examples.register
def num_examples(task: TfdsTask, split: str) -> int:
  return split_size(open_builder(task), task, split)


@source.num_bytes.register
def num_bytes(task: TfdsTask, split: str) -> int:
  builder = open_builder(task)
  return split_size(builder, task, split) * example_bytes(builder)


def example_bytes(builder: Any) -> int:
  """Average size on disk of the examples of all splits, at least 1."""
  splits = builder.info.splits.values()
  examples = sum(split.num_examples for split in splits)
  total = sum(split.num_bytes for split in splits)
  return max(1, total // max(examples, 1))


@source.expected_examples.register
def expected_examples(task: TfdsTask, split: str) -> int:
  if not task.sizes:
    return num_examples(task, split)
  # TFDS computes slices of files; it does not look for these.
  template = tfds.core.ShardedFileTemplate(
    data_dir="", dataset_name=task.name, filetype_suffix="tfrecord"
  )
  whole = [
    tfds.core.SplitInfo(
      name=name, shard_lengths=[size], num_bytes=0, filename_template=template
    )
    for name, size in task.sizes.items()
  ]
  splits = tfds.core.splits.SplitDict(whole)
  return splits[task.splits[split]].num_examples


def split_size(builder: Any, task: TfdsTask, split: str) -> int:
  """Count the examples of a split, with an open builder."""
  slices = task.splits[split]
  found = ", ".join(
    f"{name} ({info.num_examples})"
    for name, info in builder.info.splits.items()
  )
  try:
    count = builder.info.splits[slices].num_examples
  except (ValueError, KeyError) as error:
    # Without TFDS's list of splits and its links.
    reason = files.first_line(error).split(". ")[0].rstrip(".")
    raise errors.UserError(
      f"Split {slices!r} ({split} of {task.name!r}) cannot be read from"
      f" {os.fspath(builder.data_path)}: {reason}. Splits there:"
      f" {found or 'none'}."
    ) from error
  if count <= 0:
    raise errors.UserError(
      f"Split {slices!r} ({split} of {task.name!r}) is empty. Splits in"
      f" {os.fspath(builder.data_path)}: {found}."
    )
  return count


@source.is_concatenation.register
def is_concatenation(task: TfdsTask, parts: Iterable[str], whole: str) -> bool:
  splits = open_builder(task).info.splits

  def rows(names):
    """Ranges of rows in files; adjacent ones are joined."""
    ranges = []
    for name in names:
      for part in splits[task.splits[name]].file_instructions:
        end = part.skip + part.take
        if part.take < 0:
          end = part.examples_in_shard
        if ranges and ranges[-1][::2] == [part.filename, part.skip]:
          ranges[-1][2] = end
        else:
          ranges.append([part.filename, part.skip, end])
    return ranges

  return rows(parts) == rows([whole])


@source.images_fingerprint.register
def images_fingerprint(task: TfdsTask, split: str) -> dict[str, Any]:
  builder = open_builder(task)
  parts = []
  for part in builder.info.splits[task.splits[split]].file_instructions:
    path = epath.Path(part.filename)
    with _explain_bucket_errors(task.data_dir):
      stat = path.stat()
    rows = [part.skip, part.take]
    parts.append([path.name, stat.length, stat.mtime, *rows])
  return {
    "dataset": builder.info.full_name,
    "image_key": task.image_key,
    "pixel_scale": task.pixel_scale,
    "files": parts,
  }


@source.dataset_identity.register
def dataset_identity(task: TfdsTask) -> dict[str, Any]:
  builder = open_builder(task)
  sizes = {
    name: [info.num_bytes, *info.shard_lengths]
    for name, info in builder.info.splits.items()
  }
  text = json.dumps(sizes, sort_keys=True)
  splits = {
    split: {
      "slices": task.splits[split],
      "images": split_size(builder, task, split),
    }
    for split in SPLITS
  }
  return {
    "dataset": builder.info.full_name,
    "image_key": task.image_key,
    "num_classes": task.num_classes,
    "splits": splits,
    "sha256": hashlib.sha256(text.encode()).hexdigest(),
  }


@source.pick.register
def pick(task: TfdsTask, split: str, positions: Sequence[int]) -> TfdsTask:
  splits = open_builder(task).info.splits
  # Each file has the next examples of a whole split.
  first = {}
  for name, whole in splits.items():
    start = 0
    for part in whole.file_instructions:
      first[part.filename] = name, start
      start += part.examples_in_shard
  order = []
  for part in splits[task.splits[split]].file_instructions:
    name, start = first[part.filename]
    taken = range(part.examples_in_shard)[part.skip :]
    taken = taken if part.take < 0 else taken[: part.take]
    order += [(name, start + i) for i in taken]
  some = [order[position] for position in positions]
  slices = "+".join(f"{name}[{i}:{i + 1}]" for name, i in some)
  return dataclasses.replace(task, splits={**task.splits, split: slices})


def size_warning(task: TfdsTask) -> str | None:
  """Return a sentence if the prepared dataset does not have VTAB's size.

  Its slices are then other images than those of published results.
  """
  splits = open_builder(task).info.splits
  differences = []
  for name, expected in task.sizes.items():
    found = splits[name].num_examples if name in splits else 0
    if found not in (expected, _ALSO_RIGHT.get((task.name, name))):
      differences.append(f"{name} has {found} examples, not {expected}")
  if not differences:
    return None
  return (
    f"The prepared copy of {task.dataset!r} is not the one of VTAB:"
    f" {'; '.join(differences)}. Results may not compare with published ones."
  )


@source.notes.register
def _notes(task: TfdsTask) -> list[str]:
  warning = size_warning(task)
  return [warning] if warning else []


@contextlib.contextmanager
def _explain_bucket_errors(data_dir: str | None) -> Iterator[None]:
  """Turn failures of a bucket, and of those who read it, into `UserError`."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # Each of the libraries on the way has its own.
    if not data_dir or not files.in_bucket(data_dir):
      raise
    advice = files.bucket_advice(e)
    if isinstance(e, FileNotFoundError):
      advice = "No such bucket, or nothing of that name in it."
    elif not advice and type(e).__module__.split(".")[0] not in _CLIENTS:
      raise
    raise errors.UserError(
      f"The data folder {data_dir} cannot be read: {files.first_line(e)}"
      f" {advice or 'Check data_dir.'}"
    ) from e


def _explain_damage(wanted: names.Request, error: Exception) -> str:
  """Say that the files that describe a dataset cannot be read."""
  advice = "Make it readable."
  if not isinstance(error, PermissionError):
    advice = repair_advice(
      wanted.dataset,
      wanted.data_dir,
      wanted.place,
      "Write the dataset again, or restore that file from a copy.",
    )
  return (
    f"The description of dataset {wanted.dataset!r} in {wanted.place} cannot be"
    f" read: {files.first_line(error)} {advice}"
  )
