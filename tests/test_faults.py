"""Each step of a write fails once: one sentence, and nothing is lost.

`benchmarks/fault_points.py` does so with all steps of a run.
"""

import contextlib
import re
import shutil

import pytest

from benchmarks import mutate_files
from tests import faults
from tests import runs
from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax import predict
from vqt_jax.runtime import files
from vqt_jax.training import metrics
from vqt_jax.training import workdir


def write_predictions(folder):
  with predict.open_output(str(folder / "out.csv")) as out:
    predict.row_writer(out, "out.csv", ["a"], 1)("i.png", "a", [], "")


def write_json(folder):
  files.write_json(folder / "new" / "results.json", {"a": [0.5] * 100})


def write_metrics(folder):
  with contextlib.closing(metrics.MetricsWriter(folder)) as writer:
    for phase in ("search", "seeds"):
      writer.epochs(phase, mutate_files.rows(phase, 4))


def begin(folder):
  with workdir.open_workdir(mutate_files.CONFIG, folder):
    pass


# What writes -> what reads it again, None: nothing does.
WRITERS = {
  "config.json": mutate_files.Kind(begin, mutate_files.read_config),
  "results.json": mutate_files.KINDS["results.json"],
  "stages/": mutate_files.KINDS["stages/"],
  "tuned/": mutate_files.Kind(
    mutate_files.write_bundle, mutate_files.read_tuned
  ),
  "metrics.jsonl": mutate_files.Kind(write_metrics, mutate_files.read_metrics),
  "features": mutate_files.KINDS["features"],
  "predictions": mutate_files.Kind(write_predictions, lambda folder: None),
  "in a new folder": mutate_files.Kind(write_json, lambda folder: None),
}


def names(folder):
  """Of all files but a lock, and TensorBoard's, which are written anew."""
  skipped = (".vqt_jax.lock", "tensorboard/")
  return {n for n in runs.files(folder) if not n.startswith(skipped)}


@pytest.fixture
def folder(tmp_path):
  checkpoints.save_npz(tmp_path / "vit.npz", mutate_files.backbone())
  (tmp_path / "files").mkdir()
  return tmp_path / "files"


@pytest.mark.parametrize("name", WRITERS)
def test_a_step_that_fails(name, folder):
  """Whatever fails, all that was there, or all that is new, is there."""
  kind = WRITERS[name]
  kind.write(folder)
  good, whole = mutate_files.digest(kind.read(folder)), names(folder)
  refusals, number = 0, 0
  while not number or number <= faults.FAULTS.count:
    number += 1
    if name == "features":  # A file that is there is left alone.
      shutil.rmtree(folder)
      folder.mkdir()
    try:
      with faults.FAULTS.below(folder, fail=number):
        kind.write(folder)
    except errors.UserError as e:
      check_sentence(str(e), folder)
      refusals += 1
    left = names(folder)
    assert left <= whole, number
    if left or name != "features":
      assert mutate_files.digest(kind.read(folder)) == good, number
  kind.write(folder)
  assert mutate_files.digest(kind.read(folder)) == good
  assert refusals


def check_sentence(said, folder):
  assert re.match(f"Cannot write {re.escape(str(folder))}", said), said
  assert "\n" not in said and len(said) < 500


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, folder):
  kind = WRITERS[name]
  kind.write(folder)
  good, whole = mutate_files.digest(kind.read(folder)), runs.files(folder)
  sizes = [len(content) for content in whole.values() if content]
  for size in {0, 1, min(sizes) // 2, max(sizes) - 1}:
    if name == "features":
      shutil.rmtree(folder)
      folder.mkdir()
    with pytest.raises(errors.UserError) as caught, faults.largest_file(size):
      kind.write(folder)
    check_sentence(str(caught.value), folder)
    assert names(folder) <= {*whole}
    if name != "features":
      assert mutate_files.digest(kind.read(folder)) == good
