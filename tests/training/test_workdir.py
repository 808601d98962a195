"""Files of a run: whole after a crash, refused in words when not writable."""

import errno
import json
import os
import pathlib
import threading

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub import errors as stub_errors
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from tests import runs
from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.runtime import files
from vqt_jax.runtime import locks
from vqt_jax.training import metrics
from vqt_jax.training import workdir as workdir_lib

ROW = '{"phase": "search", "run": 0, "epoch": 1}\n'


def opened(config, workdir):
  """Whether a run was begun there; nobody runs there afterwards."""
  with workdir_lib.open_workdir(config, workdir) as begun:
    return begun


def rows(first, last, scale=1.0):
  return [
    {"epoch": e, "run": r, "lr": 0.5, "seed": r, "loss": scale / e}
    for e in range(first, last + 1)
    for r in range(2)
  ]


def epochs_written(workdir):
  return [
    (row["phase"], row["epoch"])
    for row in metrics.read_metrics(workdir)
    if row["run"] == 0
  ]


def scalars(folder):
  """(step, tag) of all events of one TensorBoard run."""
  (path,) = folder.iterdir()
  reader = pywrap_tensorflow.PyRecordReader_New(str(path))
  found = []
  while True:
    try:
      reader.GetNext()  # Checks the sums of every record.
    except stub_errors.OutOfRangeError:
      return found
    event = event_pb2.Event.FromString(reader.record())
    found += [(event.step, value.tag) for value in event.summary.value]


def test_json_is_replaced_at_once_and_holds_plain_numbers(tmp_path):
  path = tmp_path / "new" / "a.json"
  files.write_json(path, {"old": 1})
  value = {
    "f32": np.float32(0.1),
    "array": np.arange(3),
    "nan": float("nan"),
    "tuple": (1, "a"),
    "path": path,
    3: np.inf,
    "flag": np.bool_(True),
    "none": None,
  }
  files.write_json(path, value)
  assert json.loads(path.read_text()) == {
    "f32": 0.1,
    "array": [0, 1, 2],
    "nan": None,
    "tuple": [1, "a"],
    "path": str(path),
    "3": None,
    "flag": True,
    "none": None,
  }
  assert os.listdir(path.parent) == ["a.json"]


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
  """As those do that begin runs in one new workdir at the same time."""
  path, replace = tmp_path / "config.json", os.replace

  def meanwhile(*args):
    monkeypatch.setattr(os, "replace", replace)
    files.write_json(path, "theirs")
    replace(*args)

  monkeypatch.setattr(os, "replace", meanwhile)
  files.write_json(path, "ours")
  assert files.read_json(path) == "ours"
  assert os.listdir(tmp_path) == ["config.json"]


def test_json_that_cannot_be_read(tmp_path):
  with pytest.raises(errors.UserError, match="There is no .*a.json"):
    files.read_json(tmp_path / "a.json")
  (tmp_path / "a.json").write_text('{"a": ')
  with pytest.raises(errors.UserError, match="Cannot read .*a.json"):
    files.read_json(tmp_path / "a.json")


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", [])
  writer.epochs("search", rows(1, 2))
  writer.epochs("search", rows(3, 3))
  judged = {"epoch": 3, "run": 1, "lr": 0.5, "seed": 1, "val_accuracy": 0.5}
  writer.outcomes("search", [judged])
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == 6
  assert json.loads(lines[0]) == {
    "phase": "search",
    "epoch": 1,
    "run": 0,
    "lr": 0.5,
    "seed": 0,
    "loss": 1.0,
  }
  folder = tmp_path / "tensorboard" / "search" / "01 lr=0.5 seed=1"
  assert scalars(folder) == [
    (0, "_hparams_/session_start_info"),
    *((epoch, "loss") for epoch in (1, 2, 3)),
    (3, "val_accuracy"),
  ]


@pytest.mark.parametrize("cut", [0, 5, 100])
def test_resumed_metrics_are_those_of_an_uninterrupted_run(tmp_path, cut):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  for workdir in (whole, killed):
    workdir.mkdir()
    writer = metrics.MetricsWriter(workdir)
    writer.epochs("search", [])
    writer.epochs("search", rows(1, 4))
    writer.epochs("seeds", [])
    writer.epochs("seeds", rows(1, 5))
    writer.close()
  # Killed in a write, long after the checkpoint of epoch 2 of the seeds.
  path = killed / "metrics.jsonl"
  path.write_bytes(path.read_bytes()[: -cut or None])

  writer = metrics.MetricsWriter(killed)
  writer.epochs("seeds", rows(1, 2))
  assert epochs_written(killed)[-2:] == [("seeds", 1), ("seeds", 2)]
  writer.epochs("seeds", rows(3, 5))
  writer.close()
  assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()
  for folder in (whole / "tensorboard").glob("*/*"):
    again = killed / folder.relative_to(whole)
    assert scalars(again) == scalars(folder)


def test_a_run_resumed_from_nothing_starts_its_metrics_anew(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", rows(1, 3))
  writer.close()
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", [])
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_metrics_lost_with_the_power_are_written_again(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", rows(1, 2))
  writer.close()
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", rows(1, 4))
  writer.close()
  assert epochs_written(tmp_path) == [("search", e) for e in range(1, 5)]


def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch):
  writer = metrics.MetricsWriter(tmp_path)
  writer.epochs("search", rows(1, 1))
  full = lambda file, flags: os.open("/dev/full", flags)
  monkeypatch.setattr(files, "refuse_link", full)
  with pytest.raises(errors.UserError, match="metrics.jsonl: No space left"):
    writer.epochs("search", rows(2, 2))
  writer.close()


def test_an_unwritable_place_is_told_and_left_alone(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(errors.UserError, match="Cannot write .*file"):
    opened(config_dict.default_config(), tmp_path / "file" / "workdir")
  assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_is_made_and_recognised(tmp_path):
  workdir = tmp_path / "a" / "b"
  config = config_dict.default_config()
  assert not opened(config, workdir)
  metrics.MetricsWriter(workdir).epochs("search", [])
  assert not opened(config, workdir)
  (workdir / "checkpoints" / "1").mkdir(parents=True)
  config.checkpoint_seconds = 1.0  # May change between starts of a run.
  assert opened(config, workdir)
  # It may be older than a field, which then did what its default does.
  old = files.read_json(workdir / "config.json")
  del old["trained_size"]
  files.write_json(workdir / "config.json", old)
  assert opened(config, workdir)
  config.trained_size = 8
  with pytest.raises(errors.UserError, match="trained_size was 0, is now 8"):
    opened(config, workdir)


def test_a_config_may_be_mended_before_anything_is_trained(tmp_path):
  config = config_dict.default_config()
  opened(config, tmp_path)
  config.init = "right.npz"
  assert not opened(config, tmp_path)
  assert files.read_json(tmp_path / "config.json")["init"] == "right.npz"


def test_a_workdir_of_another_config_is_refused_and_untouched(tmp_path):
  config = config_dict.default_config()
  opened(config, tmp_path)
  (tmp_path / "metrics.jsonl").write_text(ROW)
  before = (tmp_path / "config.json").read_bytes()
  config.num_queries = 10
  config.mesh.model = 2
  with pytest.raises(errors.UserError) as caught:
    opened(config, tmp_path)
  assert "num_queries was 0, is now 10" in str(caught.value)
  assert "mesh.model was 1, is now 2" in str(caught.value)
  assert sorted(os.listdir(tmp_path)) == ["config.json", "metrics.jsonl"]
  assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
  "name, content, begun",
  [
    ("config.json", '{"model_type": "vit", "lr": 0.1}', False),
    ("config.json", '["task", "init"]', False),
    ("config.json", "", False),
    ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n', False),
    ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n', True),
    ("results.json", "{}", False),
    ("checkpoints/epoch=1.ckpt", "weights", False),
    ("tuned/model.bin", "weights", False),
  ],
)
def test_a_folder_of_another_program_is_refused(tmp_path, name, content, begun):
  """Also one where a run of this program was begun, but never trained."""
  config = config_dict.default_config()
  if begun:
    opened(config, tmp_path)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text(content)
  before = runs.files(tmp_path)
  with pytest.raises(errors.UserError, match="choose another --workdir"):
    opened(config, tmp_path)
  assert runs.files(tmp_path) == before


def test_events_of_another_program_stay(tmp_path):
  folder = tmp_path / "tensorboard" / "search" / "01 lr=0.5 seed=1"
  others = {
    tmp_path / "tensorboard" / "events.out.tfevents.1.run",
    tmp_path / "tensorboard" / "other" / "a" / "events.out.tfevents.1.host.2",
    folder / "events.out.tfevents.1.host.2.v2",
  }
  for path in others:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  for _ in range(2):
    writer = metrics.MetricsWriter(tmp_path)
    writer.epochs("search", rows(1, 2))
    writer.close()
    (own,) = set(folder.iterdir()) - others
    own = own.rename(folder / "events.out.tfevents.7.run")  # Long ago.
  assert all(path.exists() for path in others)


def elsewhere(call, *args):
  """What a thread that has nothing to do with this one gets, or meets."""
  met = []

  def run():
    try:
      met.append(call(*args))
    except errors.UserError as e:
      met.append(str(e))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  return met[0]


def test_two_runs_in_one_workdir(tmp_path, monkeypatch):
  config = config_dict.default_config()
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / locks.LOCK_NAME).write_text("of a process that was killed")
  with workdir_lib.open_workdir(config, workdir):
    before = runs.files(workdir)
    assert f"process {os.getpid()} on " in before[locks.LOCK_NAME].decode()
    config.init = "other.npz"
    for again in (workdir, workdir / ".." / "run"):
      said = elsewhere(opened, config, again)
      assert said.startswith(f"Another run is already in {again} (process ")
    assert runs.files(workdir) == before
    opened(config, workdir / ".." / "run")  # As `main.py`, then `train`.
  assert os.listdir(workdir) == ["config.json"]
  assert elsewhere(opened, config, workdir) is False

  def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(locks.fcntl, "flock", no_locks)
  with workdir_lib.open_workdir(config, workdir):
    assert elsewhere(opened, config, workdir) is False


def test_paths_that_people_write(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for place in ("~/a", pathlib.Path("~/a")):
    assert files.path(place) == tmp_path / "a"
  with pytest.raises(errors.UserError, match="home folder of ~nobody_here is"):
    files.path("~nobody_here/a")
  monkeypatch.chdir(tmp_path)
  assert files.path(files.path("./~a")) == tmp_path / "~a"
  for place, what in (
    (r"a\b", r"\\"),
    ("a/logs:/b", "gs:"),
    ("gs://bucket/lr=[1]", "'\\['"),
  ):
    with pytest.raises(errors.UserError, match=f"take {what} .*literally"):
      files.path(place)


@pytest.mark.parametrize(
  "method, ignored, decides",
  [
    ("linear", "num_queries", "epochs"),
    ("vqt", "rank", "num_queries"),
    ("lora", "best.num_queries", "rank"),
    ("vqt+lora", "target_size", "query_dropout"),
    ("", "num_prompts", "keep_fraction"),  # Of several methods.
  ],
)
def test_fields_that_a_method_does_not_use_may_change(
  method, ignored, decides, tmp_path
):
  config = config_dict.default_config()
  config.method = method
  opened(config, tmp_path)
  (tmp_path / "metrics.jsonl").write_text(ROW)
  changes = {
    "best.num_queries": (3,),
    "query_dropout": 0.5,
    "keep_fraction": (0.5,),
  }
  config.update_from_flattened_dict({ignored: changes.get(ignored, 7)})
  assert opened(config, tmp_path)
  config.update_from_flattened_dict({decides: changes.get(decides, 7)})
  with pytest.raises(errors.UserError) as caught:
    opened(config, tmp_path)
  assert f"{decides} was" in str(caught.value)
  assert f"{ignored} was" not in str(caught.value)


def test_fields_of_the_gradient_may_change_where_the_head_is_computed(tmp_path):
  config = resolve.resolve({"method": "linear"})
  opened(config, tmp_path)
  (tmp_path / "results.json").write_text("{}")
  config.epochs = 7
  assert opened(config, tmp_path)
  config.class_weights = "balanced"
  with pytest.raises(errors.UserError, match="class_weights was '', is now"):
    opened(config, tmp_path)


def test_a_stage_without_epochs_begins_a_run(tmp_path):
  """Its head would be taken for that of another config."""
  config = resolve.resolve({"method": "instant"})
  opened(config, tmp_path)
  (tmp_path / "stages").mkdir()
  files.write_json(tmp_path / "stages" / "backbone.json", {})
  assert not opened(config, tmp_path)
  (tmp_path / "stages" / "seeds.safetensors").write_bytes(b"")
  config.seeds = (1,)
  with pytest.raises(errors.UserError, match="seeds was"):
    opened(config, tmp_path)


@pytest.mark.parametrize("method", ["linear", "vqt", "lora"])
def test_runs_from_before_there_was_a_solver(method, tmp_path):
  solver = {"linear": "gradient"}.get(method, "")
  config = resolve.resolve({"method": method, "solver": solver})
  opened(config, tmp_path)
  (tmp_path / "metrics.jsonl").write_text(ROW)
  old = files.read_json(tmp_path / "config.json")
  del old["solver"]
  files.write_json(tmp_path / "config.json", old)
  assert opened(config, tmp_path)
  if method == "linear":
    config = resolve.resolve({"method": method})
    with pytest.raises(errors.UserError, match="solver was 'gradient', is now"):
      opened(config, tmp_path)


def test_a_workdir_of_all_tasks_is_begun_with_one_of_them(tmp_path):
  config = config_dict.default_config()
  opened(config, tmp_path)
  opened(config, tmp_path / "dtd")
  assert not opened(config, tmp_path)
  (tmp_path / "dtd" / "metrics.jsonl").write_text(ROW)
  assert opened(config, tmp_path)
  config.epochs = 7
  with pytest.raises(errors.UserError, match="epochs was 0, is now 7"):
    opened(config, tmp_path)
  (tmp_path / "config.json").unlink()  # A folder that merely holds workdirs.
  assert not opened(config, tmp_path)


def test_rows_of_other_types_end_the_metrics(tmp_path):
  good = {"phase": "seeds", "epoch": 1, "run": 0, "lr": 0.1, "loss": 1.0}
  for changes in (
    {"phase": "../../evil"},
    {"phase": ".."},
    {"phase": ["a"]},
    {"phase": ""},
    {"epoch": 1.5},
    {"epoch": 2**70},
    {"run": [1]},
    {"run": True},
    {"run": -1},
    {"lr": "0.1"},
    {"seed": 10**400},
    {"loss": "1"},
    {"accuracy": 10**400},
  ):
    lines = [files.json_line(good), files.json_line(good | changes)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert metrics.read_metrics(tmp_path) == [good], changes
  for line in (b"[" * 99_999, b"1\n", b"null\n", b'"phase"\n', b"\xff\n"):
    (tmp_path / "metrics.jsonl").write_bytes(files.json_line(good) + line)
    assert metrics.read_metrics(tmp_path) == [good], line[:9]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/search"])
def test_metrics_are_not_written_through_links(tmp_path, name):
  theirs = tmp_path / "theirs"
  theirs.mkdir()
  link = tmp_path / "run" / name
  link.parent.mkdir(parents=True)
  if name == "metrics.jsonl":
    (theirs / "file").write_text("kept")
    link.symlink_to(theirs / "file")
  else:
    link.symlink_to(theirs)
  before = runs.files(theirs)
  writer = metrics.MetricsWriter(tmp_path / "run")
  with pytest.raises(errors.UserError, match="link"):
    writer.epochs("search", rows(1, 2))
  assert runs.files(theirs) == before


def test_links_in_a_workdir_make_no_endless_search(tmp_path):
  for name in "abcdefgh":
    (tmp_path / name).symlink_to(".")
  config = config_dict.default_config()
  for _ in range(2):
    with workdir_lib.open_workdir(config, tmp_path) as begun:
      assert not begun


def test_secrets_of_an_address_are_not_in_a_workdir(tmp_path):
  config = config_dict.default_config()
  config.init = "https://me:pw@host/x.npz:img?token=t0k"
  with workdir_lib.open_workdir(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"")
  stored = (tmp_path / "config.json").read_text()
  assert "https://host/x.npz#" in stored
  assert "pw" not in stored and "t0k" not in stored
  files.write_json(tmp_path / "results.json", {})  # It was begun.
  for init in ("https://me:new@host/x.npz:img?token=t0k", config.init):
    config.init = init
    with workdir_lib.open_workdir(config, tmp_path) as begun:
      assert begun
  # Earlier versions stored all of it.
  old = json.loads(stored) | {"init": config.init}
  files.write_json(tmp_path / "config.json", old)
  with workdir_lib.open_workdir(config, tmp_path) as begun:
    assert begun
  assert (tmp_path / "config.json").read_text() == stored
  config.init = "https://me:pw@host/x.npz:img?token=other"
  with pytest.raises(errors.UserError, match="init was") as caught:
    with workdir_lib.open_workdir(config, tmp_path):
      pass
  assert "t0k" not in str(caught.value) and "other'" not in str(caught.value)
