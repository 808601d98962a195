"""Protocols: packs, folds, the wider search; and that all of it resumes."""

import signal
import types

import numpy as np
import pytest

import main
from tests import runs
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.training import cross_validation
from vqt_jax.training import grid
from vqt_jax.training import loop
from vqt_jax.training import protocol
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial
from vqt_jax.training import trial_memory

TOO_HIGH = 3e38 * 256 / 12  # As a peak rate: the largest float32.
# Everything a protocol can do, as small as it gets: all in one batch, so that
# one traced program serves the folds and the whole.
BEST = {
  "protocol": "best",
  "batch_size": 48,
  "keep_fraction": 0.5,
  "best__num_queries": "1,2",
  "best__keep_fractions": "0.5,0.25",
  "best__finalists": 2,
  "best__folds": 2,
}


@pytest.mark.parametrize("count, number", [(1000, 5), (48, 7), (3, 3)])
def test_folds_judge_every_row_once(count, number):
  parts = cross_validation.folds(count, number)
  assert len(parts) == number
  judged = np.concatenate([rows for _, rows in parts])
  assert sorted(judged) == list(range(count))
  for trained, judged in parts:
    assert sorted([*trained, *judged]) == list(range(count))
    assert len(judged) in (count // number, -(-count // number))


def test_the_first_fold_is_the_split_of_vtab():
  trained, judged = cross_validation.folds(1000, 5)[0]
  assert trained.tolist() == list(range(800))
  assert judged.tolist() == list(range(800, 1000))
  with pytest.raises(errors.UserError, match="config.best.folds=5: .* 4 ex"):
    cross_validation.folds(4, 5)


def test_of_equal_settings_the_simplest():
  tuner = lambda queries: tuner_lib.Tuner("vqt", None, 3, queries)
  run = lambda lr, decay, normalize: trial.Trial(lr, decay, 1, 0.1, normalize)
  ranked = [
    (tuner(1), run(0.1, 0.0, True)),
    (tuner(1), run(0.1, 0.0, False)),
    (tuner(1), run(0.1, 0.1, True)),
    (tuner(1), run(0.5, 0.0, True)),
    (tuner(2), run(0.1, 0.0, True)),
  ]
  assert sorted(reversed(ranked), key=cross_validation.simplest) == ranked


@pytest.mark.parametrize(
  "size, changes",
  [
    (1, {"keep_fraction": 0.5, "seeds": "7,8", "lr": "0.1"}),
    (1, {"method": "linear", "lr": f"{TOO_HIGH},{TOO_HIGH / 2},0.1"}),
  ],
  ids=["selection", "diverged"],
)
def test_packs_give_what_all_together_give(
  material, tmp_path, monkeypatch, size, changes
):
  """Also where a pack holds nothing but runs that diverge."""
  found = []
  for pack in (size, 100):
    at_once = lambda *args, pack=pack: pack
    monkeypatch.setattr(trial_memory, "trials_at_once", at_once)
    monkeypatch.setattr(trial_memory, "weights_at_once", at_once)
    workdir = tmp_path / str(pack)
    assert main.main(runs.command(material, workdir, **changes)) == 0
    found.append(runs.results(workdir))
  packed, together = found
  for name in ("chosen", "test_accuracy", "trained_parameters"):
    assert packed[name] == together[name], name
  for each in found:
    (each["search"] or {}).pop("seconds", None)
  assert packed["search"] == together["search"]
  for name in ("loss", "accuracy"):
    history = [[epoch[name] for epoch in f["seeds"]["history"]] for f in found]
    np.testing.assert_allclose(*history, rtol=1e-4, atol=1e-5)


def test_the_last_pack_is_what_is_left():
  run = trial.Trial(0.1, 0.0, 1)
  stage = stage_lib.Stage(
    "seeds",
    "",
    None,
    (run,) * 3,
    "",
    frozen_parts={"head": np.arange(3)},
    feature_mask=np.eye(3),
  )
  first, last = (stage_lib._part(stage, start, 2) for start in (0, 2))
  assert (first.name, last.name) == ("seeds_1-2", "seeds_3-3")
  assert (len(first.trials), len(last.trials)) == (2, 1)
  assert last.frozen_parts["head"].tolist() == [2]
  assert last.feature_mask.tolist() == [[0, 0, 1]]


def test_if_all_packs_diverge_it_is_said(
  material, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(trial_memory, "trials_at_once", lambda *args: 1)
  changes = {"method": "linear", "lr": f"{TOO_HIGH},{TOO_HIGH / 2}"}
  assert main.main(runs.command(material, tmp_path, **changes)) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert error.startswith("error: The loss of all 2 trials of stage search b")


def _check_choice(found):
  """That the stated rules lead from what was measured to what was chosen."""
  finalists = found["finalists"]
  order = ("num_queries", "lr", "weight_decay", "query_dropout")
  rank = lambda f: (
    -f["cv_accuracy"],
    *(f[name] for name in order),
    not f["normalize"],
  )
  chosen = min(finalists, key=rank)
  for name in (*order, "normalize"):
    assert found["chosen"][name] == chosen[name]
  fractions = {
    f["keep_fraction"]: f["cv_accuracy"] for f in found["keep_fractions"]
  }
  assert set(fractions) == {0.25, 0.5, 1.0}
  assert fractions[1.0] == chosen["cv_accuracy"]
  keep = min(fractions, key=lambda f: (-fractions[f], -f))
  assert found["chosen"]["keep_fraction"] == keep
  for share in [f["cv_accuracy"] for f in finalists] + [*fractions.values()]:
    assert 48 * share == pytest.approx(round(48 * share))


@pytest.fixture(scope="module")
def best(material, tmp_path_factory):
  """The workdir of a run that is left alone, and what it did in turn."""
  events, workdir = [], tmp_path_factory.mktemp("best")
  with pytest.MonkeyPatch.context() as patch:

    def watch(module, name, what):
      original = getattr(module, name)

      def watched(*args, **kwargs):
        events.append(what(args))
        return original(*args, **kwargs)

      watched.lower = getattr(original, "lower", None)
      patch.setattr(module, name, watched)

    watch(step_lib, "train_steps", lambda args: "a step")
    for name in ("load_arrays", "load_labels", "batches", "train_batches"):
      watch(data, name, lambda args: args[1])
    assert main.main(runs.command(material, workdir, **BEST)) == 0
  return workdir, events


def test_the_best_protocol_never_looks_at_the_test_split(best):
  """Before the last step of the last training is done."""
  workdir, events = best
  assert set(events) == {"a step", "trainval", "test"}
  assert events.index("test") > max(
    i for i, event in enumerate(events) if event == "a step"
  )

  found = runs.results(workdir)
  # Two values beyond an end of the grid, at which the best was.
  tried = found["best"]["tried"]
  assert len(tried) == found["best"]["searched"] == 10
  assert sum(each["extended"] for each in tried) == 2
  assert sum(f["full"] for f in found["best"]["finalists"]) == 1
  _check_choice(found["best"])
  names = [tested["name"] for tested in found["tested"]]
  keep = found["best"]["chosen"]["keep_fraction"]
  last = ["best_all"] + ["best_selected"] * (keep < 1)
  assert names == ["all", "selected", *last]
  assert found["tested"][-1]["test_accuracy"] == found["test_accuracy"]
  assert found["tested"][-1]["setting"] == found["chosen"]
  seconds = [tested["training_seconds"] for tested in found["tested"]]
  assert seconds[1] > seconds[0] and seconds[2] > found["best"]["seconds"]
  assert not (workdir / "stages").exists()


def test_folds_of_what_is_not_kept_are_refused(material, tmp_path, capfd):
  changes = BEST | {"data": "stream", "features": "live", "method": "linear"}
  changes |= {"batch_size": 16, "epochs": 2}
  assert main.main(runs.command(material, tmp_path, **changes)) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert error.startswith("error: Cross-validation trains on parts of tr")
  assert not (tmp_path / "metrics.jsonl").exists()  # Said at once.


KILL, TERM = signal.SIGKILL, signal.SIGTERM
ROWS = "vqt_jax.training.stages:_rows"  # As a stage begins; after each epoch.
WRITE = "vqt_jax.training.stage:write_result"


def _untimed(found):
  """Results without what depends on the process: time and memory."""
  if isinstance(found, dict):
    left_out = ("seconds", "training_seconds", "peak_bytes", "start_bytes")
    found = {k: v for k, v in found.items() if k not in left_out}
    return {k: _untimed(v) for k, v in found.items()}
  return [_untimed(v) for v in found] if isinstance(found, list) else found


def test_ended_in_every_kind_of_stage(material, best, tmp_path, monkeypatch):
  """Once by a signal that kills; the others save, and need no new process."""
  argv, was_in = runs.command(material, tmp_path, **BEST), []
  for name, call, number in (
    (ROWS, 3, TERM),  # Of its start and three epochs.
    (WRITE, 3, TERM),
    (ROWS, 18, KILL),
    (WRITE, 2, TERM),
    (WRITE, 3, TERM),
  ):
    if number == KILL:
      process = runs.Process(
        [*argv, "--config.checkpoint_seconds=0"],
        devices=4,
        signals={name: (call, KILL)},
      )
      status, said = process.wait(), process.said()
      assert status == -KILL and "Traceback" not in said, (name, call, said)
    else:
      with monkeypatch.context() as patch:
        patch.setattr(loop, "CALL_SECONDS", 1e9)
        runs.signal_on_call(patch.setattr, name, call, TERM)
        assert main.main(argv) == 75
    was_in.append(runs.metrics(tmp_path)[-1]["phase"])
  assert was_in[2] == "search_1_beyond_1"
  was_in = [name.split("_")[0] for name in was_in]
  assert was_in == ["search", "scores", "search", "fold", "keep"]

  assert main.main(argv) == 0
  whole, _ = best
  assert runs.bits(tmp_path) == runs.bits(whole)
  found, expected = runs.results(tmp_path), runs.results(whole)
  assert _untimed(found) == _untimed(expected)


@pytest.mark.parametrize(
  "rates, chosen, end",
  [
    ((4.0, 1.0, 0.1), 0, "; the largest lr that was tried"),
    ((4.0, 1.0, 0.1), 1, ""),
    ((4.0, 1.0, 0.1), 2, "; the smallest lr that was tried"),
    ((4.0, 0.1), 0, ""),  # Not a search of any width.
  ],
)
def test_a_choice_at_an_end_of_the_grid_is_told(rates, chosen, end):
  found = {
    "chosen": chosen,
    "runs": [{"lr": r, "weight_decay": 0.0, "seed": 1} for r in rates],
    "val_accuracy": [0.5] * len(rates),
    "diverged": [],
  }
  assert protocol._choice(found, 256).endswith(f" within 0.5 points{end})")


@pytest.mark.parametrize(
  "values, best, beyond",
  [
    ((1.0, 0.5, 0.25), 0.25, (0.125, 0.0625)),
    ((0.25, 0.5, 1.0), 1.0, (2.0, 4.0)),
    ((1.0, 0.5, 0.25), 0.5, ()),
    ((8.0, 1.0, 0.5), 8.0, (64.0, 512.0)),  # The neighbouring step.
    ((0.5,), 0.5, ()),  # No step at all,
    ((0.5, 0.0), 0.5, ()),  # nor here.
    ((0.25, 0.125, 0.0), 0.0, ()),
    ((0.25, 0.125, 0.0), 0.125, ()),
    ((0.25, 0.125, 0.0), 0.25, (0.5, 1.0)),
  ],
)
def test_what_lies_beyond_an_end_of_a_grid(values, best, beyond):
  assert grid.beyond(values, best) == beyond


def _extend(accuracy, rates, decays=(0.0,)):
  """What is added to a grid, by its accuracies (None: diverged); the notes."""
  notes, names = [], []
  tuner = tuner_lib.Tuner("linear", None, 3)

  class FakeStages:
    def run(self, stage):
      names.append(stage.name)
      found = [accuracy(t.lr, t.weight_decay) for t in stage.trials]
      return stage_lib.StageResult(
        history=[],
        seconds=1.0,
        diverged=[i for i, share in enumerate(found) if share is None],
        accuracy=[share or 0.0 for share in found],
      )

  context = types.SimpleNamespace(
    config=types.SimpleNamespace(batch_size=256),
    console=types.SimpleNamespace(note=lambda text, label: notes.append(text)),
  )
  tried = {
    (tuner, trial.Trial(lr, decay, 1)): accuracy(lr, decay)
    for lr in rates
    for decay in decays
  }
  added, seconds = cross_validation._extend(context, FakeStages(), tried)
  assert seconds == len(names) == len(set(names))
  return [(t.lr, t.weight_decay) for _, t in added], notes


def test_a_grid_is_extended_until_the_best_is_inside():
  nearer = lambda best: lambda lr, decay: 1 / (1 + abs(lr - best) + decay)
  assert _extend(nearer(0.5), (1.0, 0.5, 0.25)) == ([], [])
  added, notes = _extend(nearer(0.03125), (1.0, 0.5, 0.25))
  assert added == [(2.0**-n, 0.0) for n in (3, 4, 5, 6)]
  assert notes[0].endswith(
    "0.25, the best, is at an end of its grid: beyond it, 0.125, 0.0625"
  )
  # With all decays.
  added, _ = _extend(nearer(2.0), (1.0, 0.5), (0.0, 0.5))
  assert added == [(2.0, 0.0), (2.0, 0.5), (4.0, 0.0), (4.0, 0.5)]


def test_decays_are_extended_likewise():
  added, _ = _extend(lambda lr, decay: decay * (decay < 4), (1.0,), (0.5, 1.0))
  assert added == [(1.0, 2.0), (1.0, 4.0)]


def test_nothing_is_tried_beyond_what_diverges():
  higher = lambda lr, decay: lr if lr < 8 else None
  added, _ = _extend(higher, (1.0, 2.0))
  assert added == [(4.0, 0.0), (8.0, 0.0)]
  assert _extend(lambda *_: None, (1.0, 2.0)) == ([], [])


def test_the_extension_of_a_grid_is_bounded():
  added, notes = _extend(lambda lr, decay: lr * decay, (1.0, 2.0), (1.0, 2.0))
  assert notes[-1] == "the best is still at an end of its grid"
  assert len(added) == grid.most(2, 2) == 8 * 8 - 4
  assert grid.most(2, 1) == 6


@pytest.mark.parametrize(
  "batch_size, told", [(256, "0.25"), (128, "0.5 (x 128/256 = 0.25)")]
)
def test_a_rate_is_told_as_it_was_asked_for(batch_size, told):
  run = trial.Trial(lr=0.25, weight_decay=1e-3, seed=1)
  assert run.describe(batch_size) == f"lr {told}, weight decay 0.001"
