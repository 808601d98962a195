"""`vqt-jax evaluate`: of folders, tables and tasks; and what is refused."""

import re

import jax
import numpy as np
import PIL.Image
import pytest

from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax import evaluate

CLASSES = ("class 0", "class 1", "class 2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a bundle, its backbone, and labelled images."""
  place = tmp_path_factory.mktemp("place")
  backbone = helpers.tiny_backbone(depth=1)
  vqt_jax.save_npz(place / "vit.npz", backbone)
  tuner = vqt_jax.make_tuner("vqt", backbone, len(CLASSES))
  seeds = [tuner.init(jax.random.key(seed)) for seed in range(2)]
  model = helpers.tuned_model(backbone, tuner, *seeds)
  helpers.write_bundle(place / "run", place / "vit.npz", model)
  rng = np.random.default_rng(0)
  table = ["path,label,split"]
  for i in range(9):
    path = place / "images" / CLASSES[i % 3] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (9, 14, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    split = "test" if i < 4 else "train"
    table.append(f"{path.relative_to(place)},{CLASSES[i % 3]},{split}")
  (place / "table.csv").write_text("\n".join(table))
  return place


@pytest.fixture
def start(place, monkeypatch, capsys):
  monkeypatch.chdir(place)

  def start(*arguments):
    status = evaluate.main(["evaluate", *arguments])
    return status, "".join(capsys.readouterr())

  return start


def expected_accuracy(place, images):
  model = vqt_jax.load(place / "run")
  paths = sorted((place / "images").rglob("*.png"))
  paths = [path for path in paths if int(path.stem) in images]
  right = [
    a == path.parent.name for a, path in zip(model.predict(paths), paths)
  ]
  return np.mean(right)


def test_a_folder(start, place, tmp_path):
  status, said = start("run", "images", f"--output={tmp_path / 'out'}")
  assert status == 0
  found = runs.read_json(tmp_path / "out" / "evaluation.json")
  assert found["images"] == 9
  assert found["accuracy"] == expected_accuracy(place, range(9))
  rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
  assert len(rows) == 10 and rows[1].startswith("class 0/0.png,class 0,class ")


def test_a_split_of_a_table(start, place, tmp_path):
  for split, images in (("test", range(4)), ("train", range(4, 9))):
    output = tmp_path / split
    status, _ = start(
      "run", "table.csv", f"--split={split}", f"--output={output}"
    )
    assert status == 0
    found = runs.read_json(output / "evaluation.json")
    assert found["images"] == len(images)
    assert found["accuracy"] == expected_accuracy(place, images)


def test_a_task(alone, material, tmp_path, monkeypatch, capsys):
  """What the run itself found on its test split, seeds together."""
  workdir = alone["kept"]
  arguments = [str(workdir), "squares", f"--data_dir={material}"]
  status = evaluate.main(["evaluate", *arguments, f"--output={tmp_path}"])
  assert status == 0, capsys.readouterr().err
  found = runs.read_json(tmp_path / "evaluation.json")
  test = runs.results(workdir)["test_ensemble_accuracy"]
  assert found["images"] == 30
  assert found["accuracy"] == pytest.approx(test["mean"])
  assert found["interval"] == pytest.approx(test["interval"])


def test_images_that_cannot_be_read(start, place, tmp_path):
  bad = place / "images" / CLASSES[0] / "bad.jpg"
  bad.write_bytes(b"")
  try:
    status, said = start("run", "images")
  finally:
    bad.unlink()
  assert status == 1
  assert "bad.jpg: it is empty" in said and "1 of 10 images could not" in said
  assert "9 images" in said


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "found 0 arguments"),
    (["run"], "found 1 arguments"),
    (["images", "run"], "images holds no tuned model"),
    (["run", "images", "--split=test"], "no images of a split 'test'"),
    (["run", "images", "--split=x"], "split"),
    (["run", "vit.npz"], "neither a folder nor a table"),
    (["run", "nowhere/"], "nowhere"),
    (["run", "other"], "classes that the model does not know: cat, dog. Its"),
  ],
)
def test_bad_input(start, place, arguments, words):
  for name in ("cat", "dog"):
    (place / "other" / name).mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (4, 4)).save(place / "other" / name / "1.png")
  status, said = start(*arguments)
  assert status == 2 and "Traceback" not in said
  assert re.search(words, said), said
