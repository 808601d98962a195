"""Judge what a run has trained on labelled images.

  vqt-jax evaluate runs/photos holdout/ --output holdout_results

and `python -m vqt_jax.evaluate` with the same arguments: the workdir of a
finished run, or a bundle (its tuned/), and the images: a folder with a folder
per class, a table (.csv, .tsv, .jsonl) of paths and labels, or the name of a
task, such as digits. Of a task, and of the images that the run itself divided,
the split "test" is taken; else all images.

--split NAME     train, val, trainval or test, where the images are divided
--image_key, --label_key, --split_key NAME
                 columns of a table, if their names are not usual
--output FOLDER  report.html, evaluation.json, per_class.csv, predictions.csv,
                 confusion.csv and .png, calibration.png; default: prints tables
                 only
--backbone FILE  the backbone, if it is elsewhere than in training
--data_dir DIR   folder of the prepared datasets of a task

The seeds of the run answer together, by the mean of their probabilities.

Exit status: 0, 1 if an image could not be read, 2 if there is something to
correct.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import itertools
import os
import pathlib
import sys
from typing import Any

from absl import flags
from etils import epy
import numpy as np

from vqt_jax import data
from vqt_jax import errors
from vqt_jax import results
from vqt_jax.data import listing
from vqt_jax.models import scaling
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.tuned import arguments as arguments_lib

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  from vqt_jax import checkpoints
  from vqt_jax.reports import evaluation
  from vqt_jax.reports import evaluation_report
  from vqt_jax.reports import html
  from vqt_jax.reports import judgement
  from vqt_jax.reports import notable as notable_lib
  from vqt_jax.reports import style
  from vqt_jax.tuned import model as model_lib

USAGE = (
  "Usage: RUN IMAGES [--split NAME] [--output FOLDER] (--help tells more)."
)
_COLUMNS = ("image_key", "label_key", "split_key")  # Of a table.
_MOST_NAMED = 5


def main(argv: Sequence[str]) -> int:
  """Evaluate as a command line says; return the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_enum("split", None, data.SPLITS, "", flag_values=values)
  for text in ("output", "backbone", "data_dir", *_COLUMNS):
    flags.DEFINE_string(text, None, "", flag_values=values)

  def command(arguments):
    if len(arguments) != 2:
      raise errors.UserError(
        f"Expected a run and images, found {len(arguments)} arguments. {USAGE}"
      )
    return evaluate(
      *arguments,
      values.split,
      values.output,
      values.backbone,
      values.data_dir,
      **{name: values[name].value or "" for name in _COLUMNS},
    )

  interrupted = "Interrupted; nothing is written."
  return arguments_lib.run(argv, values, __doc__, command, interrupted)


def evaluate(
  run: str,
  place: str,
  split: str | None = None,
  output: str | None = None,
  backbone: str | None = None,
  data_dir: str | None = None,
  **columns: str,
) -> int:
  """Judge a run, see the top of this file; return the exit status."""
  console = console_lib.Console()
  if output and os.path.exists(output) and not os.path.isdir(output):
    raise errors.UserError(f"--output {output}: expected a folder.")
  if output:
    html.check_folder(files.path(output))
  model = model_lib.load(run, backbone)
  is_path = (
    os.path.exists(os.path.expanduser(place))
    or place.startswith((".", "/", "~"))
    or place.endswith("/")
    or pathlib.Path(place).suffix in listing.TABLES
  )
  config = _config(run)
  own = config and _same_place(config["task"], place)
  if is_path and not own:
    answers, total = _of_files(model, place, split, columns)
  else:
    task = _find_task(config if own else {}, place, data_dir)
    split = split or "test"
    answers, total = _of_task(model, task, split)
    console.note(f"{task.name}, split {split}", "images")
  rows, found, labels, bad = [], [], [], 0
  notable = notable_lib.Notable()
  with console.progress("images", total, "image") as line:
    for number, (name, label, answer, image) in enumerate(answers, 1):
      line.update(number)
      if isinstance(answer, errors.UserError):
        console.note(str(answer), "bad")
        bad += 1
        continue
      predicted = int(answer.argmax())
      rows.append(
        {
          "image": name,
          "label": model.classes[label],
          "predicted": model.classes[predicted],
          "probability": f"{answer[predicted]:.4f}",
        }
      )
      found.append(answer)
      labels.append(label)
      confidence = float(answer[predicted])
      notable.add(notable_lib.Answer(name, label, predicted, confidence, image))
  if not found:
    raise errors.UserError(f"None of the {total} images can be read.")
  summary = evaluation.summarize(
    np.stack(found), np.array(labels), model.classes
  )
  if bad:
    console.note(f"{bad} of {total} images could not be read", "bad")
  evaluation.show(console_lib.Console(sys.stdout), summary)
  if output:
    folder = files.path(output)
    evaluation.write(summary, rows, folder)
    options = {"split": split, "backbone": backbone, "data_dir": data_dir}
    evaluation_report.report(
      folder / html.REPORT,
      summary,
      [_picture(model, x) for x in (*notable.mistakes, *notable.hits)],
      **_about(model, run, place, {**options, **columns, "output": output}),
    )
    console.note(
      f"{folder / html.REPORT}   evaluation.json   confusion.csv  "
      " confusion.png   per_class.csv   predictions.csv   calibration.png",
      "results",
    )
  return 1 if bad else 0


def _picture(
  model: model_lib.Model, answer: notable_lib.Answer
) -> judgement.Picture:
  """Return an answer with its image, and where the queries looked in it."""
  image, maps = answer.image, None
  if not isinstance(image, np.ndarray):
    image = model.prepare(image)
  if model.tuner.has_queries:
    (maps,) = model.attention_maps(image[None])
  shown = scaling.unscale(image, model.backbone.value_range)
  return judgement.Picture(answer, shown, maps)


def _about(
  model: model_lib.Model, run: str, place: str, options: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the title, command and facts of a report."""
  backbone, info, method = model.backbone, model.info, model.tuner.method
  shown = checkpoints.without_secrets
  split = f", split {options['split']}" if options["split"] else ""
  versions = (info.get("versions") or {}).items()
  return {
    "title": (
      f"{style.METHODS.get(method, method)} trained on {info['task']}, judged"
      f" on {place}{split}"
    ),
    "command": html.command(
      *("-m", "vqt_jax", "evaluate", shown(run), place),
      *(f"--{name}={shown(x)}" for name, x in options.items() if x),
    ),
    "facts": {
      "tuned model, SHA-256": info.get("weights_sha256"),
      "backbone": f"ViT-{backbone.config.variant} {backbone.source}",
      "its weights, SHA-256": backbone.identity,
      "images as": ", ".join(
        f"{name} {x}" for name, x in info["preprocessing"].items()
      ),
      "seeds": ", ".join(map(str, info["seeds"])),
      "trained with": ", ".join(f"{name} {x}" for name, x in versions),
    },
  }


# Name, number of the class, answer; and the image, prepared, or its path.
Answers = Iterator[tuple[str, int, np.ndarray | errors.UserError, Any]]


def _of_files(
  model: model_lib.Model,
  place: str,
  split: str | None,
  columns: Mapping[str, str],
) -> tuple[Answers, int]:
  """Return answers to the images of a folder or table, and their number."""
  found = listing.list_labelled(place, **columns)
  if split:
    parts = ("train", "val") if split == "trainval" else (split,)
    found = [each for each in found if each.split in parts]
    if not found:
      raise errors.UserError(f"{place} has no images of a split {split!r}.")
  labels = _labels(model, [each.label for each in found], place)
  models = model_lib.Models({"": model})
  answers = itertools.chain.from_iterable(
    models.stream([each.file for each in found])
  )

  def each():
    for image, label, answer in zip(found, labels, answers):
      answer = answer if _failed(answer) else answer[""]
      yield image.name, label, answer, image.file

  return each(), len(found)


def _failed(answer: Any) -> bool:
  return isinstance(answer, errors.UserError)


def _config(run: str) -> dict[str, Any]:
  """Return the config of a run; {} of a bundle that is elsewhere."""
  if checkpoints.is_address(run):
    return {}
  path = files.path(run) / "config.json"
  config = files.read_json(path) if files.exists(path) else {}
  return config if isinstance(config.get("task"), str) else {}


def _same_place(task: str, place: str) -> bool:
  """Return whether two tasks are one, by name or by path."""
  if task == place:
    return True
  a, b = (os.path.expanduser(each) for each in (task, place))
  return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _find_task(
  config: Mapping[str, Any], name: str, data_dir: str | None
) -> data.Task:
  """Return a task by name; that of a run's config with the run's splits."""
  place = {"data_dir": data_dir} if data_dir else {}
  task = results.find_task({"task": name, **config, **place})
  data.check_prepared(task)
  return task


def _of_task(
  model: model_lib.Model, task: data.Task, split: str
) -> tuple[Answers, int]:
  """Return answers to the images of a split of a task, and their number."""
  known = task.class_names or [str(i) for i in range(task.num_classes)]
  labels = _labels(model, known, task.name)
  settings = model.info["preprocessing"]
  names = iter(data.example_names(task, split))

  def each():
    for batch in data.batches(
      task,
      split,
      batch_size=32,
      image_size=tuple(settings["image_size"]),
      value_range=settings["value_range"],
      resize=settings.get("resize", "bilinear"),
    ):
      real = batch["mask"] > 0
      answers = model.predict_proba(batch["image"])
      for label, answer, image in zip(
        batch["label"][real], answers[real], batch["image"][real]
      ):
        # A copy, as the batch need not stay if the image does.
        yield next(names), labels[label], answer, image.copy()

  return each(), data.num_examples(task, split)


def _labels(
  model: model_lib.Model, names: Sequence[str], place: str
) -> list[int]:
  """Return the numbers that a model has for names of classes.

  Raises:
    UserError: it does not know one.
  """
  numbers = {name: i for i, name in enumerate(model.classes)}
  if unknown := sorted({*names} - {*numbers}):
    listed = lambda some: (
      ", ".join(some[:_MOST_NAMED])
      + (
        f" and {len(some) - _MOST_NAMED} more"
        if len(some) > _MOST_NAMED
        else ""
      )
    )
    raise errors.UserError(
      f"{place} has classes that the model does not know: {listed(unknown)}."
      f" Its classes are {listed(model.classes)}."
    )
  return [numbers[name] for name in names]


if __name__ == "__main__":
  sys.exit(main(sys.argv))
