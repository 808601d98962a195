"""`vqt-jax predict`: images in, rows out, in order; and what is refused."""

import csv
import io
import json
import os
import re

import jax
import numpy as np
import PIL.Image
import pytest

from tests import helpers
import vqt_jax
from vqt_jax import predict

CLASSES = ("blue", "a,b", "größer")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with two bundles, their backbone, and images."""
  place = tmp_path_factory.mktemp("place")
  backbone = helpers.tiny_backbone(depth=1)
  vqt_jax.save_npz(place / "vit.npz", backbone)
  for i, method in enumerate(("vqt", "linear")):
    tuner = vqt_jax.make_tuner(method, backbone, len(CLASSES))
    seeds = [tuner.init(jax.random.key(i + seed)) for seed in range(2)]
    model = helpers.tuned_model(backbone, tuner, *seeds)
    model.info["preprocessing"].pop("resize")
    model.info["preprocessing"]["fit"] = "crop"
    helpers.write_bundle(
      place / method, place / "vit.npz", model, classes=list(CLASSES)
    )
  rng = np.random.default_rng(0)
  for name in ("b/2.png", "a.PNG", "b/ü 1.png"):
    path = place / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 255, (9, 14, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path, "PNG")
  os.mkfifo(place / "pipe.csv")
  (place / "images" / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
  return place


@pytest.fixture
def start(place, monkeypatch, capsys):
  """Runs the command there; returns status, rows of its output, and errors."""
  monkeypatch.chdir(place)

  def start(*arguments):
    status = predict.main(["predict", *arguments])
    out, err = capsys.readouterr()
    return status, list(csv.DictReader(io.StringIO(out))), err

  return start


NAMES = ["images/a.PNG", "images/b/2.png", "images/b/ü 1.png"]


def test_a_folder(start, place):
  status, rows, err = start("vqt", "images", "--top=2")
  assert [row["image"] for row in rows] == [
    *NAMES[:2],
    "images/b/broken.jpg",
    NAMES[2],
  ]
  assert status == 1 and "4 images in" in err and "1 could not be read" in err
  assert rows[2]["label"] == "" and "broken.jpg: " in rows[2]["error"]
  del rows[2]
  expected = vqt_jax.load(place / "vqt").predict_proba(NAMES)
  for row, p in zip(rows, expected, strict=True):
    order = np.argsort(-p)
    assert (row["label"], row["label_2"]) == tuple(
      CLASSES[i] for i in order[:2]
    )
    assert float(row["probability"]) == pytest.approx(p.max(), abs=1e-4)
    assert row["error"] == ""


def test_files_patterns_and_standard_input(start, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO(f"{NAMES[2]}\n\n{NAMES[0]}\n"))
  status, rows, _ = start("vqt", NAMES[1], "-", "images/*/2.*")
  assert status == 0
  names = [NAMES[i] for i in (1, 2, 0, 1)]
  assert [row["image"] for row in rows] == names


def test_json_lines_to_a_file(start, place, tmp_path):
  output = tmp_path / "out.jsonl"
  status, rows, _ = start("vqt", "images", f"--output={output}")
  assert (status, rows) == (1, [])
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["image"] for row in rows if "error" not in row] == NAMES
  assert {row["top"][0]["label"] for row in rows if "top" in row} <= {*CLASSES}


def test_several_models_answer_side_by_side(start):
  status, rows, _ = start("vqt", "linear", *NAMES)
  assert status == 0
  assert [(row["image"], row["model"]) for row in rows] == [
    (name, model) for name in NAMES for model in ("vqt", "linear")
  ]
  for model in ("vqt", "linear"):
    _, alone, _ = start(model, *NAMES)
    labels = [row["label"] for row in rows if row["model"] == model]
    assert labels == [row["label"] for row in alone]


def test_rows_are_written_as_they_are_made(start, place, tmp_path, monkeypatch):
  """A batch is in the file before the next but one is answered."""
  monkeypatch.setattr("vqt_jax.tuned.inputs.BATCH", 2)
  output, seen = tmp_path / "out.csv", []
  pad = predict.model_lib.inputs.pad

  def watched(images, size):
    seen.append(len(output.read_text().splitlines()))
    return pad(images, size)

  monkeypatch.setattr("vqt_jax.tuned.inputs.pad", watched)
  start("vqt", *NAMES, *NAMES[:2], f"--output={output}")
  assert seen == [1, 1, 3]


def test_attention_is_drawn(start, tmp_path, pictures):
  status, *_ = start("vqt", *NAMES[:2], "--attention", str(tmp_path / "att"))
  assert status == 0
  assert sorted(os.listdir(tmp_path / "att")) == ["1_a.png", "2_2.png"]
  assert helpers.colours(tmp_path / "att" / "1_a.png") > 50


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "No run given"),
    (["vqt"], "No images given"),
    (["images", "vqt"], "images holds no tuned model"),
    (["none", "images"], "none holds no tuned model: there is no such folder"),
    (["vqt", "linear/"], "There is no image in linear/|No images given"),
    (["vqt", "vqt"], "No images given"),
    (["vqt", "none/*.png"], "No file matches none/.*png"),
    (["vqt", "images", "--output=x.txt"], r"expected \*.csv or \*.jsonl"),
    (["vqt", "images", "--output=no/x.csv"], "Cannot write no/x.csv: No such"),
    (["vqt", "images", "--output=pipe.csv"], "pipe.csv: expected a local file"),
    (["vqt", "images", "--output=gs://b/x.csv"], "expected a local file"),
    (["vqt", "images", "--top=0"], "top"),
    (["vqt", "images", "--tpo=1"], "tpo"),
    (["linear", "images", "--attention=x"], "linear has no queries"),
    (["vqt", "images", "--backbone=none.npz"], "none.npz is neither a file"),
  ],
)
def test_bad_input(start, place, arguments, words):
  before = sorted(os.listdir(place))
  status, rows, err = start(*arguments)
  assert (status, rows) == (2, [])
  assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
  assert re.search(words, err), err
  assert sorted(os.listdir(place)) == before


def test_pipes_and_folders_are_no_images(start, place):
  os.mkfifo(place / "pipe.png")
  try:
    status, rows, _ = start("vqt", "pipe.png", NAMES[0])
  finally:
    (place / "pipe.png").unlink()
  assert status == 1
  assert "pipe or device" in rows[0]["error"] and rows[1]["error"] == ""


def test_names_that_are_not_utf8(start, place, tmp_path):
  name = os.fsencode(tmp_path) + b"/\xff.png"
  with open(name, "wb") as file:
    file.write((place / NAMES[0]).read_bytes())
  for suffix in ("csv", "jsonl"):
    output = tmp_path / f"out.{suffix}"
    status, *_ = start("vqt", os.fsdecode(name), f"--output={output}")
    assert status == 0
  assert name + b"," in (tmp_path / "out.csv").read_bytes()
  assert json.loads(output.read_text())["image"] == os.fsdecode(name)


@pytest.mark.parametrize(
  "error, status, words",
  [
    (OSError(28, "No space left on device"), 2, "Cannot write x.csv: No space"),
    (KeyboardInterrupt(), 130, "Interrupted; all rows that are done"),
  ],
)
def test_ends_in_the_middle(start, monkeypatch, error, status, words):
  def fail(*args):
    raise error

  monkeypatch.setattr("vqt_jax.tuned.model.best", fail)
  found, _, said = start("vqt", NAMES[0], "--output=x.csv")
  os.remove("x.csv")
  assert found == status and words in said


def test_help(capsys):
  assert predict.main(["predict", "--help"]) == 0
  assert "vqt-jax predict runs/photos new/" in capsys.readouterr().out
