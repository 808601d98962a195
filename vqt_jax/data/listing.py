"""Lists of labelled images: a folder per class, or a table of files.

photos/CLASS/...                    photos/{train,val,test}/CLASS/...
table.csv, table.tsv, table.jsonl   with a path and a label in each row
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import io
import json
import os
import pathlib
from typing import Any, NamedTuple
import unicodedata

import PIL.Image

from vqt_jax import errors

# Names of a split -> the split.
SPLIT_NAMES = {
  "train": "train",
  "training": "train",
  "val": "val",
  "valid": "val",
  "validation": "val",
  "dev": "val",
  "test": "test",
  "testing": "test",
}
# Suffix of a table -> what is between its columns.
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
# Columns that are looked for if none is named.
IMAGE_COLUMNS = ("path", "file", "image", "filename", "file_name", "filepath")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMNS = ("split",)

# Photographs that Pillow does not read: they are reported, not passed over.
_UNREAD = {".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw"}
_NOT_IMAGES = {".pdf", ".ps", ".eps", ".mpg", ".mpeg"}  # Of Pillow's kinds.


class Labelled(NamedTuple):
  """A labelled image file.

  Attributes:
    file: its path.
    name: its path within the folder, or as the table has it, with slashes.
    label: name of its class.
    split: "train", "val" or "test"; "" if none is given.
  """

  file: pathlib.Path
  name: str
  label: str
  split: str


def list_labelled(
  place: str | os.PathLike,
  *,
  image_key: str = "",
  label_key: str = "",
  split_key: str = "",
) -> list[Labelled]:
  """List the images of a folder with a folder per class, or of a table.

  Args:
    place: the folder or table.
    image_key: column of the paths, which are relative to the table's folder;
      empty: the one of `IMAGE_COLUMNS`.
    label_key: column of the labels; empty: the one of `LABEL_COLUMNS`.
    split_key: column of the splits; empty: "split", if there is one.

  Returns:
    The images, sorted by name for a folder, else in the order of the rows. None
    of the files was opened.

  Raises:
    UserError: there is no such place, it holds no images, or a row is wrong.
  """
  path = pathlib.Path(os.path.expanduser(place))
  if path.is_dir():
    if given := [key for key in (image_key, label_key, split_key) if key]:
      raise errors.UserError(
        f"{path} is a folder, whose classes are its folders: leave the column"
        f" {given[0]!r} away, or name a table."
      )
    return _list_folder(path)
  if not path.exists():
    raise errors.UserError(
      f"There is no folder or table {path} (looked for in {pathlib.Path.cwd()})"
      "."
    )
  if path.suffix.lower() not in TABLES:
    raise errors.UserError(
      f"{path} is neither a folder nor a table: expected a folder with a folder"
      f" per class, or a file *{', *'.join(TABLES)}."
    )
  return _list_table(path, image_key, label_key, split_key)


def find_images(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Return the image files in a folder and below it, sorted, by their suffix.

  Links are followed; names that begin with a dot are passed over.
  """
  return sorted(_walk(pathlib.Path(folder), set()))


def _walk(folder: pathlib.Path, seen: set[str]) -> Iterator[pathlib.Path]:
  real = os.path.realpath(folder)
  if real in seen:  # A link to a folder above.
    return
  try:
    entries = list(os.scandir(folder))
  except OSError as e:
    raise errors.UserError(f"Cannot read {folder}: {e.strerror}.") from e
  for entry in entries:
    path = folder / entry.name
    if entry.name.startswith(".") or entry.name == "__MACOSX":
      continue
    if entry.is_dir():
      yield from _walk(path, seen | {real})
    elif is_image_name(entry.name):
      yield path


def is_image_name(name: str) -> bool:
  """Return whether a file's suffix is that of an image."""
  suffix = os.path.splitext(name)[1].lower()
  kinds = PIL.Image.registered_extensions()
  known = kinds.get(suffix) in PIL.Image.OPEN and suffix not in _NOT_IMAGES
  return known or suffix in _UNREAD


def _list_folder(folder: pathlib.Path) -> list[Labelled]:
  found = []
  images = find_images(folder)
  names = [path.relative_to(folder).parts for path in images]
  if not images:
    raise errors.UserError(
      f"There is no image in {folder}: expected {folder}/CLASS/IMAGE, or"
      f" {folder}/train/CLASS/IMAGE."
    )
  tops = {parts[0] for parts in names if len(parts) > 1}
  has_splits = bool(tops) and all(top.lower() in SPLIT_NAMES for top in tops)
  depth = 2 if has_splits else 1
  for path, parts in zip(images, names):
    if len(parts) <= depth:
      where = "/".join(parts)
      raise errors.UserError(
        f"The image {where} in {folder} is in no folder of a class: expected"
        f" {folder}/{'train/' * has_splits}CLASS/IMAGE."
      )
    split = SPLIT_NAMES[parts[0].lower()] if has_splits else ""
    label = _class_name(parts[depth - 1])
    found.append(Labelled(path, "/".join(parts), label, split))
  return found


def _list_table(
  table: pathlib.Path, image_key: str, label_key: str, split_key: str
) -> list[Labelled]:
  columns, rows = _read_table(table)
  image_key = _column(table, columns, "path", image_key, IMAGE_COLUMNS)
  label_key = _column(table, columns, "label", label_key, LABEL_COLUMNS)
  if split_key or set(SPLIT_COLUMNS) & set(columns):
    split_key = _column(table, columns, "split", split_key, SPLIT_COLUMNS)
  found, lines = [], {}
  for line, row in rows:
    where = f"Line {line} of {table}"
    name, label = (_text(row.get(key)) for key in (image_key, label_key))
    for key, text in ((image_key, name), (label_key, label)):
      if not text:
        raise errors.UserError(f"{where} has nothing in column {key!r}.")
    split = _text(row.get(split_key)) if split_key else ""
    if split_key and split.lower() not in SPLIT_NAMES:
      raise errors.UserError(
        f"{where} has {split!r} in column {split_key!r}: expected train, val or"
        " test."
      )
    file = table.parent / os.path.expanduser(name)
    place = os.path.normpath(file)
    if place in lines:
      raise errors.UserError(
        f"{where} names {name} again, as line {lines[place]} does: expected"
        " each file once."
      )
    lines[place] = line
    split = SPLIT_NAMES[split.lower()] if split_key else ""
    found.append(Labelled(file, name, _class_name(label), split))
  if not found:
    raise errors.UserError(f"{table} has no rows.")
  if not any(os.path.lexists(each.file) for each in found):
    raise errors.UserError(
      f"None of the {len(found)} files in {table} exists, the first being"
      f" {found[0].file}: expected paths relative to {table.parent}."
    )
  return found


def _read_table(
  table: pathlib.Path,
) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
  """Return the columns, and of each row its line, from 1, and its cells."""
  try:
    text = table.read_bytes().decode("utf-8-sig")  # Without a byte-order mark.
  except UnicodeDecodeError as e:
    raise errors.UserError(
      f"{table} is not in UTF-8 (byte {e.start + 1:,}): save it again with this"
      " encoding."
    ) from e
  except OSError as e:
    raise errors.UserError(f"Cannot read {table}: {e.strerror}.") from e
  delimiter = TABLES[table.suffix.lower()]
  if not delimiter:
    rows = list(_json_rows(table, text))
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows
  header = text.partition("\n")[0]
  if delimiter == "," and "," not in header and ";" in header:
    delimiter = ";"  # As spreadsheets write where the comma is decimal.
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
  try:
    columns = [name.strip() for name in next(reader, [])]
    rows = []
    for cells in reader:
      if not cells:
        continue
      if len(cells) != len(columns):
        raise errors.UserError(
          f"Line {reader.line_num} of {table} has {len(cells)} cells, not the"
          f" {len(columns)} of its first line."
        )
      rows.append((reader.line_num, dict(zip(columns, cells))))
  except csv.Error as e:
    raise errors.UserError(
      f"Line {reader.line_num} of {table} cannot be read: {e}."
    ) from e
  return columns, rows


def _json_rows(
  table: pathlib.Path, text: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as e:
      raise errors.UserError(
        f"Line {number} of {table} is not JSON: {e}."
      ) from e
    if not isinstance(row, dict):
      raise errors.UserError(
        f"Line {number} of {table}: expected an object in braces, found"
        f" {line.strip()[:40]}."
      )
    yield number, row


def _column(
  table: pathlib.Path,
  columns: Sequence[str],
  kind: str,
  given: str,
  likely: Sequence[str],
) -> str:
  """Return the name of a column: the given one, or the only likely one."""
  field = {"path": "image", "label": "label", "split": "split"}[kind]
  found = [name for name in columns if name.lower() in likely]
  if given:
    found = [name for name in columns if name == given]
  if len(found) == 1:
    return found[0]
  wanted = repr(given) if given else f"for the {kind}"
  raise errors.UserError(
    f"{table} has {'no' if not found else 'more than one'} column {wanted}; its"
    f" columns are: {', '.join(columns)[:300] or 'none'}. Name one with"
    f" config.{field}_key."
  )


def _class_name(text: str) -> str:
  """A class's name; two ways to write the same accents are one name."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise errors.UserError(
      f"The class {text!a} has a name that is not in UTF-8: choose another one."
    ) from e
  return unicodedata.normalize("NFC", text)


def _text(cell: Any) -> str:
  """A cell as text; a whole number of JSON is written without a fraction."""
  if cell is None:
    return ""
  if isinstance(cell, float) and cell.is_integer():
    cell = int(cell)
  return str(cell).strip()
