"""Real processes with two fake devices each do what one alone does."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import main
from tests import runs
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.runtime import logfile
from vqt_jax.runtime import processes as processes_lib
from vqt_jax.training import launch
from vqt_jax.training import loop
from vqt_jax.tuned import bundle

TRAIN = "vqt_jax.training.step:train_steps"
ROWS = "vqt_jax.training.stages:_rows"  # As a stage begins; after each epoch.


def group(
  material,
  workdir,
  *,
  count=2,
  devices=2,
  second=None,
  signals=None,
  slurm=False,
  environment=None,
  **changes,
):
  """Runs all to their end: statuses, and what each said.

  Args:
    count: processes.
    devices: of each.
    second: further changes, of the second process.
    signals: to the second process.
    slurm: tells the processes of each other, instead of flags.
    environment: further variables of all.
  """
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  processes = []
  for i in range(count):
    own = changes | (second or {}) if i == 1 else changes
    argv = [*runs.command(material, workdir, **own), "--lost_after=20"]
    if not slurm:
      argv += [
        f"--coordinator=localhost:{port}",
        f"--num_processes={count}",
        f"--process_id={i}",
      ]
    told = {
      "JAX_COORDINATOR_PORT": str(port),
      "SLURM_JOB_ID": "1",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_STEP_NUM_TASKS": str(count),
      "SLURM_NTASKS": str(count),
      "SLURM_PROCID": str(i),
      "SLURM_LOCALID": str(i),
    }
    processes.append(
      runs.Process(
        argv,
        devices=devices,
        environment=(environment or {}) | (told if slurm else {}),
        signals=signals if i == 1 else None,
      )
    )
  status = [p.wait() for p in processes]
  if any(number < 0 for number in status):
    time.sleep(1)  # What is said of one that died, another one says.
  return status, [p.said() for p in processes]


def assert_same_outcome(
  workdir, alone, devices=4, logs=("log_1.txt",), atol=1e-6
):
  """Same choices and classes, weights to `atol`, and all only once."""
  ours, theirs = runs.results(workdir), runs.results(alone)
  assert ours["device"] == f"{devices} x cpu"
  assert ours["test_accuracy"] == theirs["test_accuracy"]
  assert ours["chosen"] == theirs["chosen"]
  if ours["search"]:
    assert ours["search"]["val_accuracy"] == theirs["search"]["val_accuracy"]
  a, b = (bundle.read(w / "tuned") for w in (workdir, alone))
  for name, value in runs.flat(a.variables).items():
    np.testing.assert_allclose(
      value, runs.flat(b.variables)[name], rtol=0, atol=atol, err_msg=name
    )
  *a, p = results_lib.read_predictions(workdir, ours)
  *b, q = results_lib.read_predictions(alone, theirs)
  for classes, expected in zip(a, b, strict=True):
    np.testing.assert_array_equal(classes, expected)
  np.testing.assert_allclose(p, q, rtol=0, atol=10 * atol)
  ours, theirs = runs.metrics(workdir), runs.metrics(alone)
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs):
    assert a.pop("loss") == pytest.approx(b.pop("loss"), abs=1e-5)
    assert a == b
  names = lambda folder: sorted(path.name for path in folder.iterdir())
  assert names(workdir) == sorted([*names(alone), *logs])
  events = len(list(workdir.glob("tensorboard/*/*/events*")))
  assert events == len(list(alone.glob("tensorboard/*/*/events*"))) > 1


def test_kept_features_or_the_backbone_in_every_step(alone):
  """One process and device: keys and values of features against images."""
  assert_same_outcome(alone["kept"], alone["device"], 1, (), 1e-5)


def test_stopped_and_resumed(material, alone, tmp_path):
  """Only the second one is asked to stop, but they agree.

  Three go on, each with a device and a file with a part of the features.
  """
  signals = {TRAIN: (2, signal.SIGTERM)}
  status, said = group(material, tmp_path / "run", signals=signals)
  assert status == [75, 75]
  assert said[0].endswith(f"{runs.STOPPED}\n")
  changes = {"features": "disk", "store_dir": tmp_path / "store"}
  status, said = group(
    material, tmp_path / "run", count=3, devices=1, **changes
  )
  assert status == [0] * 3
  files = list((tmp_path / "store").iterdir())
  assert len(files) == 3 and all(path.suffix == ".npy" for path in files)
  assert "resume   search after epoch" in said[0]
  assert said[1:] == [""] * 2
  logs = [f"log_{i}.txt" for i in (1, 2)]
  assert_same_outcome(tmp_path / "run", alone["device"], 3, logs)


def test_nothing_is_said_of_an_exchange_after_it():
  """Devices connect in threads of their own; the screen is then given back."""
  program = (
    "import sys\n"
    "from vqt_jax.runtime import processes\n"
    "i, port = sys.argv[1:]\n"
    "processes.connect('localhost:' + port, 2, int(i))\n"
    "print(processes.any_process(i == '1'), flush=True)\n"
    "print(processes.any_process(False))\n"
    "print(processes.all_reduce_min(0.5 + int(i)))\n"
  )
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  flags = "--xla_force_host_platform_device_count=4"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(i), str(port)],
      text=True,
      env=os.environ | {"XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
    )
    for i in range(2)
  ]
  for process in processes:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "[Gloo]" in said
    assert said.endswith("True\nFalse\n0.5\n")


def test_a_process_is_lost(material, alone, tmp_path, monkeypatch, capfd):
  """The other one ends; then and before, one process goes on with the run."""
  argv = runs.command(material, tmp_path, checkpoint_seconds=0)
  monkeypatch.setattr(loop, "CALL_SECONDS", 1e9)
  with monkeypatch.context() as patch:
    runs.signal_on_call(patch.setattr, TRAIN, 1, signal.SIGTERM)
    assert main.main(argv) == 75
  began = time.monotonic()
  status, said = group(
    material,
    tmp_path,
    signals={ROWS: (3, signal.SIGKILL)},
    checkpoint_seconds=0,
  )
  assert time.monotonic() - began < 90
  assert status[0] in (1, -signal.SIGABRT) and status[1] == -signal.SIGKILL
  assert "Traceback" not in said[0] and "resume   search after" in said[0]
  assert "most likely another process of this run is gone" in said[0]
  assert main.main(argv) == 0 and "resume   search" in capfd.readouterr().err
  assert_same_outcome(tmp_path, alone["device"])


def test_data_that_one_process_cannot_read(material, tmp_path):
  """It is in the midst of the images that are computed together."""
  spoilt = tmp_path / "spoilt"
  shutil.copytree(material / "squares", spoilt / "squares")
  (record,) = spoilt.glob("*/*/*train*")
  record.write_bytes(record.read_bytes()[:-500])
  status, said = group(
    material,
    tmp_path / "run",
    second={"data_dir": spoilt},
    eval_batch_size=4,
  )
  assert status == [2, 2], "\n".join(said)
  assert "(DataLossError: truncated record" in said[1]
  error = said[0].splitlines()[-1]
  assert error.startswith("error: Another process of this run failed")


@pytest.mark.parametrize(
  "told, installed, found",
  [
    ({}, (), None),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, (), None),
    ({"SLURM_STEP_NUM_TASKS": "4"}, (), "slurm"),
    ({"SLURM_STEP_NUM_TASKS": "4(x2)"}, (), None),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, (), "ompi"),
    ({"JOB_COMPLETION_INDEX": "0"}, (), None),
    ({"JOB_COMPLETION_INDEX": "0"}, ("kubernetes",), ""),
    ({}, ("libtpu",), "gcetpu"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, ("libtpu",), "gketpu"),
  ],
)
def test_what_platforms_tell(monkeypatch, told, installed, found):
  spec = lambda name: types.SimpleNamespace(
    origin=f"{name}.py" if name in installed else None  # None: a folder.
  )
  monkeypatch.setattr(processes_lib.importlib.util, "find_spec", spec)
  monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)  # Of planning.
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  method = processes_lib.detect_cluster()
  if method is not None:
    method = method.get("cluster_detection_method", "")
  assert method == found


@pytest.mark.parametrize("coordinator", [None, "host:1"])
def test_who_waits_for_nobody_is_told(monkeypatch, capfd, coordinator):
  """As in a shell of a Slurm step, whose other tasks are gone."""
  said = []

  @contextlib.contextmanager
  def redirect_output(path, if_killed):
    said.append(if_killed)
    yield sys.stderr

  monkeypatch.setattr(launch, "NOTICE_SECONDS", 0)
  monkeypatch.setattr(logfile, "redirect_output", redirect_output)
  monkeypatch.setattr(processes_lib, "connect", lambda *args: time.sleep(0.2))
  launch._join(coordinator, None, None, 60)
  assert "start the same command on all" in said[0]
  assert ("--coordinator=none" in said[0]) == (coordinator is None)
  assert capfd.readouterr().err.startswith("Waiting for the other processes")


@pytest.mark.parametrize(
  "error",
  [
    OSError("no metadata server"),
    RuntimeError("... before any JAX calls"),
    ValueError("coordinator_address should be defined."),
  ],
)
def test_libtpu_without_a_tpu_is_no_cluster(monkeypatch, error):
  def fail(**kwargs):
    raise error

  monkeypatch.setattr(processes_lib.jax.distributed, "initialize", fail)
  method = {"cluster_detection_method": "gcetpu"}
  monkeypatch.setattr(processes_lib, "detect_cluster", lambda: method)
  assert not processes_lib.connect(None)
  with pytest.raises(errors.UserError, match="cluster|Cannot join"):
    processes_lib.connect("auto")
  monkeypatch.setattr(processes_lib, "_tpu_devices", lambda: ["/dev/accel0"])
  if isinstance(error, OSError):  # One of a pod must not run on alone.
    with pytest.raises(errors.UserError, match="Cannot join the other proce"):
      processes_lib.connect(None)


def test_a_cluster_that_is_not_there(material, tmp_path):
  argv = runs.command(material, tmp_path / "run")
  process = runs.Process([*argv, "--coordinator=auto"])
  assert process.wait() == 2
  assert "No cluster tells" in process.said()
  assert not (tmp_path / "run").exists()


def test_a_flag_that_jax_dies_of(material, tmp_path):
  argv = runs.command(material, tmp_path / "run")
  process = runs.Process(argv, environment={"XLA_FLAGS": "--no_such_flag=1"})
  assert process.wait() != 0
  time.sleep(1)  # What is said of one that died, another one says.
  assert "XLA_FLAGS=--no_such_flag=1 may have a flag that" in process.said()
  assert not (tmp_path / "run").exists()


def test_streamed_to_a_backbone_in_two_halves(material, alone, tmp_path):
  """And started by Slurm, as far as they can tell."""
  changes = {"data": "stream", "mesh__model": 2}
  assert group(material, tmp_path, slurm=True, **changes)[0] == [0, 0]
  # Sums over the halves round otherwise; how much depends on the processor.
  assert_same_outcome(tmp_path, alone["stream"], atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_what_fails_on_one_fails_on_both(material, tmp_path, which):
  """The workdir is the first one's to check; the checkpoint each one's."""
  changes, second = {}, {"init": "nowhere"}
  word = "nowhere is neither"
  if which == 0:
    (tmp_path / "results.json").write_text("{}")
    second, word = {}, f"{tmp_path / 'results.json'} is there, but no config"
  status, said = group(material, tmp_path, second=second, **changes)
  assert status == [2, 2], "\n".join(said)
  assert said[which].splitlines()[-1].startswith("error: " + word)
  other = said[1 - which].splitlines()[-1]
  assert other.startswith("error: Another process of this run failed")
