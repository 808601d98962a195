"""All tasks in one command, of a table with three tiny ones."""

import re
import signal

import pytest

import main
from tests import runs
from vqt_jax import data
from vqt_jax.config import config_dict
from vqt_jax.data import labels
from vqt_jax.data import vtab
from vqt_jax.training import workdir as workdir_lib

CHANGES = dict(
  task="all",
  splits__train="",
  splits__val="",
  splits__test="",
  lr=0.1,
  keep_fraction=1.0,
)
DONE = {"caltech101", "kitti"}


def squares(name, **changes):
  """The task of that name, if it were as small as our squares."""
  return data.TfdsTask(
    **{
      "name": name,
      "group": vtab.VTAB[name].group,
      "builder": "squares:*.*.*",
      "num_classes": runs.CLASSES,
      "splits": {
        "train": "train[:40]",
        "val": "train[40:]",
        "trainval": "train",
        "test": "test",
      },
      "label": labels.feature("label"),
      **changes,
    }
  )


@pytest.fixture(autouse=True)
def table(monkeypatch):
  """The middle one is not prepared."""
  names = ("caltech101", "eurosat", "kitti")
  tasks = {name: squares(name) for name in names}
  tasks["eurosat"] = vtab.VTAB["eurosat"]
  monkeypatch.setattr(vtab, "VTAB", tasks)
  return tasks


@pytest.fixture
def start(material, capfd):
  """Runs the command; returns its status and the lines it said."""

  def start(workdir, **changes):
    argv = runs.command(material, workdir, **(CHANGES | changes))
    status = main.main(argv)
    out, said = capfd.readouterr()
    assert out == ""
    return status, [line.rstrip() for line in said.splitlines()]

  return start


def test_all_tasks(start, table, material, tmp_path, monkeypatch):
  workdir, alone = tmp_path / "all", tmp_path / "alone"
  with monkeypatch.context() as patch:  # When the first task is done.
    report = "vqt_jax.reports.run_figure:report"
    runs.signal_on_call(patch.setattr, report, 1, signal.SIGTERM)
    status, said = start(workdir)
  assert (status, said[-1]) == (75, runs.STOPPED)
  assert said[0] == (
    "missing  1 of 3 tasks are not prepared in"
    f" {material}: eurosat. To add them: python -m vqt_jax.data.prepare"
    f" eurosat/rgb --data_dir {material}, then the same command again."
  )
  assert said[1] == "task     1 of 2: caltech101"
  assert runs.results(workdir / "caltech101")["num_queries"] == 1
  assert not (workdir / "kitti" / "metrics.jsonl").exists()

  with monkeypatch.context() as patch:  # Within the second.
    rows = "vqt_jax.training.stages:_rows"
    runs.signal_on_call(patch.setattr, rows, 2, signal.SIGTERM)
    status, said = start(workdir)
  assert (status, said[-1]) == (75, runs.STOPPED)
  assert said[1:3] == [
    "task     1 of 2: caltech101 is finished already",
    "task     2 of 2: kitti",
  ]
  assert not (workdir / "results.json").exists()

  status, said = start(workdir)
  assert status == 0 and any("after epoch" in line for line in said)
  found = runs.results(workdir)
  assert found["tasks"].keys() == DONE and found["missing"] == ["eurosat"]
  for name in DONE:
    own = runs.results(workdir / name)
    assert found["tasks"][name]["test_accuracy"] == own["test_accuracy"]
  assert {path.name for path in workdir.iterdir()} == DONE | {
    "config.json",
    "log.txt",
    "report.html",
    "results.json",
    "vtab.csv",
    "vtab.png",
  }
  assert ["eurosat", "not", "prepared"] in [line.split() for line in said]
  page = (workdir / "report.html").read_text()
  links = re.findall('href="([^"]*)/report.html"', page)
  assert set(links) == {p.parent.name for p in workdir.glob("*/report.html")}
  assert set(links) == DONE

  assert start(alone, task="kitti")[0] == 0
  assert runs.bits(workdir / "kitti") == runs.bits(alone)
  config = runs.read_json(alone / "config.json")
  assert config["num_queries"] == 20
  assert runs.read_json(workdir / "kitti" / "config.json") == config
  before = runs.files(workdir / "kitti")

  table["eurosat"] = squares("eurosat", group="specialized")
  status, said = start(workdir)
  assert status == 0 and "task     2 of 3: eurosat" in said
  found = runs.results(workdir)
  assert list(found["tasks"]) == list(table) and not found["missing"]
  assert found["means"]["mean_of_tasks"]["count"] == 3
  assert "missing" not in "\n".join(said)
  assert runs.files(workdir / "kitti") == before

  # Finished ones need no data, but another config needs another folder.
  assert start(workdir, data_dir=tmp_path / "none")[0] == 0
  status, said = start(workdir, epochs=4)
  assert status == 2
  assert "all holds a run of another config: epochs was 3, is" in said[-1]


def test_none_is_prepared(start, table, tmp_path):
  del table["caltech101"]
  table["kitti"] = squares("kitti", builder="kitti:*.*.*")
  status, said = start(tmp_path / "all", data_dir=tmp_path)
  assert status == 2 and len(said) == 1
  assert said[0].startswith("error: 2 of 2 tasks are not prepared in")
  assert f"prepare eurosat/rgb kitti --data_dir {tmp_path}," in said[0]


def test_the_folder_of_a_task_holds_another_run(start, tmp_path):
  """Said before anything is trained."""
  folder, config = tmp_path / "kitti", config_dict.default_config()
  config.task = "dtd"
  with workdir_lib.open_workdir(config, folder):
    (folder / "results.json").write_text("{}")
  status, said = start(tmp_path)
  assert status == 2 and len(said) == 1
  assert f"{folder} holds a run of another config: " in said[0]


def test_damaged_data_is_said_before_anything_is_trained(
  start, table, tmp_path
):
  table["kitti"] = squares(
    "kitti",
    splits={
      "train": "train",
      "val": "train",
      "trainval": "train",
      "test": "nope",
    },
  )
  status, said = start(tmp_path)
  assert status == 2 and len(said) == 1
  assert "Split 'nope' (test of 'kitti') cannot be read" in said[0]


def test_its_workdir_is_no_run_to_compare(tmp_path, capsys):
  from vqt_jax import compare

  (tmp_path / "results.json").write_text('{"tasks": {"dtd": {}}}')
  assert compare.main(["compare", str(tmp_path)]) == 2
  assert f"e.g. {tmp_path / 'dtd'}." in capsys.readouterr().err
