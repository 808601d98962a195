"""What other people's files may name, and how damage is told."""

import dataclasses
import json
import os
from typing import Any

import pytest

from vqt_jax import errors
from vqt_jax.runtime import files
from vqt_jax.runtime import logfile


@pytest.mark.parametrize(
  "name",
  [
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/../../b",
    "a//b",
    "a/",
    "a\\b",
    "a\0",
    "\x1b[2J",
  ],
)
def test_names_that_leave_a_folder(tmp_path, name):
  with pytest.raises(errors.UserError, match="that stays in that folder"):
    files.below(tmp_path, name)


def test_links_that_leave_a_folder(tmp_path):
  root = tmp_path / "root"
  root.mkdir()
  (root / "out").symlink_to(tmp_path)
  (root / "loop").symlink_to("loop")
  (root / "in").symlink_to(".")
  assert files.below(root, "in/a b/..c") == root / "in/a b/..c"
  with pytest.raises(errors.UserError, match="a link there leads to"):
    files.below(root, "out/file")
  files.below(root, "loop/file")  # There is nothing to open.


@pytest.mark.parametrize(
  "error",
  [
    KeyError("x"),
    RecursionError("deep"),
    SystemError("NULL"),
    OverflowError("too big"),
    AttributeError("no"),
    MemoryError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    OSError(5, "Input/output error"),
    ValueError("\x1b[31mred"),
  ],
)
def test_whatever_a_parser_raises_is_told(error):
  with pytest.raises(errors.UserError, match="Cannot read a.npz: ") as caught:
    with files.explain_damage("a.npz", "Copy it again."):
      raise error
  assert str(caught.value).isprintable()


@pytest.mark.parametrize(
  "content",
  [b"[" * 100_000, b"\xff", b'{"a": ', b"", b"9" * 5000, b'"\\ud8'],
)
def test_json_that_cannot_be_parsed(tmp_path, content):
  (tmp_path / "a.json").write_bytes(content)
  with pytest.raises(errors.UserError, match="Cannot read .*a.json"):
    files.read_json(tmp_path / "a.json")


def test_pipes_and_devices_are_not_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "zero").symlink_to("/dev/zero")
  for name in ("pipe", "zero"):
    with pytest.raises(errors.UserError, match="not a regular file"):
      files.read(tmp_path / name)
    with pytest.raises(errors.UserError, match="not a regular file"):
      with files.local_copy(tmp_path / name):
        pass


@dataclasses.dataclass
class Fields:
  lists: list[dict[str, float]]
  number: int | None = None
  text: str = ""
  anything: Any = None


def test_a_dataclass_from_json():
  good = {"lists": [{"a": 1}, {"b": 2.5}], "number": 3, "anything": [True]}
  found = files.from_json(Fields, json.loads(json.dumps(good)))
  assert dataclasses.asdict(found) == {"text": "", **good}
  for bad in (
    [],
    {"lists": {}},
    {"lists": [1]},
    {"lists": [{"a": "1"}]},
    {"lists": [{"a": True}]},
    {"lists": [], "number": 1.0},
    {"lists": [], "number": False},
    {"lists": [], "text": None},
    {"lists": [], "more": 1},
  ):
    with pytest.raises(ValueError):
      files.from_json(Fields, bad)
  with pytest.raises(TypeError):  # `explain_damage` tells it.
    files.from_json(Fields, {})


def test_control_codes_are_not_printed(capsys):
  logfile.print_to_stderr("error: \x1b[2J\r'é' of\nfile\x07")
  assert capsys.readouterr().err == "error: \\x1b[2J\\r'é' of\nfile\\x07\n"
