"""Files of finished stages: read as written, refused if anything is off."""

import dataclasses
import json

import flax.traverse_util
import numpy as np
import pytest

from tests import helpers
from vqt_jax import errors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import array_files
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import trial


@pytest.fixture(name="stage")
def fixture_stage():
  backbone = helpers.tiny_config()
  return stage_lib.Stage(
    name="seeds",
    label="seeds",
    tuner=tuner_lib.make_tuner("vqt", backbone, num_classes=3, num_queries=1),
    trials=tuple(trial.Trial(lr=0.1, weight_decay=0.0, seed=s) for s in (1, 2)),
    trial_noun="seed",
    judge=("val", None),
  )


def result(stage):
  rng = np.random.default_rng(0)
  leaves = flax.traverse_util.flatten_dict(stage.tuner.shapes())
  return stage_lib.StageResult(
    history=[{"loss": [1.5, float("nan")], "accuracy": [0.5, 0.25]}],
    seconds=1.0,
    diverged=[1],
    accuracy=[0.5, 0.0],
    variables=flax.traverse_util.unflatten_dict(
      {
        path: rng.random((2, *leaf.shape), np.float32)
        for path, leaf in leaves.items()
      }
    ),
    epoch_seconds=None,
    step_bytes=7,
  )


def same(one, two):
  plain = lambda outcome: json.dumps(
    dataclasses.asdict(outcome), default=np.ndarray.tolist, sort_keys=True
  )
  return plain(one) == plain(two)


def test_read_as_written(stage, tmp_path):
  path, expected = tmp_path / "seeds.safetensors", result(stage)
  stage_lib.write_result(path, expected)
  assert same(stage_lib.read_result(path, stage), expected)


@pytest.mark.parametrize(
  "changes",
  [
    {"history": 1},
    {"history": [{"loss": [1.0], "accuracy": [1.0]}]},
    {"history": [{"loss": [1.0, 2.0]}]},
    {"history": [{"loss": [1.0, "2"], "accuracy": [1.0, 1.0]}]},
    {"accuracy": None},
    {"accuracy": [1.0]},
    {"diverged": [2]},
    {"diverged": [-1]},
    {"seconds": None},
    {"more": 1},
  ],
)
def test_other_numbers_are_refused(stage, tmp_path, changes):
  info = dataclasses.asdict(result(stage))
  flat = flax.traverse_util.flatten_dict(info.pop("variables"), sep="/")
  content = array_files.to_safetensors(flat, {"outcome": info | changes})
  (tmp_path / "seeds.safetensors").write_bytes(content)
  with pytest.raises(errors.UserError, match="the same command repeats"):
    stage_lib.read_result(tmp_path / "seeds.safetensors", stage)


def test_other_weights_are_refused(stage, tmp_path):
  path, good = tmp_path / "seeds.safetensors", result(stage)
  for spoil in (
    lambda x: x.astype(np.float64),
    lambda x: x.astype(int),
    lambda x: x[:1],
  ):
    head = dict(
      good.variables["head"], bias=spoil(good.variables["head"]["bias"])
    )
    variables = {**good.variables, "head": head}
    stage_lib.write_result(path, dataclasses.replace(good, variables=variables))
    with pytest.raises(errors.UserError, match="the same command repeats"):
      stage_lib.read_result(path, stage)


def test_progress_of_other_types_is_refused():
  good = dataclasses.asdict(stage_lib.Progress(epoch=2, diverged={"1": 0}))
  point = stage_lib.ResumePoint("seeds", json.loads(json.dumps(good)))
  assert dataclasses.asdict(point.progress) == good
  for changes in ({"epoch": "2"}, {"sums": [1]}, {"more": 1}):
    with pytest.raises(ValueError):
      stage_lib.ResumePoint("seeds", good | changes)
