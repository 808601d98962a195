"""Bad input: one or two sentences, status 2, and nothing is touched."""

import pathlib
import re
import shutil

import numpy as np
import pytest

import main
from tests import runs


@pytest.fixture
def folder(material, tmp_path):
  """A copy of the material, to be spoilt."""
  copy = tmp_path / "material"
  shutil.copytree(material, copy)
  config = copy / "config.py"
  config.write_text(config.read_text().replace(str(material), str(copy)))
  return copy


@pytest.fixture
def fails(capfd):
  """Runs a command that must fail, and touch nothing; returns what it says."""

  def fails(folder, workdir, **changes):
    before = runs.files(folder)
    assert main.main(runs.command(folder, workdir, **changes)) == 2
    out, said = capfd.readouterr()
    assert out == ""
    *_, error = said.splitlines()
    assert error.startswith("error: ") and "Traceback" not in said
    # Sentences; the dots of paths and versions are none.
    assert len(re.findall(r"[.?:](?: |$)", error)) <= 5, error
    assert runs.files(folder) == before
    return error

  return fails


def truncated(path):
  path.write_bytes(path.read_bytes()[:-500])


def without_end(path):
  path.write_bytes(path.read_bytes()[:1500])


def damaged(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)


def empty(path):
  path.write_bytes(b"")


def pickled(path):
  np.savez(path, weights=np.array([{"a": 1}], dtype=object))


def not_a_vit(path):
  np.savez(path, **{"conv1/kernel": np.ones((3, 3, 3, 8), np.float32)})


def text(path):
  path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (truncated, "is truncated"),
        (without_end, "is truncated"),
        (damaged, "is damaged at"),
        (empty, "is empty"),
        (pickled, "holds pickled Python objects"),
        (not_a_vit, "is no ViT checkpoint"),
        (text, "is not an npz file"),
        (pathlib.Path.unlink, "is neither a file or folder nor the name"),
    ],
)
def test_checkpoints(fails, folder, tmp_path, spoil, words):
  spoil(folder / "vit.npz")
  error = fails(folder, tmp_path / "run")
  assert words in error and "vit.npz" in error


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"variant": "B/16"}, "is not the variant B/16"),
        ({"image_size": 10}, "is not a multiple of the backbone's 4x4 patch"),
        ({"splits__test": "tset"}, "Unknown split 'tset'"),
        ({"splits__val": "train[48:]"}, "is empty"),
        ({"num_classes": 2}, "Label 2 in 'squares' is outside its 2 classes"),
        ({"task": "sqares"}, "Nearest names: 'squares'"),
        ({"data_dir": "nowhere"}, "Unknown task or dataset 'squares'"),
        ({"mesh__data": 3}, "mesh data=3, model=1 does not fit 8 device(s)"),
        ({"data": "stream"}, "batch_size=12 cannot be shared by 8 devices"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(fails, folder, tmp_path, changes, words):
  assert words in fails(folder, tmp_path / "run", **changes)


def test_a_damaged_dataset(fails, folder, tmp_path):
  record, = (folder / "squares" / "1.0.0").glob("*train*")
  truncated(record)
  error = fails(folder, tmp_path / "run")
  assert "cannot be read (DataLossError: truncated record at" in error
  assert "prepare it again" in error


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_workdir_that_is_a_file(fails, folder, inside):
  error = fails(folder, folder / "vit.npz" / inside)
  assert f"Cannot write {folder / 'vit.npz' / inside}" in error


def test_a_workdir_that_cannot_be_written(fails, folder):
  """Nor by root, whom permissions do not stop."""
  assert "Cannot write /proc/run/config.json" in fails(folder, "/proc/run")


def test_a_workdir_of_another_config(fails, material, folder, tmp_path):
  workdir = folder / "run"
  command = runs.command(folder, workdir, method="linear", epochs=2)
  assert main.main(command) == 0
  error = fails(folder, workdir, method="linear")
  assert "holds a run of another config: epochs was 2, is now 3" in error
  (workdir / "results.json").unlink()  # It did not come to its end.
  assert "epochs was 2" in fails(folder, workdir, method="linear")
  (workdir / "config.json").unlink()
  assert "There is no" in fails(folder, workdir, method="linear")
