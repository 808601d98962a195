"""Workdirs in a bucket end with the same bits; a server here is Google's."""

import os
import re
import signal
import tempfile
import types

import pytest

import main
from tests import bucket
from tests import faults
from tests import runs
from tests.runtime import test_processes
from vqt_jax import UserError
from vqt_jax import compare
from vqt_jax.runtime import files
from vqt_jax.runtime import mirror as mirror_lib
from vqt_jax.training import loop
from vqt_jax.training import metrics
from vqt_jax.training import preemption
from vqt_jax.tuned import bundle

WORKDIR = "gs://bucket/runs/a"
SMALL = dict(method="linear", lr=0.1, epochs=2, seeds=7)
TRAIN = "vqt_jax.training.step:train_steps"


@pytest.fixture
def server(monkeypatch):
  with bucket.serve() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    yield server


@pytest.fixture
def data(server, material, tmp_path):
  """The material's data set in the bucket; where TensorFlow finds it."""
  for name, content in runs.files(material / "squares").items():
    server.objects[f"data/squares/{name}"] = content
    server.generations[f"data/squares/{name}"] = 1
  with bucket.serve_tensorflow(server, tmp_path) as environment:
    yield {**server.environment, **environment}


def start(environment, material, workdir, **changes):
  """Starts a run with its data in the bucket."""
  changes = {"data_dir": "gs://bucket/data", **changes}
  argv = runs.command(material, workdir, **changes)
  return runs.Process(argv, environment=environment)


def test_killed_with_its_data_there(server, data, material, alone, tmp_path):
  """At the worst moment: all of a save is there but what makes it count."""
  start_here = lambda: start(data, material, WORKDIR, checkpoint_seconds=0)
  process, saves = start_here(), []

  def kill(name):
    save, _, last = name.rpartition("/")
    if not re.fullmatch(r"\S+/checkpoints/\d+", save):
      return
    progress = server.objects.get(f"{save}/progress/metadata", b"")
    if last.startswith("commit_") and b'"stage": "seeds"' in progress:
      saves.append(save)
      if len(saves) == 2:
        os.kill(process.pid, signal.SIGKILL)
        raise bucket.Refused(500)

  server.before_change = kill
  assert process.wait() == -signal.SIGKILL
  server.before_change = lambda name: None
  assert any(name.startswith(saves[1]) for name in server.objects)

  process = start_here()
  status, said = process.wait(), process.said().splitlines()
  assert status == 0 and "resume   seeds after epoch " in "\n".join(said)
  assert not any(line.startswith("search ") for line in said)
  assert any(f"{WORKDIR}/results.json" in line for line in said)
  run = server.copy_to(tmp_path) / "runs" / "a"
  assert runs.bits(run) == runs.bits(alone["kept"])
  assert not any(name.startswith("data/") for name in server.written)
  assert {path.name for path in run.iterdir()} == {
    path.name for path in alone["device"].iterdir()
  }
  assert len(list(run.glob("tensorboard/*/*/events*"))) == 7
  assert [n for n in server.written if n != "runs/a/log.txt"][-4:] == [
    "runs/a/results.json",
    "runs/a/report.png",
    "runs/a/tensorboard/report/picture/events.out.tfevents.0.run",
    "runs/a/report.html",
  ]


def test_two_processes(server, material, tmp_path, monkeypatch, capfd):
  """Both find what one has written that was stopped; but no damaged save."""
  changes = {"checkpoint_seconds": 0, **SMALL}
  argv = runs.command(material, WORKDIR, **changes)
  monkeypatch.setattr(loop, "CALL_SECONDS", 1e9)
  with monkeypatch.context() as patch:
    runs.signal_on_call(patch.setattr, TRAIN, 3, signal.SIGTERM)
    assert main.main(argv) == 75
  assert capfd.readouterr().err.endswith(f"{runs.STOPPED}\n")
  whole = dict(server.objects)
  last = max(re.findall(r"runs/a/checkpoints/\d+", " ".join(whole)))
  for name in whole:
    if name.startswith(f"{last}/state/") and len(whole[name]) > 100:
      server.objects[name] = whole[name][:-20]
  assert main.main(argv) == 2
  said = capfd.readouterr().err.splitlines()[-1]
  assert f"Cannot read gs://bucket/{last}: " in said
  assert "resume from the save before it" in said
  server.objects.update(whole)

  status, said = test_processes.group(
    material, WORKDIR, environment=server.environment, **changes
  )
  assert status == [0, 0] and "resume   seeds after epoch 1" in said[0]
  assert not said[1]
  run = server.copy_to(tmp_path) / "runs" / "a"
  assert len(runs.metrics(run)) == SMALL["epochs"]
  assert len(list(run.glob("tensorboard/*/*/events*"))) == 3
  assert sorted(path.name for path in run.glob("log*")) == [
    "log.txt",
    "log_1.txt",
  ]


def test_refused_in_the_middle(server, material, capfd):
  def refuse(name):
    if "/state/" in name:
      raise bucket.Refused(403)

  server.before_change = refuse
  argv = runs.command(material, WORKDIR, checkpoint_seconds=0, **SMALL)
  assert main.main(argv) == 2
  said = capfd.readouterr().err.splitlines()
  assert "Traceback" not in "\n".join(said)
  assert said[-1].startswith(f"error: Cannot write {WORKDIR}/checkpoints: ")
  assert "Storage Admin" in said[-1] and len(said[-1]) < 600


@pytest.fixture
def impatient(monkeypatch):
  """Has gcsfs try again at once."""

  async def sleep(seconds):
    del seconds

  instant = types.SimpleNamespace(sleep=sleep)
  monkeypatch.setattr("gcsfs.retry.asyncio", instant)


def refusal(capfd, material, workdir):
  """What is said of a workdir that cannot be had."""
  assert main.main(runs.command(material, workdir)) == 2
  out, said = capfd.readouterr()
  assert out == "" and said.startswith("error: ") and said.count("\n") == 1
  return said


def test_no_such_bucket(server, material, capfd):
  said = refusal(capfd, material, "gs://bukcet/run")
  assert "Cannot write gs://bukcet/run/config.json: there is no such" in said


@pytest.mark.parametrize("status", [401, 403])
def test_not_allowed(server, material, capfd, status):
  def before_change(name):
    raise bucket.Refused(status)

  server.before_change = before_change
  said = refusal(capfd, material, WORKDIR)
  assert f"Cannot write {WORKDIR}/config.json: " in said
  assert "gcloud auth application-default login" in said


def test_no_network(server, material, capfd, impatient, monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
  said = refusal(capfd, material, WORKDIR)
  assert f"Cannot read {WORKDIR}" in said and "the network is up" in said


@pytest.mark.parametrize("place", ["gs://", "gs:/bucket/run", "s3://bucket/a"])
def test_no_bucket_of_google(place):
  with pytest.raises(UserError, match="expected a folder, or gs://BUCKET/"):
    files.path(place)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_files(server):
  folder = files.path("gs://bucket/a")
  assert not files.exists(folder) and files.list_names(folder) == []
  with pytest.raises(FileNotFoundError):
    files.read(folder / "b.json")
  large = bytes(range(256)) * 25_000  # More than is sent at once.
  for content in (b"old", b"", large):
    files.write(folder / "b.json", content)
    assert files.read(folder / "b.json") == content
  with files.local_copy(folder / "b.json") as copy:
    assert copy.read_bytes() == large
  files.write_folder(folder / "c", {"d": b"1", "e": b"2"})
  assert files.list_names(folder) == ["b.json", "c"]
  assert server.written[-2:] == ["a/c/d", "a/c/e"]
  server.objects["a/f"] = b"by another machine"
  server.generations["a/f"] = 1
  assert files.list_names(folder) == ["b.json", "c", "f"]
  files.remove_folder(folder / "c")
  files.remove_folder(folder / "c")
  assert sorted(server.objects) == ["a/b.json", "a/f"]


def test_a_signal_is_no_failure_of_a_bucket():
  with pytest.raises(preemption.Stopped):
    with files.explain_read_errors(WORKDIR):
      raise preemption.Stopped


def test_growing_files(server):
  files.write(files.path("gs://bucket/a/log.txt"), b"1")
  place = files.path("gs://bucket/a")
  mirror = mirror_lib.MirroredFolder(place, "log.txt", "other")
  local = mirror.folder
  (local / "deep").mkdir()
  (local / "deep" / "b").write_bytes(b"b")
  mirror.sync(after=0)
  assert server.written == ["a/log.txt", "a/deep/b"]
  with open(local / "log.txt", "ab") as log:
    log.write(b"2")
  mirror.sync()  # Too soon.
  assert server.objects["a/log.txt"] == b"1"
  mirror.close()
  assert server.written[2:] == ["a/log.txt"]
  assert server.objects["a/log.txt"] == b"12"
  assert not local.exists()


def test_growing_files_without_room(server, tmp_path, monkeypatch):
  files.write(files.path("gs://bucket/a/log.txt"), b"1")
  for place, limit in ((tmp_path / "none", 9), (tmp_path, 0)):
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with pytest.raises(UserError, match="temporary file: .* Set TMPDIR to"):
      with faults.largest_file(limit):
        mirror_lib.MirroredFolder(files.path("gs://bucket/a"), "log.txt")


def test_metrics(server, tmp_path, monkeypatch):
  """Rows that a kill keeps from the bucket are those that are made again."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  rows = [{"epoch": e, "run": 0, "loss": 1.0} for e in range(1, 4)]
  writer = metrics.MetricsWriter(WORKDIR)
  writer.epochs("a", rows[:1])
  writer.close()
  writer = metrics.MetricsWriter(WORKDIR)
  writer.epochs("a", rows[:1])
  writer.epochs("a", rows[1:])
  assert len(metrics.read_metrics(WORKDIR)) == 1  # As good as killed here.
  writer._events.close()
  writer = metrics.MetricsWriter(WORKDIR)
  writer.epochs("a", rows[:2])
  writer.epochs("a", rows[2:])
  writer.close()
  assert [row["epoch"] for row in metrics.read_metrics(WORKDIR)] == [1, 2, 3]
  assert len([name for name in server.objects if "tensorboard" in name]) == 1


def test_comparing(server, alone, capsys):
  for name, content in runs.files(alone["device"], "tuned/*").items():
    files.write(files.path(f"{WORKDIR}/{name}"), content)
  assert bundle.read(f"{WORKDIR}/tuned").info["seeds"] == [7, 8]
  summary = runs.results(alone["device"]) | {"method": "linear"}  # No queries.
  files.write_json(f"{WORKDIR}/results.json", summary)
  assert compare.main(["compare", WORKDIR, "--output=gs://bucket/out"]) == 0
  assert server.written[-3:] == [
    "out/compare.csv",
    "out/compare.png",
    "out/report.html",
  ]
  assert compare.main(["compare", "gs://bucket/none"]) == 2
  assert "There is no gs://bucket/none/results.json." in capsys.readouterr().err


def read_data(*args, **changes):
  """Status and lines of a run that cannot read it."""
  process = start(*args, **changes)
  status, said = process.wait(), process.said()
  assert "Traceback" not in said
  return status, said.splitlines()


def test_data_that_is_cut(server, data, material, tmp_path):
  [name] = [name for name in server.objects if "squares-train" in name]
  server.objects[name] = server.objects[name][:-20]
  status, said = read_data(data, material, tmp_path / "run")
  assert status == 2 and "cannot be read (DataLossError: " in said[-1]
  assert "Write the dataset again" in said[-1]


@pytest.mark.parametrize(
  "path, message",
  [
    ("/bucket/", "that you may read the folder; the same command resumes."),
    ("/storage/", "gcloud auth application-default login"),
  ],
)
def test_data_that_may_not_be_read(
  server, data, material, tmp_path, path, message
):
  """Of TensorFlow's requests for records, and the others' for all else."""
  server.refused = path
  status, said = read_data(data, material, tmp_path / "run")
  assert status == 2 and "cannot be read" in said[-1]
  assert message in said[-1]


def test_data_in_no_bucket(data, material, tmp_path):
  place = "gs://bukcet/data"
  status, said = read_data(
    data, material, tmp_path / "run", data_dir=place, task="mnist"
  )
  assert status == 2
  assert said[-1].startswith(f"error: The data folder {place} cannot be read: ")
  assert "No such bucket" in said[-1]
