"""Folders and tables of labelled images, as people have them."""

import json
import os

import pytest

from vqt_jax import errors
from vqt_jax.data import listing


def fill(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def listed(place, **keys):
  return [
    (each.name, each.label, each.split)
    for each in listing.list_labelled(place, **keys)
  ]


def test_folders_are_classes_whatever_their_names(tmp_path):
  fill(
    tmp_path,
    *("grey cat/1.jpg", "grey cat/more/2.PNG", "собака/3.webp", "猫/4.tif"),
    *("猫/notes.txt", "猫/.hidden.jpg", ".git/5.jpg", "__MACOSX/猫/6.jpg"),
  )
  assert listed(tmp_path) == [
    ("grey cat/1.jpg", "grey cat", ""),
    ("grey cat/more/2.PNG", "grey cat", ""),
    ("собака/3.webp", "собака", ""),
    ("猫/4.tif", "猫", ""),
  ]
  assert all(x.file.is_file() for x in listing.list_labelled(tmp_path))


def test_accents_are_one_class_however_they_are_written(tmp_path):
  fill(tmp_path, "train/e\u0301te\u0301/1.jpg", "test/\u00e9t\u00e9/2.jpg")
  assert {label for _, label, _ in listed(tmp_path)} == {"\u00e9t\u00e9"}


def test_photographs_that_pillow_does_not_read_are_not_passed_over(tmp_path):
  fill(tmp_path, "a/1.heic", "a/2.pdf")
  assert [name for name, *_ in listed(tmp_path)] == ["a/1.heic"]


def test_folders_of_splits(tmp_path):
  fill(tmp_path, "Train/a/1.jpg", "validation/a/2.jpg", "test/b/c/3.jpg")
  assert listed(tmp_path) == [
    ("Train/a/1.jpg", "a", "train"),
    ("test/b/c/3.jpg", "b", "test"),
    ("validation/a/2.jpg", "a", "val"),
  ]


def test_a_class_may_be_called_like_a_split(tmp_path):
  fill(tmp_path, "train/1.jpg", "bus/2.jpg")
  assert listed(tmp_path) == [
    ("bus/2.jpg", "bus", ""),
    ("train/1.jpg", "train", ""),
  ]


def test_links_are_followed_but_not_in_circles(tmp_path):
  fill(tmp_path, "elsewhere/1.jpg", "photos/b/2.jpg")
  (tmp_path / "photos" / "a").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "photos" / "b" / "loop").symlink_to(tmp_path / "photos")
  assert [name for name, *_ in listed(tmp_path / "photos")] == [
    "a/1.jpg",
    "b/2.jpg",
  ]


ROWS = [("a/1.jpg", "7"), ("ü b.jpg", "katze, grau")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
  "suffix, comma",
  [(".csv", ","), (".csv", ";"), (".TSV", "\t"), (".jsonl", "")],
)
def test_tables_of_every_kind(tmp_path, suffix, comma, mark):
  fill(tmp_path, *(name for name, _ in ROWS))
  text = f"file{comma}Label\r\n" + "".join(
    f'{name}{comma}"{label}"\r\n' for name, label in ROWS
  )
  if suffix == ".jsonl":
    lines = ({"file": a, "Label": int(b) if b == "7" else b} for a, b in ROWS)
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
  table = tmp_path / f"table{suffix}"
  table.write_bytes((mark + text).encode())
  assert listed(table) == [(a, b, "") for a, b in ROWS]
  first, _ = listing.list_labelled(table)
  assert first.file == tmp_path / "a" / "1.jpg"


def test_columns_and_splits_of_a_table(tmp_path):
  fill(tmp_path, "1.jpg", "2.jpg", "3.jpg")
  table = tmp_path / "table.csv"
  table.write_text(
    "where,what,label,part\n1.jpg,a,x,train\n2.jpg,b,x,Validation\n"
    f"{tmp_path}/3.jpg,b,x,test\n"
  )
  keys = dict(image_key="where", label_key="what", split_key="part")
  assert listed(table, **keys) == [
    ("1.jpg", "a", "train"),
    ("2.jpg", "b", "val"),
    (f"{tmp_path}/3.jpg", "b", "test"),
  ]
  with pytest.raises(errors.UserError, match="no column for the path; its"):
    listed(table)


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "no column for the path"),
    ("path,label\n", "has no rows"),
    ("path,what\n1.jpg,a\n", "no column for the label; its columns are: path"),
    ("path,file,label\n1.jpg,,a\n", "more than one column for the path"),
    ("path,label\n1.jpg\n", "Line 2 of .* has 1 cells, not the 2"),
    ("path,label\n1.jpg,a\n,b\n", "Line 3 of .* has nothing in column 'path'"),
    ("path,label\n1.jpg,\n", "Line 2 of .* has nothing in column 'label'"),
    (
      "path,label\n1.jpg,a\n./1.jpg,a\n",
      "Line 3 .* names ./1.jpg again, as line 2 does",
    ),
    ("path,label,split\n1.jpg,a,main\n", "has 'main' in column 'split'"),
    ("path,label\n8.jpg,a\n9.jpg,b\n", "None of the 2 files .* exists"),
    ("path,label\n1.jpg,\udcfc\n", r"not in UTF-8 \(byte 18\)"),
  ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, message):
  fill(tmp_path, "1.jpg")
  table = tmp_path / "table.csv"
  table.write_bytes(text.encode(errors="surrogateescape"))
  with pytest.raises(errors.UserError, match=message):
    listed(table)


@pytest.mark.parametrize(
  "text, message",
  [
    ('{"path": "1.jpg", "label": "a"}\n{"path"\n', "Line 2 of .* is not JSON"),
    ('["1.jpg", "a"]\n', "Line 1 of .*: expected an object in braces"),
    ('{"path": "1.jpg"}\n', "no column for the label"),
  ],
)
def test_what_is_wrong_with_json_lines_is_told(tmp_path, text, message):
  fill(tmp_path, "1.jpg")
  (tmp_path / "table.jsonl").write_text(text)
  with pytest.raises(errors.UserError, match=message):
    listed(tmp_path / "table.jsonl")


def test_what_is_wrong_with_a_folder_is_told(tmp_path):
  with pytest.raises(errors.UserError, match="There is no image in"):
    listed(tmp_path)
  fill(tmp_path, "a/1.jpg", "2.jpg")
  with pytest.raises(errors.UserError, match="2.jpg in .* is in no folder of"):
    listed(tmp_path)
  with pytest.raises(errors.UserError, match="is a folder, whose classes"):
    listed(tmp_path, label_key="what")
  with pytest.raises(errors.UserError, match="There is no folder or table"):
    listed(tmp_path / "missing")
  with pytest.raises(errors.UserError, match="neither a folder nor a table"):
    listed(tmp_path / "2.jpg")


def test_a_class_has_a_name_that_can_be_written(tmp_path):
  try:
    fill(tmp_path, os.fsdecode(b"\xff") + "/1.jpg")
  except OSError:
    pytest.skip("the file system takes UTF-8 only")
  with pytest.raises(errors.UserError, match="is not in UTF-8"):
    listed(tmp_path)
