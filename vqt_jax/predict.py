"""Classify images with what a run has trained.

  vqt-jax predict runs/photos new/ --top 3 --output predictions.csv

and `python -m vqt_jax.predict` with the same arguments: first the workdir of a
finished run, or a bundle (its tuned/), then images: files, folders with all
that is below them, "*.jpg", or - for paths on standard input, one a line.
Several runs on one backbone answer side by side, in one pass of it.

--top K          the K most probable classes; default: 1
--output FILE    .csv, or .jsonl for JSON lines; default: CSV, on the screen
--backbone FILE  the backbone, if it is elsewhere than in training
--attention DIR  also pictures of what the queries attend to, DIR/1_NAME.png

Each image is a row, in order, written as soon as its batch is done. An image
that cannot be read is a row with an error.

Exit status: 0, 1 if an image could not be read, 2 if there is something to
correct.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import csv
import itertools
import json
import os
import pathlib
import sys
import time
from typing import IO, Any

from absl import flags
from etils import epy
import numpy as np

from vqt_jax import errors
from vqt_jax.models import scaling
from vqt_jax.runtime import files
from vqt_jax.tuned import arguments as arguments_lib

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  from vqt_jax.reports import attention_figure
  from vqt_jax.reports import style
  from vqt_jax.tuned import model as model_lib

USAGE = "Usage: RUN... IMAGES... [--top K] [--output FILE] (--help tells more)."


def main(argv: Sequence[str]) -> int:
  """Predict as a command line says; return the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_integer("top", 1, "", 1, flag_values=values)
  for text in ("output", "backbone", "attention"):
    flags.DEFINE_string(text, None, "", flag_values=values)
  command = lambda arguments: predict(
    arguments, values.top, values.output, values.backbone, values.attention
  )
  interrupted = "Interrupted; all rows that are done are written."
  try:
    return arguments_lib.run(argv, values, __doc__, command, interrupted)
  except BrokenPipeError:  # Of `| head`. Python would complain at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as e:
    place = values.output or "standard output"
    print(f"error: Cannot write {place}: {e.strerror}.", file=sys.stderr)
    return 2


def predict(
  arguments: Sequence[str],
  top: int = 1,
  output: str | None = None,
  backbone: str | None = None,
  attention: str | None = None,
) -> int:
  """Classify images, see the top of this file; return the exit status."""
  runs, rest = arguments_lib.split(arguments, USAGE)
  if not rest:
    raise errors.UserError(f"No images given. {USAGE}")
  models = model_lib.load(runs, backbone)
  names = list(arguments_lib.find_images(rest))
  if not names:
    raise errors.UserError("No path of an image came on standard input.")
  draw = Attention(models, attention) if attention else None
  started, bad = time.monotonic(), 0
  with open_output(output) as out:
    write = row_writer(out, output, list(models.models), top)
    answers = itertools.chain.from_iterable(models.stream(names))
    for number, (name, answer) in enumerate(zip(names, answers), 1):
      for run, model in models.models.items():
        if isinstance(answer, errors.UserError):
          write(name, run, [], str(answer))
        else:
          write(name, run, model_lib.best(answer[run], model.classes, top), "")
      if isinstance(answer, errors.UserError):
        bad += 1
      elif draw:
        draw(number, name)
  seconds = time.monotonic() - started
  faults = f"; {bad} could not be read" if bad else ""
  plural = "s" if len(names) > 1 else ""
  print(
    f"{len(names):,} image{plural} in {seconds:.1f} s{faults}", file=sys.stderr
  )
  return 1 if bad else 0


@contextlib.contextmanager
def open_output(output: str | None) -> Iterator[IO[str]]:
  """Open the file to write to, or standard output."""
  if output is None:
    if hasattr(sys.stdout, "reconfigure"):  # Names of files as they came.
      sys.stdout.reconfigure(errors="surrogateescape")
    yield sys.stdout
    return
  if pathlib.Path(output).suffix not in (".csv", ".jsonl"):
    raise errors.UserError(f"--output {output}: expected *.csv or *.jsonl.")
  path = files.path(output)
  if files.in_bucket(path) or files.exists(path) and not path.is_file():
    raise errors.UserError(
      f"--output {output}: expected a local file, as it grows line by line."
      " Without --output, lines go to standard output."
    )
  text = dict(encoding="utf-8", errors="surrogateescape", newline="")
  with files.explain_write_errors(path), open(path, "w", **text) as opened:
    yield opened


def row_writer(
  out: IO[str], output: str | None, runs: Sequence[str], top: int
) -> Any:
  """Return a function (image, run, classes, error) that writes a row."""
  several = len(runs) > 1
  if output and output.endswith(".jsonl"):

    def write_json(image, run, classes, error):
      row = {"image": image} | ({"model": run} if several else {})
      top = [{"label": label, "probability": p} for label, p in classes]
      row |= {"error": error} if error else {"top": top}
      out.write(json.dumps(row) + "\n")
      out.flush()

    return write_json
  writer = csv.writer(out, lineterminator="\n")
  columns = ["image", *["model"] * several]
  for k in range(1, top + 1):
    suffix = f"_{k}" if k > 1 else ""
    columns += [f"label{suffix}", f"probability{suffix}"]
  writer.writerow([*columns, "error"])
  out.flush()

  def write_csv(image, run, classes, error):
    cells = [x for label, p in classes for x in (label, f"{p:.4f}")]
    cells += [""] * (2 * top - len(cells))
    writer.writerow([image, *[run] * several, *cells, error])
    out.flush()

  return write_csv


class Attention:
  """Draws what the queries of models attend to."""

  def __init__(self, models: model_lib.Models, folder: str):
    """Choose the folder.

    Raises:
      UserError: a model has no queries.
    """
    self._models: Mapping[str, model_lib.Model] = models.models
    self._folder = files.path(folder)
    for model in self._models.values():
      model.check_has_queries()

  def __call__(self, number: int, name: str) -> None:
    """Draw an image, with a row of maps for each model."""
    shown, maps, labels = [], [], []
    for run, model in self._models.items():
      image = model.prepare(name)
      maps.append(model.attention_maps(image[None])[0])
      shown.append(scaling.unscale(image, model.backbone.value_range))
      likeliest = model.predict_proba(image[None])[0].argmax()
      label = style.legible(model.classes)[likeliest]
      labels.append(label if len(self._models) == 1 else f"{run}: {label}")
    file = self._folder / f"{number}_{pathlib.PurePath(name).stem[:80]}.png"
    attention_figure.attention(np.stack(shown), np.stack(maps), labels, file)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
