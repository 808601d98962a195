"""The rendered tasks of `benchmarks/tasks`: their images, folders and runs."""

import csv

import helpers
import numpy as np
import pytest

from benchmarks.tasks import catalogue
from benchmarks.tasks import compare
from benchmarks.tasks import render
from vqt_jax import checkpoints
from vqt_jax import data
from vqt_jax import errors

COUNTS = {"train": 8, "val": 4, "test": 8}
SPLITS = {"train": "train[:8]", "val": "train[8:]"}
# Of one image of each task the mean grey of 4 x 4 fields, for this version.
VERSION = "1.1"
FIELDS = {
  "count": "33 30 56 43 51 33 39 24 29 35 27 29 21 35 32 25",
  "place": "63 65 68 71 57 63 63 76 60 63 67 56 68 62 60 64",
  "letters": "88 92 91 94 91 97 115 95 92 93 112 100 93 94 99 94",
  "textures": "97 100 98 99 102 97 99 100 100 101 102 99 98 102 99 97",
  "mirror": "106 130 172 140 120 122 117 110 110 114 119 126 148 170 139 112",
  "angle": "134 127 133 134 123 104 136 135 135 121 134 131 138 120 129 134",
  "distance": "171 175 160 174 171 168 170 168 171 166 168 168 163 169 156 164",
  "shapes": "98 89 89 93 90 83 99 95 85 90 107 118 83 87 101 104",
  "depth": "105 104 104 111 138 134 135 135 136 139 139 141 138 144 138 146",
  "fonts": "119 122 124 130 119 115 117 113 125 129 124 125 108 112 108 116",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a small rendering of "mirror"."""
  folder = tmp_path_factory.mktemp("rendered")
  render.render("mirror", folder, 3, COUNTS)
  return folder


@pytest.mark.parametrize("name", catalogue.SCENES)
def test_pictures_depend_on_task_part_index_label_and_seed_only(name):
  last = catalogue.SCENES[name].num_classes - 1
  draw = lambda *args: catalogue.draw(name, *args)
  picture = draw("test", 5, last, 0)
  assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
  np.testing.assert_array_equal(picture, draw("test", 5, last, 0))
  for other in (
    ("val", 5, last, 0),
    ("test", 6, last, 0),
    ("test", 5, last, 1),
  ):
    assert (picture != draw(*other)).any()


@pytest.mark.parametrize("name", catalogue.SCENES)
def test_another_picture_has_another_version(name):
  """Else a folder that is there already would be taken for the new one.

  Versions of Pillow may differ at edges.
  """
  assert render.VERSION == VERSION
  last = catalogue.SCENES[name].num_classes - 1
  grey = catalogue.draw(name, "test", 5, last, 0).mean(axis=-1)
  found = grey.reshape(4, 28, 4, 28).mean(axis=(1, 3)).ravel()
  expected = np.array(FIELDS[name].split(), float)
  np.testing.assert_allclose(found, expected, atol=2)


@pytest.mark.parametrize("name", catalogue.SCENES)
def test_each_part_has_all_classes_equally_often(name):
  for part, count in catalogue.PARTS.items():
    labels = catalogue.labels(name, part, count, 0)
    found = np.bincount(labels, minlength=catalogue.SCENES[name].num_classes)
    assert len(labels) == count
    assert np.ptp(found) <= 1 and found.min() > 0


def test_half_of_the_tasks_are_for_development():
  dev, report = catalogue.find("dev"), catalogue.find("report")
  assert len(dev) == len(report) == 5
  assert set(dev + report) == set(catalogue.find("all"))
  assert catalogue.find("count,dev,digits", ("digits",)) == [*dev, "digits"]
  with pytest.raises(errors.UserError, match="No task 'cuont'"):
    catalogue.find("cuont")


def test_a_folder_is_a_task_with_the_pictures_in_order(folder):
  task = data.make_task("mirror", data_dir=str(folder), splits=SPLITS)
  for part, count in COUNTS.items():
    found = data.load_arrays(task, part, image_size=112, value_range="0..1")
    labels = catalogue.labels("mirror", part, count, 3)
    np.testing.assert_array_equal(found["label"], labels)
    for index, label in enumerate(labels):
      picture = catalogue.draw("mirror", part, index, label, 3)
      np.testing.assert_array_equal(
        np.rint(255 * found["image"][index]), picture
      )


def test_what_is_there_is_kept(folder):
  files = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
  render.render("mirror", folder, 3, COUNTS)
  assert files == {
    f: f.stat().st_mtime_ns for f in folder.rglob("*.*") if f.is_file()
  }


def test_methods_are_compared_on_tasks(folder, tmp_path, capsys):
  checkpoints.save_npz(
    tmp_path / "vit.npz", helpers.tiny_backbone(image_size=(8, 8))
  )
  command = ["--data", str(tmp_path), str(folder), "--tasks=mirror"]
  command += [f"--init={tmp_path / 'vit.npz'}", f"--workdir={tmp_path / 'w'}"]
  command += [f"--config.splits.{k}={v}" for k, v in SPLITS.items()]
  command += ["--config.image_size=8", "--config.epochs=1", "--config.lr=1"]
  command += ["--config.weight_decay=0", "--config.seeds=1"]
  assert compare.main([*command, "--methods=linear,vqt"]) == 0
  assert "mean of 1 tasks" in capsys.readouterr().out
  with open(tmp_path / "w" / "tasks.csv") as file:
    rows = list(csv.DictReader(file))
  assert [(row["task"], row["method"]) for row in rows] == [
    ("mirror", "linear"),
    ("mirror", "vqt"),
    ("mean", "linear"),
    ("mean", "vqt"),
  ]
  assert sum(float(row["rank"]) for row in rows[:2]) == 3
  # The probe reads the file with the tokens.
  assert len(list((tmp_path / "w" / "store").iterdir())) == 1
