"""Export what a run has trained as a program that needs nothing of vqt_jax.

  vqt-jax export runs/photos --output photos.stablehlo

and `python -m vqt_jax.export` with the same arguments: first the workdir of a
finished run, or a bundle (its tuned/), or several on one backbone, then images
to compare answers on, as for predict; default: photographs of scikit-learn.

--output PLACE   NAME.stablehlo for jax.export, NAME.onnx for ONNX (by jax2onnx,
                 if that is installed), or a folder for a SavedModel of
                 TensorFlow; names of classes: PLACE.json, or export.json in it
--backbone FILE  the backbone, if it is elsewhere than in training

The program takes uint8 images (b, h, w, 3), RGB, of any size, and returns
logits (b, seeds, classes) and probabilities (b, classes). It is run in a new
process, and only kept if it answers as `vqt_jax.load` does on these pixels.

Exit status: 0, or 2 if there is something to correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
from etils import epy
import numpy as np

from vqt_jax import errors
from vqt_jax import version
from vqt_jax.data import decoding
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import units
from vqt_jax.tuned import arguments as arguments_lib

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  import jax

  from vqt_jax.tuned import exporting
  from vqt_jax.tuned import model as model_lib
  from vqt_jax.tuned import run_exported

USAGE = "Usage: RUN... [IMAGES...] --output PLACE (--help tells more)."
INFO = "export.json"  # In a SavedModel.
_SUFFIXES = (".stablehlo", ".onnx", "")  # The last one is of a SavedModel.
_MOST_IMAGES = 8  # Programs are compiled for each of their sizes.
# Of differences, against the largest logit or 1: of float32, and of what cannot
# be the same, bfloat16 and crops, for which Pillow rounds edges.
_EXACT, _NEAR = 1e-5, 0.1


def main(argv: Sequence[str]) -> int:
  """Export as a command line says; return the exit status."""
  values = flags.FlagValues()
  for text in ("output", "backbone"):
    flags.DEFINE_string(text, None, "", flag_values=values)

  def command(arguments):
    # Answers are compared there: others round products of float32.
    jax.config.update("jax_platforms", "cpu")
    export(arguments, values.output, values.backbone)
    return 0

  interrupted = "Interrupted; nothing is written."
  return arguments_lib.run(argv, values, __doc__, command, interrupted)


def export(
  arguments: Sequence[str], output: str | None, backbone: str | None = None
) -> None:
  """Export a program, see the top of this file.

  Raises:
    UserError: a model or an image cannot be read, the place cannot be written,
      or the program answers otherwise than the models.
  """
  console = console_lib.Console()
  runs, rest = arguments_lib.split(arguments, USAGE)
  if not output:
    raise errors.UserError(f"No --output given. {USAGE}")
  place, beside = _places(output)
  images = _images(rest)
  found = model_lib.load(runs, backbone).models.values()
  models = dict(zip(arguments_lib.short_names(runs), found))
  console.note(_describe(models), "export")
  with files.explain_write_errors(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(
      tempfile.mkdtemp(".new", f"{place.name}.", place.parent)
    )
    try:
      program = temporary / place.name
      match place.suffix:
        case ".stablehlo":
          files.write(program, exporting.to_stablehlo(models))
        case ".onnx":
          files.write(program, exporting.to_onnx(models))
        case _:
          exporting.write_saved_model(models, program)
      difference = compare(program, models, images)
      most = _allowed(models)
      if not difference <= most:
        raise errors.UserError(
          "The program answers otherwise than the run: logits differ by"
          f" {difference:.1e}, and {most:.0e} is allowed. Nothing is kept."
        )
      info = _info(models) | {"logits_differ": difference}
      if place.suffix:
        files.write_json(beside, info)
      else:
        files.write_json(program / beside.name, info)
      os.rename(program, place)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  console.note(
    f"{units.format_count(len(images), 'image')} in a new process: logits"
    f" differ by {difference:.1e} at most, of the largest",
    "check",
  )
  size = units.format_bytes(_size(place))
  console.note(f"{place} ({size})   {beside}", "results")


def _places(output: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the path of the program, and of the JSON file beside or in it.

  Raises:
    UserError: it is of no kind that can be written, or there is something.
  """
  place = files.path(output)
  if files.in_bucket(place) or place.suffix not in _SUFFIXES:
    raise errors.UserError(
      f"--output {output}: expected NAME.stablehlo, NAME.onnx, or a folder"
      " without a dot in its name for a SavedModel, on this machine."
    )
  json = place.with_name(f"{place.name}.json")
  beside = json if place.suffix else place / INFO
  for each in (place, beside):
    if os.path.lexists(each):
      raise errors.UserError(
        f"--output {output}: there is {each} already, which would be lost."
        " Choose another place, or remove it."
      )
  return place, beside


def _images(arguments: Sequence[str]) -> list[np.ndarray]:
  """Return images (h, w, 3) to compare answers on.

  Raises:
    UserError: one cannot be read.
  """
  if arguments:
    names = itertools.islice(arguments_lib.find_images(arguments), _MOST_IMAGES)
    images = [decoding.decode(name) for name in names]
    if not images:
      raise errors.UserError("No path of an image came on standard input.")
    return images
  import sklearn.datasets

  first, second = sklearn.datasets.load_sample_images().images
  return [first, second, second[:301, :222]]


def compare(
  program: pathlib.Path,
  models: Mapping[str, model_lib.Model],
  images: Sequence[np.ndarray],
) -> float:
  """Run a program in a new process; return how much its logits differ.

  Args:
    program: file or folder.
    models: that are in it, by name.
    images: uint8 (h, w, 3).

  Returns:
    The largest difference, against the largest logit or 1.

  Raises:
    UserError: the process failed.
  """
  groups = {}  # One batch for each size.
  for image in images:
    groups.setdefault(image.shape, []).append(image)
  batches = {str(i): np.stack(x) for i, x in enumerate(groups.values())}
  with (
    files.explain_temporary_errors(),
    tempfile.TemporaryDirectory(prefix="vqt_jax_") as folder,
  ):
    inputs, answers = (pathlib.Path(folder) / f"{i}.npz" for i in "ia")
    np.savez(inputs, **batches)
    # Without this package's folder, whose modules have common names.
    command = [sys.executable, "-P", run_exported.__file__]
    ended = subprocess.run(
      [*command, program, inputs, answers],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    if ended.returncode:
      said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
      if "failed to deserialize portable artifact" in ended.stderr:
        said = (
          f"this TensorFlow is too old for JAX {jax.__version__}. Install a"
          " newer one, or an older JAX."
        )
      raise errors.UserError(
        f"The program was written, but does not run: {errors.printable(said)}"
        " Nothing is kept."
      )
    with np.load(answers, allow_pickle=False) as file:
      found = {name: file[name] for name in file.files}
  differences = [0.0]
  for batch, pixels in batches.items():
    for name, expected in model_lib.Models(models).logits(pixels).items():
      prefix = exporting.prefix_of(name, models)
      answer = np.swapaxes(found[f"{batch}/{prefix}logits"], 0, 1)
      scale = max(1.0, float(np.abs(expected).max()))
      differences.append(float(np.abs(answer - expected).max()) / scale)
  return float(np.max(differences))  # NaN, if there is one.


def _allowed(models: Mapping[str, model_lib.Model]) -> float:
  """Return how much logits may differ."""
  first = next(iter(models.values()))
  cut = first.info["preprocessing"].get("fit") == "crop"
  exact = first.backbone.config.dtype == "float32" and not cut
  return _EXACT if exact else _NEAR


def _info(models: Mapping[str, model_lib.Model]) -> dict[str, Any]:
  """Return what the JSON file says of a program."""
  first = next(iter(models.values()))
  return {
    "program": f"vqt_jax {version.__version__}",
    "inputs": {"images": "uint8 (b, h, w, 3), RGB, any b, h and w"},
    "outputs": {
      f"{exporting.prefix_of(name, models)}{output}": shape
      for name, model in models.items()
      for output, shape in (
        ("logits", f"float32 (b, {model.num_seeds}, {len(model.classes)})"),
        ("probabilities", f"float32 (b, {len(model.classes)})"),
      )
    },
    "preprocessing": first.info["preprocessing"],
    "models": {
      name: {
        "task": model.info["task"],
        "method": model.tuner.method,
        "seeds": model.info["seeds"],
        "classes": model.classes,
      }
      for name, model in models.items()
    },
  }


def _describe(models: Mapping[str, model_lib.Model]) -> str:
  each = [
    f"{name}: {model.tuner.method} on {model.info['task']},"
    f" {len(model.classes)} classes, "
    + units.format_count(model.num_seeds, "seed")
    for name, model in models.items()
  ]
  return "; ".join(each)


def _size(place: pathlib.Path) -> int:
  """Return the bytes of a file, or of all in a folder."""
  every = place.rglob("*") if place.is_dir() else [place]
  return sum(each.stat().st_size for each in every if each.is_file())


if __name__ == "__main__":
  sys.exit(main(sys.argv))
