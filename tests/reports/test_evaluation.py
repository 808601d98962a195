"""What answers are worth: the numbers of scikit-learn, and calibration."""

import csv
import warnings

from fontTools import fontBuilder
from fontTools.pens import ttGlyphPen
from matplotlib import font_manager
import numpy as np
import pytest
import sklearn.metrics

from tests import helpers
from vqt_jax.reports import evaluation
from vqt_jax.reports import evaluation_figure
from vqt_jax.reports import style
from vqt_jax.runtime import console as console_lib

CLASSES = ("a", "b", "$c_1$", "never")


@pytest.fixture(scope="module")
def answers():
  """Probabilities (n, C), of which the last class is never true or said."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 300)
  logits = rng.normal(size=(300, 4))
  logits[np.arange(300), labels] += 1.5
  logits[:, 3] = -9
  p = np.exp(logits)
  return (p / p.sum(axis=1, keepdims=True)).astype(np.float32), labels


def test_numbers_are_those_of_scikit_learn(answers):
  p, labels = answers
  found, said = evaluation.summarize(p, labels, CLASSES), p.argmax(axis=1)
  metrics = sklearn.metrics
  for name, expected in (
    ("accuracy", metrics.accuracy_score(labels, said)),
    ("balanced_accuracy", metrics.balanced_accuracy_score(labels, said)),
    ("macro_f1", metrics.f1_score(labels, said, average="macro")),
  ):
    assert found[name] == pytest.approx(expected), name
  np.testing.assert_array_equal(
    found["confusion"][:3, :3], metrics.confusion_matrix(labels, said)
  )
  assert found["confusion"][3].sum() == found["confusion"][:, 3].sum() == 0
  rows = found["per_class"]
  precision = metrics.precision_score(labels, said, average=None)
  np.testing.assert_allclose([r["precision"] for r in rows[:3]], precision)
  assert np.isnan(rows[3]["precision"]) and rows[3]["images"] == 0
  low, high = found["interval"]
  assert 0 < low < found["accuracy"] < high < 1


def test_calibration_error():
  confidence, right = np.array([0.9, 0.9, 0.6, 0.7]), np.array([1, 0, 1, 0])
  found = evaluation.calibration(confidence, right)
  # |0.9 - 1/2| of two images; 0.6 and 0.7 are in bins of their own.
  assert found["ece"] == pytest.approx((2 * 0.4 + 0.4 + 0.7) / 4)
  assert [b["images"] for b in found["bins"]] == [1, 1, 2]
  sure = evaluation.calibration(np.ones(3), np.ones(3))
  assert sure["ece"] == 0 and sure["bins"][0]["confidence"] == 1


def test_a_temperature_is_found_again(answers):
  """Of probabilities that were sharpened by a known one."""
  p, labels = answers
  p = p.astype(np.float64)
  best = evaluation.temperature(p, labels)["value"]
  for value in (0.5, 3.0):
    sharpened = p ** (1 / value)
    sharpened /= sharpened.sum(axis=1, keepdims=True)
    found = evaluation.temperature(sharpened, labels)
    assert found["value"] == pytest.approx(best / value, rel=0.01)
    before = evaluation.summarize(sharpened, labels, CLASSES)["calibration"]
    assert found["ece"] < before["ece"]


def test_one_image_is_enough():
  found = evaluation.summarize(np.eye(2)[:1], np.array([0]), ("a", "b"))
  assert found["accuracy"] == 1 and found["calibration"]["ece"] == 0


def test_letters_that_the_usual_font_lacks(tmp_path, monkeypatch):
  """Drawn with an installed font that has them; else numbers stand for them."""
  names, drawn = ("a", "日本", "日"), []
  monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
  monkeypatch.setattr(style, "_installed_fonts", lambda: {})
  assert style.legible(names) == ["a", "#2", "#3"]
  evaluation_figure.confusion(np.eye(3, dtype=int), names, "x.png")
  (ax, _), said = drawn[0].axes, "true class (#N: row N of per_class.csv)"
  assert ax.get_ylabel() == said
  assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "#2", "#3"]

  monkeypatch.undo()
  make_font(tmp_path / "made.ttf", "Made for this", "日")
  monkeypatch.setattr(
    font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist]
  )
  font_manager.fontManager.addfont(tmp_path / "made.ttf")
  style._installed_fonts.cache_clear()
  assert style.legible(names) == ["a", "#2", "日"]
  figure = style.figure_of(1, 1)
  text = figure.text(0, 0, "日 a")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    style.save(figure, tmp_path / "x.png")
  assert text.get_fontfamily()[1:] == ["Made for this"]
  style._installed_fonts.cache_clear()


def make_font(path, family, letters):
  """A font that has squares for some letters."""
  names = [".notdef", *(f"u{ord(x):x}" for x in letters)]
  pen = ttGlyphPen.TTGlyphPen(None)
  pen.moveTo((0, 0))
  for corner in ((0, 700), (700, 700), (700, 0)):
    pen.lineTo(corner)
  pen.closePath()
  font = fontBuilder.FontBuilder(1000, isTTF=True)
  font.setupGlyphOrder(names)
  font.setupCharacterMap(dict(zip(map(ord, letters), names[1:])))
  font.setupGlyf(dict.fromkeys(names, pen.glyph()))
  font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
  font.setupHorizontalHeader(ascent=800, descent=-200)
  font.setupNameTable({"familyName": family, "styleName": "Regular"})
  font.setupOS2()
  font.setupPost()
  font.save(path)


def test_names_of_classes_and_files_of_any_kind(answers, tmp_path):
  p, labels = answers
  names = ("true class", 'a,"b"', "日本", "never")
  summary = evaluation.summarize(p, labels, names)
  rows = [{"image": "\udcff.png", "label": "日本"}]
  evaluation.write(summary, rows, tmp_path)
  with open(tmp_path / "confusion.csv", encoding="utf-8", newline="") as file:
    table = list(csv.reader(file))
  assert table[0] == ["true class", *names]
  assert [row[0] for row in table[1:]] == list(names)
  assert len(table[1]) == 5
  content = (tmp_path / "predictions.csv").read_bytes()
  assert content.split(b"\n")[1].startswith(b"\xff.png,")


def test_what_is_written(answers, tmp_path, capsys):
  p, labels = answers
  summary = evaluation.summarize(p, labels, CLASSES)
  console = console_lib.Console()
  evaluation.show(console, summary)
  rows = [{"image": "x,y.png", "label": "a"}]
  evaluation.write(summary, rows, tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == [
    "calibration.png",
    "confusion.csv",
    "confusion.png",
    "evaluation.json",
    "per_class.csv",
    "predictions.csv",
  ]
  for name in ("calibration.png", "confusion.png"):
    assert helpers.colours(tmp_path / name) > 20
  table = (tmp_path / "confusion.csv").read_text().splitlines()
  assert table[0] == "true class,a,b,$c_1$,never"
  assert table[4] == "never,0,0,0,0"
  assert (tmp_path / "per_class.csv").read_text().splitlines()[
    4
  ] == "never,0,,,"
  said = capsys.readouterr().err
  assert f"{100 * summary['accuracy']:.1f} %" in said and "taken for" in said
