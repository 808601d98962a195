"""Runs that are stopped or killed end with the same bits as others."""

import asyncio
import contextlib
import shutil
import signal
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

import main
from tests import faults
from tests import runs
from vqt_jax import errors
from vqt_jax.training import checkpoint
from vqt_jax.training import loop as loop_lib
from vqt_jax.training import optim
from vqt_jax.training import preemption
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import trial

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
EXTRACT = "vqt_jax.features.store:_writer"
TRAIN = "vqt_jax.training.step:train_steps"
EVALUATE = "vqt_jax.training.step:eval_steps"
REPORT = "vqt_jax.training.results:write"
RENAME = "os:rename"  # What makes a part of a save, or all of it, count.
STREAM = {"data": "stream", "batch_size": 16}


def command(material, workdir, **changes):
  return runs.command(material, workdir, checkpoint_seconds=0, **changes)


@pytest.fixture
def go(material, capfd):
  """Runs, or resumes, here; until (function, call, signal) asks it to stop.

  Here all is traced already, but nothing can be killed.
  """

  def go(workdir, moment=None, **changes):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(loop_lib, "CALL_SECONDS", 1e9)
      if moment:
        runs.signal_on_call(patch.setattr, *moment)
      status = main.main(command(material, workdir, **changes))
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return status, said

  return go


def kill(material, workdir, moment, **changes):
  """Runs, or resumes, until it is killed at (function, call)."""
  function, call = moment
  process = runs.Process(
    command(material, workdir, **changes),
    signals={function: (call, KILL)},
    devices=4,
  )
  status, said = process.wait(), process.said()
  assert status == -KILL and "Traceback" not in said, (moment, said)
  return said


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
  """Workdirs of runs that are left alone, by where their examples are."""
  workdirs = {}
  for name, changes in (("kept", {}), ("stream", STREAM)):
    workdirs[name] = tmp_path_factory.mktemp(name)
    assert main.main(runs.command(material, workdirs[name], **changes)) == 0
  return workdirs


def saves(workdir):
  """Folders of complete saves."""
  return [
    path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  ]


def test_killed_again_and_again(material, undisturbed, go, tmp_path):
  """At each of these moments in turn, each time started again."""
  for moment in (
    (TRAIN, 3),  # While the save after epoch 2 is being written.
    (EVALUATE, 1),  # On val.
    (RENAME, 6),  # In a save of the seeds.
  ):
    kill(material, tmp_path, moment)
  said = kill(material, tmp_path, (REPORT, 1))
  assert "resume   seeds after epoch" in said and "search" not in said
  assert "test     image" in said
  assert not (tmp_path / "results.json").exists()
  status, said = go(tmp_path)
  assert status == 0 and "seeds    " not in said
  assert runs.bits(tmp_path) == runs.bits(undisturbed["kept"])
  assert saves(tmp_path) == list((tmp_path / "checkpoints").iterdir())


def test_asked_to_stop(undisturbed, go, tmp_path):
  workdir = tmp_path / "lr=[0.1], é"  # No pattern, and in no other code.
  status, said = go(workdir, (EXTRACT, 2, INT))
  assert (status, said.splitlines()[-1]) == (75, runs.STOPPED)
  assert not runs.metrics(workdir)
  status, said = go(workdir, (TRAIN, 1, TERM))  # Of a step only.
  assert (status, said.splitlines()[-1]) == (75, runs.STOPPED)
  assert not runs.metrics(workdir)
  status, said = go(workdir, (EVALUATE, 2, TERM))
  assert (status, said.splitlines()[-1]) == (75, runs.STOPPED)
  assert "resume   search after epoch 0" in said
  status, said = go(workdir)
  assert status == 0 and "seeds    " not in said
  assert runs.bits(workdir) == runs.bits(undisturbed["kept"])


def test_interrupted_within_an_epoch(material, undisturbed, go, tmp_path):
  """Streamed, an epoch is several calls, here of three steps."""
  status, _ = go(tmp_path, (TRAIN, 5, TERM), **STREAM)
  assert status == 75
  said = kill(material, tmp_path, (TRAIN, 3), **STREAM)
  assert "resume   search after epoch 1" in said
  assert go(tmp_path, **STREAM)[0] == 0
  assert runs.bits(tmp_path) == runs.bits(undisturbed["stream"])


@pytest.mark.parametrize(
  "compiling, each, calls",
  [
    (0, 1, [1, 4, 5, 5]),
    (30, 1, [1, 1, 4, 5]),
    (0, 60, [1, 1, 1, 1]),
    (0, 0.001, [1, 4, 16, 64]),
  ],
)
def test_no_call_takes_long(monkeypatch, compiling, each, calls):
  """Seconds to compile, of a step, and steps of the first calls."""
  now = 0.0
  monkeypatch.setattr(loop_lib.time, "monotonic", lambda: now)
  pace, taken = loop_lib.CallLength(), []
  now += compiling
  for _ in calls:
    taken.append(pace.wish)
    now += taken[-1] * each
    pace.measure(taken[-1])
  assert taken == calls


def run_epochs(monkeypatch, call=lambda: None, **how):
  """Runs 9 epochs of a step, of which each is a `call`."""

  def train_steps(tuner, recipe, state, *args):
    call()
    return state, np.ones((1, 1)), np.ones((1, 1))

  monkeypatch.setattr(loop_lib.step_lib, "train_steps", train_steps)
  monkeypatch.setattr(loop_lib.step_lib, "step_bytes", lambda *args: None)
  chunk = {}, np.zeros((1, 1), np.int32), np.ones((1, 1))
  source = types.SimpleNamespace(
    steps=1, num_examples=1, epoch=lambda *args: iter([chunk])
  )
  stage = stage_lib.Stage("", "", None, (trial.Trial(1.0, 0.0, 0),), "seed")
  usual = {
    "due": lambda: False,
    "stop": types.SimpleNamespace(received=False),
    "save": None,
    "report": lambda *args: None,
    "timed": lambda *args: None,
  }
  loop_lib.run_epochs(
    stage,
    source,
    optim.Schedule(9, 0, 1),
    *[None] * 3,
    {},
    stage_lib.Progress(),
    **(usual | how),
  )


@pytest.mark.parametrize("several", [False, True])
def test_nobody_waits_for_steps_just_started(monkeypatch, several):
  """Several hear what they asked behind a call after the next; one, at once."""
  calls, heard, saves = [], [], []
  stop = types.SimpleNamespace(received=False)

  def call():
    calls.append(None)
    stop.received = len(calls) == 3

  def ask(values):
    behind, own = len(calls), values()

    def answer():
      heard.append((behind, len(calls)))
      return np.array(own)

    return answer

  if several:
    monkeypatch.setattr(loop_lib.processes, "all_reduce_max_async", ask)
  with pytest.raises(preemption.Stopped):
    run_epochs(
      monkeypatch,
      call,
      due=lambda: len(calls) == 1,
      stop=stop,
      save=lambda state: saves.append(len(calls)),
    )
  if several:
    assert saves == [2, 4] and heard == [(0, 1), (1, 2), (2, 3), (3, 4)]
  else:
    assert saves == [1, 3]


@pytest.mark.parametrize("epoch", [0, 7, 8])
def test_a_report_that_fails(monkeypatch, epoch):
  """On this process; or on another one, as all of them hear."""

  def report(finished, *args):
    if finished == epoch:
      raise errors.UserError("no room")

  with pytest.raises(errors.UserError, match="no room"):
    run_epochs(monkeypatch, report=report)

  def ask(values):
    calls.append(values())
    own = np.array(calls[-1], float)
    own[-1] = len(calls) > epoch
    return lambda: own

  calls = []
  monkeypatch.setattr(loop_lib.processes, "all_reduce_max_async", ask)
  with pytest.raises(errors.UserError, match="Another process of this run"):
    run_epochs(monkeypatch)


def test_a_full_disk(material, undisturbed, go, tmp_path):
  """Each time more files fit; in the end all do."""
  argv = command(material, tmp_path)
  for size, what in (
    (500, "config.json"),
    (2000, "checkpoints"),
  ):
    process = runs.Process(argv, devices=4, largest_file=size)
    status, said = process.wait(), process.said().splitlines()
    assert status == 2 and not any("Traceback" in line for line in said)
    assert said[-1].startswith(f"error: Cannot write {tmp_path / what}: File")
  assert go(tmp_path)[0] == 0
  assert runs.bits(tmp_path) == runs.bits(undisturbed["kept"])


def test_steps_that_fail(undisturbed, go, tmp_path):
  """Each time a later one; then none."""
  for place, number in (
    ("config.json", 2),
    ("metrics.jsonl", 2),
    ("stages/search", 2),
    ("tuned", 3),
    ("report.png", 3),
    ("report.html", 3),
  ):
    with faults.FAULTS.below(tmp_path / place, fail=number):
      status, said = go(tmp_path)
    assert status == 2, place
    place = tmp_path / place.partition("/")[0]
    assert said.splitlines()[-1].startswith(f"error: Cannot write {place}")
  assert go(tmp_path)[0] == 0
  assert runs.bits(tmp_path) == runs.bits(undisturbed["kept"])
  assert not [*tmp_path.rglob("*.new")]


def test_writes_that_outlive_their_save(monkeypatch):
  """Not all end in time for `test_a_full_disk` to see what they say."""
  said = []
  monkeypatch.setattr(sys, "unraisablehook", said.append)
  checkpoint._mute_late_ends.__wrapped__()
  promise, write = tensorstore.Promise.new()
  loop = asyncio.new_event_loop()

  async def wait():
    await write

  task = loop.create_task(wait())
  loop.run_until_complete(asyncio.sleep(0))
  loop.close()
  promise.set_result(None)
  assert not task.done() and not said


def test_a_damaged_save(undisturbed, go, tmp_path):
  assert go(tmp_path, (TRAIN, 8, TERM))[0] == 75  # Of the seeds.
  last = max(saves(tmp_path), key=lambda path: int(path.name))
  for file in (last / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 100:
      file.write_bytes(file.read_bytes()[:-20])
  before = runs.files(tmp_path / "checkpoints")
  status, said = go(tmp_path)
  assert status == 2 and said.startswith("vqt on squares")
  assert f"error: Cannot read {last}: " in said
  assert "Delete that folder to resume from the save before it." in said
  assert runs.files(tmp_path / "checkpoints") == before
  shutil.rmtree(last)
  assert go(tmp_path)[0] == 0
  assert runs.bits(tmp_path) == runs.bits(undisturbed["kept"])


@pytest.mark.parametrize("name", ["[a-c]*?", "x:y,z=#%20 {é}|'&", "~"])
def test_saves_in_a_folder_of_any_name(tmp_path, monkeypatch, name):
  """Also one that is not named from the root, or has moved."""
  monkeypatch.chdir(tmp_path)
  save, like = {"x": jnp.arange(5.0)}, {"x": jnp.zeros(5)}
  saver = checkpoint.Checkpointer(f"./{name}/../{name}", 0)
  monkeypatch.chdir("/")
  saver.save(save, {"i": 1})
  saver.close()
  moved = (tmp_path / name).rename(tmp_path / f"new {name}")
  saver = checkpoint.Checkpointer(moved, 0)
  assert saver.progress(dict) == {"i": 1}
  np.testing.assert_array_equal(saver.restore(like)["x"], save["x"])
  saver.close()


def test_saves_of_another_program_are_told(tmp_path):
  (tmp_path / "100" / "default").mkdir(parents=True)
  with pytest.raises(
    errors.UserError, match="100 is not a training checkpoint"
  ):
    checkpoint.Checkpointer(tmp_path, 0)


@pytest.mark.parametrize("part", ["state", "progress"])
def test_a_part_of_a_save_that_gets_no_folder(tmp_path, part):
  """The others do not wait for it."""
  saver = checkpoint.Checkpointer(tmp_path, 0)
  folder = tmp_path / "1.orbax-checkpoint-tmp" / part
  with faults.FAULTS.below(folder, fail=1):
    with pytest.raises(errors.UserError, match="Cannot write .*: Permission"):
      saver.save({"x": jnp.arange(5.0)}, {"i": 1})
      saver.close()
    with contextlib.suppress(errors.UserError):
      saver.close()
  for thread in threading.enumerate():
    assert not type(thread).__module__.startswith("orbax."), thread


def test_a_kill_while_an_old_save_is_deleted(tmp_path):
  saver = checkpoint.Checkpointer(tmp_path, 0)
  for i in (1, 2, 3):
    saver.save({"x": jnp.arange(5.0)}, {"i": i})
  saver.close()
  shutil.rmtree(tmp_path / "2" / "progress")
  saver = checkpoint.Checkpointer(tmp_path, 0)
  assert saver.progress(dict) == {"i": 3}
  saver.save({"x": jnp.arange(5.0)}, {"i": 4})
  saver.close()
  assert {"3", "4"} == {path.name for path in tmp_path.iterdir()}


def test_a_local_folder_is_no_bucket():
  assert str(checkpoint._Literal("/gs/a")) == "/gs/a"


@pytest.mark.parametrize("devices", [1, 4])
def test_a_save_holds_what_it_was_given(tmp_path, devices):
  """Also when the next step reuses the arrays' memory at once."""
  mesh = jax.sharding.Mesh(jax.devices()[:devices], "data")
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  step = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=everywhere)
  saver = checkpoint.Checkpointer(tmp_path, 0)
  x = jax.device_put(jnp.zeros(2**20), everywhere)
  for i in range(4):
    saver.save({"x": x}, {"i": i})
    expected = np.array(x)
    for _ in range(5):
      x = step(x)
    jax.block_until_ready(x)
    saver.close()
    saver = checkpoint.Checkpointer(tmp_path, 0)
    assert saver.progress(dict) == {"i": i}
    restored = saver.restore({"x": x})["x"]
    np.testing.assert_array_equal(restored, expected)
    assert restored.sharding == everywhere
  saver.close()
