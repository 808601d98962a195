"""Two real processes with two fake devices each do what one alone does."""

import signal
import socket

import numpy as np
import pytest

from tests import runs
from vqt_jax import results


def pair(material, workdir, *, second=None, signals=None, **changes):
  """Runs both to their end: statuses, and what each said.

  Args:
    second: further changes, of the second process.
    signals: to the second process.
  """
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  processes = []
  for i in range(2):
    own = changes | (second or {}) if i else changes
    argv = [
        *runs.command(material, workdir, **own),
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
        f"--process_id={i}",
    ]
    processes.append(
        runs.Process(argv, devices=2, signals=signals if i else None)
    )
  return [p.wait() for p in processes], [p.said() for p in processes]


def assert_same_outcome(workdir, alone):
  """Same choices and accuracies, weights to 1e-6, and everything only once."""
  ours, theirs = runs.results(workdir), runs.results(alone)
  assert ours["device"] == "4 x cpu"
  assert ours["test_accuracy"] == theirs["test_accuracy"]
  assert ours["chosen"] == theirs["chosen"]
  assert ours["search"]["val_accuracy"] == theirs["search"]["val_accuracy"]
  for tuned in sorted((alone / "tuned").iterdir()):
    a, _ = results.load_tuned(workdir / "tuned" / tuned.name)
    b, _ = results.load_tuned(tuned)
    for name, value in runs.flat(a).items():
      np.testing.assert_allclose(
          value, runs.flat(b)[name], rtol=0, atol=1e-6, err_msg=name
      )
  ours, theirs = runs.metrics(workdir), runs.metrics(alone)
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs):
    assert a.pop("loss") == pytest.approx(b.pop("loss"), abs=1e-5)
    assert a == b
  names = lambda folder: sorted(path.name for path in folder.iterdir())
  assert names(workdir) == sorted([*names(alone), "log_1.txt"])
  assert len(list(workdir.glob("tensorboard/*/*/events*"))) == 4


def test_stopped_and_resumed(material, alone, tmp_path):
  """Only the second one is asked to stop, but they agree.

  They go on with features in files, each with a part of them.
  """
  signals = {"vqt_jax.train.step:train_steps": (2, signal.SIGTERM)}
  status, said = pair(material, tmp_path / "run", signals=signals)
  assert status == [0, 0]
  assert said[0].endswith("Stopped and saved; resume with the same command.\n")
  changes = {"features": "disk", "store_dir": tmp_path / "store"}
  status, said = pair(material, tmp_path / "run", **changes)
  assert status == [0, 0]
  files = list((tmp_path / "store").iterdir())
  assert len(files) == 2 and all(path.suffix == ".npy" for path in files)
  assert "resume   search after epoch 2" in said[0]
  assert said[1] == ""
  assert_same_outcome(tmp_path / "run", alone["device"])


def test_streamed_to_a_backbone_in_two_halves(material, alone, tmp_path):
  changes = {"data": "stream", "mesh__data": 2, "mesh__model": 2}
  assert pair(material, tmp_path, **changes)[0] == [0, 0]
  assert_same_outcome(tmp_path, alone["stream"])


@pytest.mark.parametrize("which", [0, 1])
def test_what_fails_on_one_fails_on_both(material, tmp_path, which):
  """The workdir is the first one's to check; the checkpoint each one's."""
  changes, second = {}, {"init": "nowhere"}
  word = "nowhere is neither"
  if which == 0:
    (tmp_path / "results.json").write_text("{}")
    second, word = {}, "There is no"
  status, said = pair(material, tmp_path, second=second, **changes)
  assert status == [2, 2]
  assert said[which].splitlines()[-1].startswith("error: " + word)
  other = said[1 - which].splitlines()[-1]
  assert other.startswith("error: Another process of this run failed")
