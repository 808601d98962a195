"""Images that tell most about a run, read again from its test set."""

from collections.abc import Mapping
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
  """Read the images of the most notable predictions, and where queries looked.

  The bundle and its backbone are loaded again where there are queries, on one
  device of this process, so that no other process is needed.

  Args:
    workdir: of the run.
    results: contents of its `results.json`.
    config: contents of its `config.json`.
    predictions: of the test images, with their probabilities.

  Raises:
    UserError: images or backbone are not there any more, or have changed.
  """
  task = results_lib.find_task(config)
  if data.dataset_identity(task)["sha256"] != results["data"]["sha256"]:
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
    image_size=tuple(results["image_size"]),
    value_range=results["value_range"],
    resize=results["resize"],
  )["image"]
  maps = [None] * len(chosen)
  # A backbone that is split over devices does not fit into one.
  method, split = methods.parse(results["method"]), config["mesh"]["model"] > 1
  if method.has_queries and not split:
    model = model_lib.load(workdir)
    # One by one, as many queries of all seeds take much memory.
    maps = [model.attention_maps(image[None])[0] for image in images]
  shown = scaling.unscale(images, results["value_range"])
  return list(map(judgement.Picture, chosen, shown, maps))
