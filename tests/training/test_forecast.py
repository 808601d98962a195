"""How long the rest of a run takes, foretold from the first calls."""

import io
import re
import types

import pytest

from tests import helpers
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.training import forecast as forecast_lib
from vqt_jax.training import protocol
from vqt_jax.training import stage as stage_lib

COUNTS = {"train": 800, "val": 200, "trainval": 1000, "test": 5000}


def start(method, extracted=None, **changes):
  """A forecast, the planned stages, and what will be said."""
  config = config_dict.default_config()
  config.update(
    {
      "method": method,
      "task": "digits",
      "epochs": 10,
      "warmup_epochs": 1,
      "batch_size": 100,
      "lr": (1.0, 0.1),
      "weight_decay": (0.0, 0.1),
      "solver": "gradient",
      **changes,
    }
  )
  config, stream = resolve.resolve(config), io.StringIO()
  tuner = tuner_lib.make_tuner(method, helpers.tiny_config(), 5)
  console = console_lib.Console(stream)
  job = types.SimpleNamespace(config=config, tuner=tuner, console=console)
  examples = types.SimpleNamespace(
    count=COUNTS.get, extraction_seconds=extracted
  )
  planned = protocol.planned(config, tuner)
  return forecast_lib.Forecast(job, examples, planned), planned, stream


def told(stream):
  """The words of the line, and seconds of each part and of all."""
  (line,) = stream.getvalue().splitlines()
  words, parts = line.removeprefix("time     ").split(": ", 1)
  found = dict(part.rsplit(" ", 1) for part in parts.split(", "))
  found["all"] = re.search(r"[\d:]+", words)[0]
  for name, text in found.items():
    hours, minutes, seconds = map(int, text.split(":"))
    found[name] = 3600 * hours + 60 * minutes + seconds
  return words.replace(re.search(r"[\d:]+", words)[0], "T"), found


def test_from_stored_features():
  """What runs share counts as two more of them on a CPU."""
  forecast, (search, seeds), said = start("vqt", extracted=(3.0, 0.01))
  assert (len(search.trials), len(seeds.trials)) == (4, 5)
  forecast.begin(search, 20, set(), live=False)
  forecast.add_call(79, 1, 9.0)  # Compiles.
  forecast.add_call(78, 1, 0.6)
  assert not said.getvalue()  # Too little to go by.
  forecast.add_call(77, 1, 0.6)
  forecast.add_call(70, 7, 99.0)  # Said once.
  words, found = told(said)
  assert words == "about T to go"
  seeds = 8.4 + 100 * 0.6 * (2 + 5) / (2 + 4)
  assert found == pytest.approx(
    {
      "search": 77 * 0.6,
      "seeds": seeds,
      "test": 53,
      "all": 77 * 0.6 + seeds + 53,
    },
    abs=0.51,
  )


def test_trials_of_a_network_share_nothing():
  changes = {"lr": (0.1, 0.2), "weight_decay": (0.0,)}
  forecast, (search, seeds), said = start("combo", (3.0, 0.01), **changes)
  assert (len(search.trials), len(seeds.trials)) == (2, 5)
  forecast.begin(search, 20, set(), live=False)
  forecast.add_call(79, 1, 9.0)  # Compiles.
  forecast.add_call(77, 2, 2.0)
  _, found = told(said)
  took = 8.0 + 100 * 1.0 * 5 / 2
  assert (found["search"], found["seeds"]) == (
    77,
    pytest.approx(took, abs=0.51),
  )


def test_of_an_editor_in_packs_of_which_some_are_done():
  forecast, (search, _), said = start("lora", seeds=(1, 2))
  parts = stage_lib.packs(search, 1)
  assert len(parts) == 4
  done = {parts[0].name, parts[1].name}
  forecast.begin(parts[2], 1, done, live=True)
  forecast.add_call(79, 1, 5.0)
  forecast.add_call(78, 1, 3.0)
  _, found = told(said)
  image = 0.03 / 3  # A step takes 3 s; a third of it is the way there.
  assert found == pytest.approx(
    {
      "search": (78 + 80) * 3 + 2 * 200 * image,
      "seeds": 2 * 100 * 3,  # By the program of the search.
      "test": 2 * 5000 * image,
      "all": 474 + 4 + 600 + 100,
    },
    abs=0.51,
  )


def test_a_live_step_is_nearly_all_backbone():
  forecast, (search, _), said = start("vqt", embedding_dropout=0.1)
  forecast.begin(search, 20, set(), live=True)
  forecast.add_call(79, 1, 5.0)
  forecast.add_call(78, 1, 3.0)
  _, found = told(said)
  assert 302 <= found["seeds"] <= 306
  assert 5000 * 0.029 <= found["test"] <= 5000 * 0.03


@pytest.mark.parametrize(
  "extracted, protocol_name, words",
  [
    (None, "full", "about T to go before the test"),
    ((0.0, 0.001), "full", "about T to go"),
    (None, "best", "at least T to go before the test"),
  ],
)
def test_of_a_search_that_is_over_quickly(extracted, protocol_name, words):
  forecast, (search, _), said = start(
    "linear", extracted, protocol=protocol_name
  )
  forecast.begin(search, 20, set(), live=False)
  forecast.add_call(12, 1, 2.0)
  forecast.add_call(0, 12, 0.75)
  found = told(said)
  assert found[0] == words and "search" not in found[1]


def test_a_part_that_is_not_planned_comes_first():
  forecast, planned, said = start("linear", protocol="best")
  fold = stage_lib.Stage(
    "fold_1_1", "fold 1", planned[0].tuner, planned[0].trials, "setting"
  )
  done = {stage.name for stage in planned}
  forecast.begin(fold, 20, done, live=False)
  forecast.add_call(50, 1, 2.0)
  forecast.add_call(49, 1, 1.0)
  assert told(said)[1] == {"fold 1": 49, "all": 49}
