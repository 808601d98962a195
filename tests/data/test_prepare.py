"""The embedded dataset, and the program that prepares the others."""

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest

from tests import faults
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.data import digits
from vqt_jax.data import prepare
from vqt_jax.data import tasks

# The embedded dataset.


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("digits"))
  tasks.make_task("digits", data_dir=folder)
  return folder


def test_digits(digits_dir):
  task = tasks.make_task("digits", data_dir=digits_dir)
  sizes = {split: data.num_examples(task, split) for split in data.SPLITS}
  assert sizes == {"train": 800, "val": 200, "trainval": 1000, "test": 797}
  arrays = data.load_arrays(task, "trainval", image_size=8, value_range="0..1")
  assert np.bincount(arrays["label"]).tolist() == [100] * 10
  assert arrays["image"].max() == 1.0
  assert np.unique(arrays["image"]).size == 17  # Scaled from 0..16.


def test_digits_assignment_is_fixed(digits_dir):
  """The split and its order are published: they must never change."""
  from sklearn import datasets

  labels = datasets.load_digits().target
  chosen = digits.train_indices(labels)
  assert np.bincount(labels[chosen]).tolist() == [100] * 10
  fingerprint = hashlib.sha256(",".join(map(str, chosen)).encode())
  assert fingerprint.hexdigest()[:16] == "9cd766382cc3026b"
  task = tasks.make_task("digits", data_dir=digits_dir)
  test = data.load_arrays(task, "test", image_size=8, value_range="0..1")
  assert test["label"][:10].tolist() == [1, 5, 0, 2, 6, 8, 3, 0, 4, 0]


def test_digits_prepared_by_two_at_once(tmp_path, monkeypatch, capfd):
  """The slower one finds the other's folder in its way and uses that."""
  generate = digits.Digits._split_generators
  rivals = []

  def slow(self, dl_manager):
    if not rivals:
      rivals.append(digits.Digits(data_dir=str(tmp_path)))
      rivals[0].download_and_prepare()
    return generate(self, dl_manager)

  monkeypatch.setattr(digits.Digits, "_split_generators", slow)
  digits.prepare(str(tmp_path))
  assert rivals
  assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
  assert "".join(capfd.readouterr()) == ""  # TFDS's own lines are held back.


def test_digits_where_nothing_can_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="Cannot write.*data_dir"):
    tasks.make_task("digits", data_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("size", [0, 3000])
def test_digits_on_a_full_disk(tmp_path, size):
  with faults.largest_file(size):
    with pytest.raises(errors.UserError, match="Cannot write.*File too large"):
      tasks.make_task("digits", data_dir=str(tmp_path))
  tasks.make_task("digits", data_dir=str(tmp_path))


# Preparing.


def jpeg(size, colour):
  file = io.BytesIO()
  PIL.Image.new("RGB", (size, size), colour).save(file, "JPEG")
  return file.getvalue()


def run_prepare(*names, **settings):
  flags = [f"--{name}={value}" for name, value in settings.items()]
  return prepare.main(["prepare", *names, *flags])


def test_requests_name_each_dataset_once():
  assert len(prepare.requests(["all"])) == 16
  found = prepare.requests(["clevr_count", "clevr_distance", "mnist"])
  assert found == ["clevr:*.*.*", "mnist"]
  everything = prepare.requests(["all"])
  known = {re.split("[/:]", request)[0] for request in everything}
  assert set(prepare.NOTES) == known >= set(prepare.PACKAGES)


def test_prepare_from_manual_files(tmp_path, capsys):
  folder = tmp_path / "manual" / "NWPU-RESISC45" / "airplane"
  folder.mkdir(parents=True)
  (folder / "airplane_001.jpg").write_bytes(jpeg(256, "red"))
  where = dict(data_dir=str(tmp_path / "data"))
  assert run_prepare("resisc45", **where) == 2  # Nothing given by hand.
  assert "Manual directory" in capsys.readouterr().err
  where["manual_dir"] = str(tmp_path / "manual")
  assert run_prepare("resisc45", **where) == 0
  assert "resisc45: ready in" in capsys.readouterr().out
  assert run_prepare("resisc45", **where) == 0  # And now does nothing.


def test_prepare_on_a_full_disk(tmp_path, capsys):
  folder = tmp_path / "manual" / "NWPU-RESISC45" / "airplane"
  folder.mkdir(parents=True)
  (folder / "airplane_001.jpg").write_bytes(jpeg(256, "red"))
  where = dict(data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
  with faults.largest_file(100):
    assert run_prepare("resisc45", **where) == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith("Preparing 'resisc45' failed: ")
  assert "File too large" in said
  assert run_prepare("resisc45", **where) == 0


def test_prepare_trusts_other_files_only_when_told(tmp_path, capsys):
  with zipfile.ZipFile(tmp_path / "EuroSAT.zip", "w") as archive:
    for name in ("Forest/Forest_1.jpg", "River/River_1.jpg"):
      archive.writestr(f"2750/{name}", jpeg(64, "green"))
  where = dict(data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
  assert run_prepare("eurosat", **where) == 2
  assert "--trust_files" in capsys.readouterr().err
  assert run_prepare("eurosat", trust_files=True, **where) == 0
  assert "train 2" in capsys.readouterr().out


def test_a_version_that_cannot_be_made_any_more(tmp_path, capsys):
  assert run_prepare("clevr:3.0.0", data_dir=str(tmp_path)) == 2
  assert "Preparing 'clevr' failed: " in capsys.readouterr().err


def test_prepare_explains_what_is_missing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
  (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
  assert run_prepare("kitti", "cifar100", "nosuch", data_dir=str(tmp_path)) == 2
  err = capsys.readouterr().err
  assert "pip install opencv-python-headless" in err
  assert "holds no finished dataset. Move that folder" in err
  assert "Unknown task or dataset 'nosuch'" in err


@pytest.mark.parametrize(
  "backend, left",
  [
    ("module://of_a_notebook.backend_inline", None),
    ("module://matplotlib.backends.backend_svg", "same"),
    ("agg", "same"),
  ],
)
def test_a_backend_of_matplotlib_that_is_not_here(backend, left):
  """TFDS imports Matplotlib, which ends at one."""
  code = (
    "import os, vqt_jax.data.tensorflow_lazy, matplotlib.figure;"
    "print(os.environ.get('MPLBACKEND'))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"MPLBACKEND": backend},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == (backend if left else "None")
