"""Colours, names and file format that all pictures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import contextlib
import functools
import io
import os
import re
from typing import Any
import warnings

from vqt_jax.reports import figures
from vqt_jax.runtime import files

INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#bf812d", "#35978f")
METHODS = {
  "vqt": "VQT",
  "head2toe": "Head2Toe",
  "linear": "linear probe",
  "instant": "instant",
  "combo": "combo",
  "auto": "auto",
  "finetune": "full fine-tuning",
  "bitfit": "BitFit",
  "partial": "partial fine-tuning",
  "vpt_shallow": "VPT-shallow",
  "vpt_deep": "VPT-deep",
  "adapter": "adapter",
  "adaptformer": "AdaptFormer",
  "lora": "LoRA",
  "ssf": "SSF",
  "vqt+vpt_deep": "VQT + VPT-deep",
  "vqt+adaptformer": "VQT + AdaptFormer",
}
# What a run tests, by its name in `results.json`.
CANDIDATES = {
  "all": "all features",
  "selected": "selected features",
  "best_all": "best setting, all features",
  "best_selected": "best setting, selected features",
}
ALONE = (4.2, 3.2)  # Inches of a figure of one panel, in a page.
SETTING = ("num_queries", "lr", "weight_decay", "query_dropout", "normalize")


def method_name(results: dict[str, Any]) -> str:
  name = METHODS.get(results["method"], results["method"])
  if results["num_queries"]:
    many = "queries" if results["num_queries"] > 1 else "query"
    name += f", {results['num_queries']} {many} per block"
  return name


def candidate_name(tested: dict[str, Any]) -> str:
  return CANDIDATES.get(tested["name"], tested["name"])


def backbone_name(backbone: str) -> str:
  """Shorten paths in the names of backbones; public names stay."""
  short = lambda name: os.path.basename(name) if "." in name else name
  first, *others = backbone.split(" ")
  return " ".join([first, *map(short, others)])


def percent_axis(
  decimals: int = 0,
) -> figures.matplotlib.ticker.PercentFormatter:
  return figures.matplotlib.ticker.PercentFormatter(1.0, decimals, symbol=" %")


def figure_of(width: float, height: float) -> figures.matplotlib.figure.Figure:
  """Create a figure of a size in inches, without pyplot's global state."""
  return figures.matplotlib.figure.Figure(
    (width, height), dpi=130, layout="constrained", facecolor="white"
  )


def write_title(
  figure: figures.matplotlib.figure.Figure, title: str, below: str, y: float
) -> None:
  """Write the title of a figure, and a line that begins at height `y`."""
  figure.suptitle(
    title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK
  )
  figure.text(0.01, y, below, color=FAINT, va="top")


def legible(names: Sequence[str]) -> list[str]:
  """Return names as they can be drawn: `#3` where no font has the third's."""
  fonts = _installed_fonts() if _without_default("".join(names)) else {}
  known = frozenset().union(*fonts.values())
  return [
    name if _without_default(name) <= known else f"#{number}"
    for number, name in enumerate(names, 1)
  ]


def _find_fonts(letters: Iterable[str]) -> list[str]:
  """Return families of installed fonts with letters that the usual one lacks.

  Matplotlib takes each glyph from the first family that has it.
  """
  missing, families = _without_default(letters), []
  if missing:
    for family, known in _installed_fonts().items():
      if missing & known:
        missing -= known
        families.append(family)
  return families


def _without_default(letters: Iterable[str]) -> set[int]:
  """Return the code points that the usual font has no glyph for."""
  manager = figures.matplotlib.font_manager
  properties = manager.FontProperties()
  usual = manager.get_font(manager.findfont(properties)).get_charmap()
  return {ord(x) for x in letters if not x.isspace()} - usual.keys()


@functools.cache
def _installed_fonts() -> dict[str, frozenset[int]]:
  """Return the code points that each family of installed fonts has.

  Of Matplotlib's own fonts, one has a box for every letter, and others have
  letters in places of others.
  """
  manager, own = figures.matplotlib.font_manager, figures.matplotlib
  found = {}
  for font in manager.fontManager.ttflist:
    if font.fname.startswith(own.get_data_path()) or font.name in found:
      continue
    with contextlib.suppress(OSError, RuntimeError):  # No longer there.
      found[font.name] = frozenset(manager.get_font(font.fname).get_charmap())
  return found


def save(
  figure: figures.matplotlib.figure.Figure, path: str | os.PathLike
) -> None:
  """Write a figure as PNG."""
  files.write(files.path(path), _render(figure, "png"))


# Colours of figures, and the variables of the page's style that stand for them.
_VARIABLES = {
  "#000000": "ink",
  INK: "ink",
  FAINT: "faint",
  GRID: "grid",
  "#ffffff": "paper",
  **{colour: f"c{i}" for i, colour in enumerate(COLOURS)},
}


def to_svg(figure: figures.matplotlib.figure.Figure, name: str) -> str:
  """Return a figure as an SVG element of a page, in the colours of its style.

  Args:
    figure: without names from elsewhere in its ids.
    name: of the figure, unique in the page; its ids begin with it.
  """
  options = {"svg.fonttype": "none", "svg.hashsalt": name}
  unneeded = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  with figures.matplotlib.rc_context(options):
    svg = _render(figure, "svg", transparent=True, metadata=unneeded).decode()
  svg = svg[svg.index("<svg") :]
  svg = re.sub(
    r"(?s)<defs>\s*<style.*?</defs>|<metadata>.*?</metadata>", "", svg
  )
  for colour, variable in _VARIABLES.items():
    svg = svg.replace(colour, f"var(--{variable})")
  svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
  return re.sub(r"\s*\n\s*", "\n", svg)


def _render(
  figure: figures.matplotlib.figure.Figure, kind: str, **options: Any
) -> bytes:
  """Return a figure as a file of a format, with the style of all of them."""
  for ax in figure.axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color(FAINT)
    for line in ax.get_xgridlines() + ax.get_ygridlines():
      line.set_color(GRID)
    ax.set_axisbelow(True)
    ax.title.set_color(INK)
  texts = figure.findobj(figures.matplotlib.text.Text)
  if others := _find_fonts("".join(text.get_text() for text in texts)):
    for text in texts:
      text.set_fontfamily([*text.get_fontfamily(), *others])
  content = io.BytesIO()
  with warnings.catch_warnings():  # Of letters that no font has.
    warnings.filterwarnings("ignore", "Glyph .* missing")
    figure.savefig(content, format=kind, **options)
  return content.getvalue()
