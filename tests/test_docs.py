"""What the docs point to exists."""

import importlib
import pathlib
import re

import pytest

from scripts import fields_page
import vqt_jax
from vqt_jax.config import fields

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  *ROOT.glob("*.md"),
  *ROOT.glob("docs/*.md"),
  *ROOT.glob("vqt_jax/assets/*.md"),
]
PACKAGE = ROOT / "vqt_jax"
ROOMS = [path.stem for path in PACKAGE.iterdir()]
FILE = re.compile(r"(?:\w+/)*\w+\.(?:py|md|sh)")


def prose(page):
  """The text of a page without code blocks; the changes are of old names."""
  text = page.read_text()
  text = text.split("## 0.2.0")[0]
  return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def anchors(page):
  """Names of the headings of a page, as GitHub makes them."""
  titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
  clean = lambda title: re.sub(r"[^\w\- ]", "", title.lower())
  return {clean(title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if "://" in link:
      continue
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


def find(name):
  """Import what a dotted name in the package names; None: nothing."""
  parts = name.split(".")
  for i in range(len(parts), 0, -1):
    try:
      found = importlib.import_module(".".join(parts[:i]))
    except ModuleNotFoundError:
      continue
    for part in parts[i:]:
      fields_of = getattr(found, "__dataclass_fields__", {})
      found = getattr(found, part, fields_of.get(part))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_files_exist(page):
  for code in re.findall(r"`([^`\n]+)`", prose(page)):
    name = code.removeprefix("vqt_jax.").partition("(")[0]
    if FILE.fullmatch(code):
      assert (ROOT / code).exists() or any(PACKAGE.rglob(code)), code
    elif re.fullmatch(r"[a-z]\w*(\.\w+)+", name):
      room, _, rest = name.partition(".")
      is_field = any(f"{x}.".startswith(f"{rest}.") for x in fields.FIELDS)
      is_file = rest in ("json", "csv", "png")
      if is_file or (room == "config" and is_field):
        continue
      if room in ROOMS:
        assert find(f"vqt_jax.{name}") is not None, code


def test_messages_in_troubleshooting_are_those_of_the_program():
  """Except for the first words of those that are put together."""
  files = [*PACKAGE.rglob("*.py"), ROOT / "main.py"]
  source = " ".join(path.read_text() for path in [*files, ROOT / "Makefile"])
  source = re.sub(r'"\s*\n\s*[rf]*"', "", source)  # Strings in parts.
  text = (ROOT / "docs" / "troubleshooting.md").read_text()
  cells = re.findall(r"(?m)^\| (`.*?) \| ", text.split("## Setting up")[1])
  for quoted in re.findall(r"`([^`]+)`", " ".join(cells)):
    fixed = re.sub(r"^(Unknown (?=config|kind)|expected|the \w+ )", "", quoted)
    assert fixed.strip() in source, quoted


def test_the_page_of_fields_is_up_to_date():
  """Else: `python -m scripts.fields_page`."""
  assert fields_page.PAGE.read_text() == fields_page.text()


def test_the_citation_has_this_version():
  citation = (ROOT / "CITATION.cff").read_text()
  (version,) = re.findall(r"(?m)^version: (.*)$", citation)
  assert version.strip('"') == vqt_jax.__version__
