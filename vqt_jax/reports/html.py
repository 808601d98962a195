"""Pages of reports: one HTML file each, which needs nothing else.

Templates are in `templates/`; what they are given is escaped.
"""

import base64
from collections.abc import Iterable, Mapping
import functools
import io
import math
import re
import shlex
from typing import Any

import numpy as np
import PIL.Image

from vqt_jax import errors
from vqt_jax import version
from vqt_jax.config import config_dict
from vqt_jax.reports import figures
from vqt_jax.reports import style
from vqt_jax.runtime import files
from vqt_jax.runtime import units

REPORT = "report.html"
THUMBNAIL = 192  # Most pixels of a side.


def check_folder(folder: files.Path) -> None:
  """Raise a `UserError` if a report there would replace that of a run."""
  if files.exists(folder / "tuned"):
    raise errors.UserError(
      f"--output {folder}: there is a run, whose {REPORT} would be lost. Choose"
      " another folder."
    )


def write(path: files.Path, template: str, **content: Any) -> None:
  """Write a page.

  Args:
    path: of the file.
    template: name of its template.
    **content: what the template reads.

  Raises:
    UserError: it cannot be written.
  """
  page = _templates().get_template(template)
  # Names of files may hold bytes that are no UTF-8.
  text = page.render(version=version.__version__, **content)
  files.write(path, text.encode(errors="replace"))


@functools.cache
def _templates() -> Any:
  """Return the templates; Jinja takes a while to import."""
  import jinja2

  made = jinja2.Environment(
    loader=jinja2.PackageLoader("vqt_jax.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  made.filters |= {
    "percent": percent,
    "bytes": units.format_bytes,
    "duration": duration,
    "bind_units": bind_units,
  }
  return made


def percent(share: float | None, decimals: int = 1) -> str:
  """Format a share in per cent, without the sign; "–" if there is none."""
  if share is None or math.isnan(share):
    return "–"
  return f"{100 * share:.{decimals}f}"


def duration(seconds: float) -> str:
  """Format seconds, e.g. "58 s", "3 min", "2.5 h"."""
  if seconds < 120:
    return f"{seconds:.0f} s"
  if seconds < 2 * 3600:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:,.1f} h"


def bind_units(text: str) -> str:
  """Keep numbers and units of a text in one line."""
  unit = r"[%±]|(s|min|h|[KMG]iB|points)\b"
  return re.sub(rf"(?<=\d) (?={unit})|(?<=±) ", "\xa0", text)


def command(*words: Any) -> str:
  """Return a command line of this program."""
  return shlex.join(map(str, ("python", *words)))


def figure(
  title: str, drawn: figures.matplotlib.figure.Figure, name: str
) -> dict[str, Any]:
  """Return a figure for the template: its title, and the rest as SVG.

  Args:
    title: of the figure.
    drawn: the figure, without its title.
    name: unique in the page.
  """
  import markupsafe

  return {"title": title, "svg": markupsafe.Markup(style.to_svg(drawn, name))}


def thumbnail(image: np.ndarray) -> str:
  """Return an image (height, width, 3) in 0..1 as a small data URI."""
  found = PIL.Image.fromarray((255 * image + 0.5).astype(np.uint8))
  found.thumbnail((THUMBNAIL, THUMBNAIL))
  return _data_uri(found, "webp", quality=80)


def overlay(colours: np.ndarray) -> str:
  """Return colours (rows, columns, RGBA) in 0..1 as a data URI."""
  return _data_uri(
    PIL.Image.fromarray((255 * colours + 0.5).astype(np.uint8)), "png"
  )


def _data_uri(image: PIL.Image.Image, kind: str, **options: Any) -> str:
  content = io.BytesIO()
  image.save(content, kind, **options)
  encoded = base64.b64encode(content.getvalue()).decode()
  return f"data:image/{kind};base64,{encoded}"


def class_rows(
  names: Iterable[str],
  images: Iterable[int],
  right: Iterable[int],
  predicted: Iterable[int],
  seeds: int = 1,
) -> list[dict[str, Any]]:
  """Return the rows of a table of classes.

  Args:
    names: of the classes.
    images: of each class.
    right: those of them that are right, summed over the seeds.
    predicted: images that are taken for it, summed over the seeds.
    seeds: number of them.
  """
  share = lambda a, b: a / b if b else None
  return [
    {
      "name": name,
      "images": n,
      "recall": share(hits, n * seeds),
      "precision": share(hits, taken),
      "f1": share(2 * hits, taken + n * seeds),
    }
    for name, n, hits, taken in zip(names, images, right, predicted)
  ]


def reproduce(path: files.Path, values: Mapping[str, Any]) -> dict[str, Any]:
  """Return what the template needs to tell how a run can be repeated.

  Args:
    path: of the `config.json`.
    values: its contents.

  Returns:
    `command`; `config`, all fields as text; and `changed`, those of them that
    are not as in the default config.
  """
  default = config_dict.to_json(config_dict.default_config())
  differ = config_dict.differences(default, values)
  changed = {name: new for name, (_, new) in differ.items() if new is not None}
  return {
    "command": command("main.py", "--config", path, "--workdir", "runs/again"),
    "changed": _flat(changed),
    "config": _flat(config_dict.flatten(values)),
  }


def _flat(value: Mapping[str, Any]) -> dict[str, str]:
  """Return settings as text, lists joined with commas."""
  text = lambda x: (
    ", ".join(map(str, x)) if isinstance(x, list | tuple) else str(x)
  )
  return {name: text(x) for name, x in value.items()}
