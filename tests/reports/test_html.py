"""Reports as pages: whole, escaped, without a network, on small screens."""

import functools
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.experiments import test_compare
from tests.reports import test_figures
from tests.reports import test_vtab_summary
from vqt_jax import errors
from vqt_jax import results
from vqt_jax.reports import compare
from vqt_jax.reports import compare_report
from vqt_jax.reports import evaluation
from vqt_jax.reports import evaluation_report
from vqt_jax.reports import html as html_lib
from vqt_jax.reports import judgement
from vqt_jax.reports import notable
from vqt_jax.reports import run_report
from vqt_jax.reports import vtab_report
from vqt_jax.reports import vtab_summary

CLASSES = ("<script>alert(1)</script>", "\"&'", "$x_1$ {{ 1 }}", "日本" * 30)
TASKS = ("dtd", "kitti", "eurosat")
SCREEN = 360  # Pixels.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Pages of a run, a comparison and others, of hostile names."""
  folder = tmp_path_factory.mktemp("pages")
  found = test_figures.outcome(task=CLASSES[0], best=True, selected=True)
  found |= {
    "seconds": {"training": 6.7},
    "test_classes": {
      "class": CLASSES,
      "images": [9, 1, 7, 0],
      "right": [20, 0, 21, 0],
      "predicted": [25, 0, 26, 0],
    },
  }
  rng = np.random.default_rng(0)
  pictures = [
    judgement.Picture(
      notable.Answer(CLASSES[0], i % 4, 1, 0.5, None),
      rng.random((20, 30, 3)),
      rng.random((12, 4, 6)),
    )
    for i in range(5)
  ]
  label, together = rng.integers(0, 4, (2, 60), np.uint8)
  predictions = results.Predictions(
    label, np.stack([together] * 3), together, rng.random(60, np.float32)
  )
  report = functools.partial(run_report.report, found, {"task": CLASSES[0]})
  report(folder / "run.html", predictions, pictures)
  report(folder / "old_run.html")
  outcomes = {
    name: test_compare.outcome(accuracy=0.9 - i / 50)
    for i, name in enumerate(CLASSES)
  }
  compare_report.report(
    folder / "compare.html",
    compare.summarize(outcomes),
    f"differ in {CLASSES[0]}",
    {name: folder / name for name in CLASSES},
  )
  p = rng.dirichlet(np.ones(4), 60)
  evaluation_report.report(
    folder / "evaluation.html",
    evaluation.summarize(p, rng.integers(0, 4, 60), CLASSES),
    pictures,
    f"vqt for {CLASSES[0]}, judged on \udcff",
    html_lib.command("evaluate", CLASSES[0]),
    {"hash": CLASSES[1]},
  )
  vtab_report.report(
    folder / "vtab.html",
    vtab_summary.summarize(test_vtab_summary.results(TASKS)),
    {"task": "all", "init": "".join(CLASSES)},
    TASKS[:1],
  )
  return {path.stem: path.read_text() for path in folder.glob("*.html")}


class _Elements(html.parser.HTMLParser):
  """Collects tags with their attributes, ids, and text."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def test_names_are_text(pages):
  """None becomes an element, an attribute or a template."""
  kinds = {"run", "old_run", "compare", "evaluation", "vtab"}
  assert pages.keys() == kinds
  for kind, page in pages.items():
    found = _Elements(page)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == (kind in ("run", "evaluation"))
    assert CLASSES[0] in found.text
    for name in CLASSES[1:3]:
      assert name in found.text, kind
    assert not any(name.startswith("on") for _, x in found.tags for name in x)


def test_pages_are_whole(pages):
  """Ids are unique, references lead to them, and nothing is elsewhere.

  But for the reports of all tasks beside that of their summary.
  """
  for kind, page in pages.items():
    found = _Elements(page)
    own = [("a", {"href": f"{TASKS[0]}/report.html"})]
    links = [each for each in found.tags if each[0] == "a"]
    assert links == (own if kind == "vtab" else [])
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len({*ids})
    for tag, attrs in found.tags:
      if tag == "a":
        continue
      for name in ("src", "href", "xlink:href"):
        link = attrs.get(name, "data:")
        assert link.startswith("data:") or link[1:] in ids, (tag, link)
      if label := attrs.get("aria-labelledby"):
        assert label in ids
    for reference in re.findall(r"url\(#([^)]+)\)", page):
      assert reference in ids
    assert "http" not in page.replace("http-equiv", "").replace(
      "http://www.w3.org/",
      "",  # Namespaces of SVG.
    )


def test_a_run_is_judged_like_an_evaluation(pages):
  """As far as it has kept what that takes."""
  sections = ["confusion", "calibration", "images"]
  for kind, expected in (
    ("run", sections),
    ("evaluation", sections),
    ("old_run", []),
  ):
    found = [x.get("id") for tag, x in _Elements(pages[kind]).tags]
    assert [x for x in found if x in sections] == expected
  assert "the 3 seeds answer together" in pages["run"]


def test_mistakes_of_many_classes_come_without_a_matrix():
  label, predicted = np.arange(200).repeat(3), np.arange(600) // 3
  predicted[[3, 4, 9, 0]] = [7, 7, 2, 5]
  pairs, images = np.unique(
    np.stack([label, predicted]), axis=1, return_counts=True
  )
  found = judgement.confusion(pairs, images, [*map(str, range(200))])
  assert found["confusion"] is None
  rows = [(x["true"], x["predicted"], x["images"]) for x in found["worst"]]
  assert rows == [("1", "7", 2), ("0", "5", 1), ("3", "2", 1)]
  assert found["worst"][0]["share"] == pytest.approx(2 / 3)


def test_the_page_of_all_tasks(pages):
  """Every task, also one that is missing, and means of those that are there."""
  text = " ".join(_Elements(pages["vtab"]).text.split())
  assert "is 53.0 % as the mean of 3 groups, and 53.0 % as the mean of" in text
  assert "not prepared and missing: caltech101, cifar100, flowers102" in text
  for name, accuracy in zip(TASKS, ("51.0", "53.0", "55.0")):
    assert f"{name} {accuracy} ± 1.4" in text
  assert "sun397 not prepared" in text and "HST" in text


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_shows_them_on_a_small_screen(pages, tmp_path):
  """Without scrolling sideways, an error, or a request."""
  ask = """<script>const root = document.documentElement;
  root.dataset.found = JSON.stringify({
    outside: root.scrollWidth - root.clientWidth,
    asked: performance.getEntriesByType("resource").map(each => each.name)
      .filter(name => !name.startsWith("data:")),
  })</script>"""
  frames = json.dumps([page.replace("</html>", ask) for page in pages.values()])
  # One start of the browser for all pages; `<` would end the script.
  frames = frames.replace("<", "\\u003c")
  (tmp_path / "all.html").write_text(f"""<body><script>
    for (const page of {frames}) {{
      const frame = document.createElement("iframe");
      frame.style.cssText = "width: {SCREEN}px; height: 800px; border: 0";
      frame.srcdoc = page;
      frame.onload = () => document.body.append(
        "FOUND" + frame.contentDocument.documentElement.dataset.found + "END");
      document.body.append(frame);
    }}
  </script>""")
  command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
  command += [f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
  command += ["--virtual-time-budget=5000", str(tmp_path / "all.html")]
  dom = subprocess.run(command, capture_output=True, text=True).stdout
  found = re.findall("FOUND({.*?})END", dom)
  assert [json.loads(each) for each in found] == [
    {"outside": 0, "asked": []}
  ] * len(pages)


def test_notable_answers():
  """The most confident mistakes and least certain hits; few are kept."""
  kept = notable.Notable()
  confidence = np.random.default_rng(0).random(100)
  for i, each in enumerate(confidence):
    kept.add(notable.Answer(str(i), 0, i % 2, each, None))
  order = lambda x: [answer.confidence for answer in x]
  assert (
    order(kept.mistakes) == sorted(confidence[1::2])[: -notable.COUNT - 1 : -1]
  )
  assert order(kept.hits) == sorted(confidence[::2])[: notable.COUNT]


def test_a_report_does_not_replace_that_of_a_run(tmp_path):
  html_lib.check_folder(tmp_path)
  (tmp_path / "tuned").mkdir()
  with pytest.raises(errors.UserError, match="whose report.html would be lost"):
    html_lib.check_folder(tmp_path)
