"""Images that tell most about a run, read again from its test set."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from vqt_jax import data
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.models import methods
from vqt_jax.models import scaling
from vqt_jax.reports import judgement
from vqt_jax.reports import notable as notable_lib
from vqt_jax.runtime import files
from vqt_jax.tuned import model as model_lib


def read(
  workdir: files.Path,
  results: Mapping[str, Any],
  config: Mapping[str, Any],
  predictions: results_lib.Predictions,
) -> list[judgement.Picture]:
  """Read the images of the most notable predictions, as the model saw them.

  Args:
    workdir: of the run.
    results: contents of its `results.json`.
    config: contents of its `config.json`.
    predictions: of the test images, with their probabilities.

  Returns:
    Pictures without maps; the images of their answers are prepared ones.

  Raises:
    UserError: the images are not there any more, or have changed.
  """
  with files.explain_damage(workdir / results_lib.RESULTS):
    size, value_range = tuple(results["image_size"]), results["value_range"]
    recorded = results["data"]["sha256"]
  task = results_lib.find_task(config)
  if data.dataset_identity(task)["sha256"] != recorded:
    raise errors.UserError(f"{task.name} has changed since the run.")
  notable = notable_lib.Notable()
  for position, answer in enumerate(
    zip(
      data.example_names(task, "test"),
      predictions.label.tolist(),
      predictions.together.tolist(),
      predictions.probability.tolist(),
    )
  ):
    notable.add(notable_lib.Answer(*answer, position))
  chosen = [*notable.mistakes, *notable.hits]
  images = data.load_arrays(
    data.pick(task, "test", [answer.image for answer in chosen]),
    "test",
    image_size=size,
    value_range=value_range,
    resize=config["resize"],
  )["image"]
  return [
    judgement.Picture(
      dataclasses.replace(answer, image=image),
      scaling.unscale(image, value_range),
      None,
    )
    for answer, image in zip(chosen, images)
  ]


def add_attention(
  pictures: Sequence[judgement.Picture],
  workdir: files.Path,
  config: Mapping[str, Any],
) -> list[judgement.Picture]:
  """Return the pictures with where the queries looked, if there are any.

  Bundle and backbone are loaded again, onto one device of this process: it asks
  no other process, and by now the run has left the device. A backbone that is
  split over devices does not fit into one.

  Raises:
    UserError: the backbone is not there any more, or has changed.
  """
  has_queries = methods.parse(config["method"]).has_queries
  if not pictures or not has_queries or config["mesh"]["model"] > 1:
    return [*pictures]
  model = model_lib.load(workdir)
  # One by one, as many queries of all seeds take much memory.
  look = lambda image: model.attention_maps(image[None])[0]
  return [each._replace(maps=look(each.answer.image)) for each in pictures]
