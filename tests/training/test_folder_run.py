"""Runs on people's own images, from a folder to results."""

import pathlib
import re
import shlex
import shutil
import signal

import numpy as np
import pytest

import main
from scripts import make_photos
from tests import helpers
from tests import runs
from vqt_jax import errors
from vqt_jax.config import fields
from vqt_jax.config import files as config_files
from vqt_jax.config import resolve
from vqt_jax.runtime import console as console_lib
from vqt_jax.training import setup

BROKEN = "stripes/000.jpg"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("made") / "photos"
  make_photos.make(folder, per_class=10)
  return folder


def command(material, photos, workdir, **changes):
  """A tiny run, on images in place of squares."""
  splits = {f"splits__{split}": "" for split in ("train", "val", "test")}
  changes = splits | dict(task=photos, epochs=2, lr=0.1, seeds=7) | changes
  return runs.command(material, workdir, **changes)


def check(photos, capsys, **changes):
  config = resolve.resolve({"task": str(photos), **changes})
  task = setup.find_task(config)
  try:
    return setup.check_data(config, task, console_lib.Console())
  finally:
    check.said = capsys.readouterr().err


def test_bad_files_are_all_listed_before_anything_else(photos, capsys):
  with pytest.raises(errors.UserError, match=f"be used: 1, .*{BROKEN}.*skip_b"):
    check(photos, capsys)
  assert f"bad      {BROKEN}: image file is truncated" in check.said
  assert "images of photos" not in check.said
  task = check(photos, capsys, skip_bad=True)
  assert "left out: 1" in check.said
  assert BROKEN not in [x.name for part in task.images.values() for x in part]
  counts = [line.split() for line in check.said.splitlines()]
  assert ["circle", "6", "2", "2"] in counts
  total = next(line for line in counts if line[0] == "all")
  assert sum(map(int, total[1:])) == 49


def test_of_many_classes_some_are_shown(tmp_path, capsys):
  for name in range(40):
    for i in range(3):
      place = tmp_path / "photos" / f"class {name:02}" / f"{i}.png"
      place.parent.mkdir(parents=True, exist_ok=True)
      image = make_photos.PIL.Image.new("RGB", (4, 4), (name, i, 0))
      image.save(place)
  check(tmp_path / "photos", capsys)
  lines = [" ".join(line.split()) for line in check.said.splitlines()]
  assert "class 29 1 1 1" in lines and "10 more 10 10 10" in lines
  assert "class 30 1 1 1" not in lines and "all 40 40 40" in lines


def test_a_folder_from_start_to_end(
  material, photos, tmp_path, monkeypatch, capfd
):
  """Interrupted, refused with other images, resumed, and reported."""
  place = pathlib.Path(shutil.copytree(photos, tmp_path / "photos"))
  changes = dict(skip_bad="true", fit="crop", class_weights="balanced")
  argv = command(material, place, tmp_path / "run", **changes)
  with monkeypatch.context() as patch:
    train = "vqt_jax.training.step:train_steps"
    runs.signal_on_call(patch.setattr, train, 1, signal.SIGTERM)
    assert main.main(argv) == 75
  assert "expected about" in capfd.readouterr().err
  shutil.copy(place / "circle/001.jpg", tmp_path / "kept.jpg")
  make_photos.draw("circle", np.random.default_rng(1)).save(
    place / "circle/001.jpg"
  )
  assert main.main(argv) == 2
  assert "was begun with other data: photos has" in capfd.readouterr().err
  shutil.copy(tmp_path / "kept.jpg", place / "circle/001.jpg")
  assert main.main(argv) == 0
  said = capfd.readouterr().err
  assert "resume " in said and "expected" not in said
  assert "balanced" in said and "macro F1" in said

  found = runs.results(tmp_path / "run")
  assert (found["task"], found["fit"]) == ("photos", "crop")
  assert found["data"]["splits"]["test"] == {"slices": "test", "images": 10}
  for name in ("test_accuracy", "test_balanced_accuracy", "test_macro_f1"):
    assert found[name]["per_seed"].keys() == {"7"}
    assert found[name] == found["tested"][-1][name]
  # Two images of each class.
  assert found["test_accuracy"]["mean"] == pytest.approx(
    found["test_balanced_accuracy"]["mean"]
  )
  assert (tmp_path / "run" / "report.png").exists()


def test_the_commands_of_the_docs(photos, tmp_path, monkeypatch, capfd):
  """Their fields exist, and what they say of a broken file is what is said."""
  text = (helpers.ROOT / "docs" / "your_images.md").read_text()
  shell = "".join(re.findall("```sh\n(.*?)```", text, re.DOTALL))
  commands = [
    shlex.split(line)[1:]
    for line in shell.replace("\\\n", " ").splitlines()
    if "main.py" in line
  ]
  assert len(commands) >= 4
  for _, _, name, *flags in commands:
    config = config_files.load(name)
    for flag in flags:
      if found := re.fullmatch(r"--config\.([\w.]+)=(.*)", flag):
        value = True if found[2] == "true" else found[2]
        config[found[1]] = value
    resolve.resolve(config)
  for place, value in re.findall(r"`--config\.([\w.]+)=([^`]*)`", text):
    field = fields.find(place)
    if field.choices:
      assert value in field.choices
  monkeypatch.chdir(photos.parent)
  assert main.main(commands[0][:-1] + [str(tmp_path / "run")]) == 2
  said = capfd.readouterr().err
  bad = re.search("bad .*", said)[0]
  error = re.search("error: .*", said)[0]
  size = r"\(\d+ bytes"  # Our ten images of a class are others.
  for line in (bad, error):
    assert re.sub(size, "", line) in re.sub(size, "", text)
