"""Several methods on one task: their runs, table, file and picture."""

import csv
import io
import json
import re
import signal

import matplotlib.text
import numpy as np
import pytest

from configs import compare as compare_config
from configs import digits
import main
from tests import helpers
from tests import runs
from vqt_jax import accuracy
from vqt_jax import compare as compare_compare
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.config import resolve
from vqt_jax.models import methods
from vqt_jax.reports import compare
from vqt_jax.reports import compare_figure
from vqt_jax.reports import compare_report
from vqt_jax.reports import style
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import memory

METHODS = ("linear", "vqt", "lora")
CHANGES = dict(settings=2, keep_fraction=1.0)


def outcome(method="vqt", accuracy=0.9, peak=2**30, task="digits", queries=1):
  """What a comparison needs of a `results.json`."""
  seeds = {str(seed): accuracy + seed / 100 for seed in (-1, 0, 1)}
  return {
    "method": method,
    "task": task,
    "backbone": "ViT-64x4/4 /folder/tiny.npz",
    "weights": "a" * 64,
    "image_size": [8, 12],
    "value_range": "-1..1",
    "resize": "bilinear",
    "pool_type": "tok",
    "gelu": "tanh",
    "dtype": "float32",
    "data": {
      "dataset": f"{task}/1.0.0",
      "num_classes": 10,
      "sha256": "b" * 64,
      "splits": {
        split: {"slices": f"{split}[:1%]", "images": 1797}
        for split in data.SPLITS
      },
    },
    "device": "1 x cpu",
    "num_queries": queries if "vqt" in method else 0,
    "test_accuracy": {
      "mean": accuracy,
      "std": 0.01,
      "per_seed": seeds,
      "images": 400,
    },
    "chosen": {"lr": 0.1, "weight_decay": 1e-4, "keep_fraction": 1.0},
    "search": {"runs": [{}] * 4},
    "trained_parameters": 12345,
    "memory": {"peak_bytes": peak, "step_bytes": 3 * 2**20, "side_by_side": 5},
    "seconds": {"training": 6.7, "epoch": 0.125},
    "tuned_bytes": 2048,
  }


def read_csv(text):
  return list(csv.DictReader(io.StringIO(text)))


def started(material, workdir, capfd, **changes):
  """Runs the command; returns its status and the lines it said."""
  argv = runs.command(material, workdir, **(CHANGES | changes))
  status = main.main(argv)
  out, said = capfd.readouterr()
  assert out == ""
  return status, [line.rstrip() for line in said.splitlines()]


def assert_paired(workdir, entries):
  """Differences are those of the predictions, image by image."""
  right = {}
  for name in entries:
    own = results_lib.read_predictions(
      workdir / name, runs.results(workdir / name)
    )
    right[name] = (own.predicted == own.label).mean(axis=0)
  best, *others = entries
  assert entries[best]["difference"] is None
  for name in others:
    found = entries[name]["difference"]
    expected = accuracy.paired_difference(right[name], right[best])
    assert found["paired"] and found["images"] == pytest.approx(expected)
    low, high = expected
    assert low <= found["mean"] <= high
  page = (workdir / "report.html").read_text()
  assert "paired by image)" in page and "Newcombe" not in page
  links = re.findall('<a href="([^"]*)/report.html"', page)
  assert sorted(links) == sorted(entries)


def test_methods_are_compared(material, tmp_path, monkeypatch, capfd):
  workdir = tmp_path / "all"
  names = ",".join(METHODS)
  with monkeypatch.context() as patch:  # Within the second.
    rows = "vqt_jax.training.stages:_rows"
    runs.signal_on_call(patch.setattr, rows, 10, signal.SIGTERM)
    status, said = started(material, workdir, capfd, methods=names)
  assert (status, said[-1]) == (75, runs.STOPPED)
  assert said[0] == "method   1 of 3: linear"
  assert (workdir / "linear" / "results.json").exists()
  assert not (workdir / "vqt" / "results.json").exists()

  status, said = started(material, workdir, capfd, methods=names)
  assert status == 0
  assert said[0] == "method   1 of 3: linear is finished already"
  assert runs.results(workdir / "lora")["memory"]["side_by_side"] == 1

  summary = runs.results(workdir)
  assert set(summary["runs"]) == set(METHODS)
  assert {path.name for path in workdir.iterdir()} == {
    *METHODS,
    "attention_vqt.png",
    "compare.csv",
    "compare.png",
    "config.json",
    "log.txt",
    "report.html",
    "results.json",
  }
  assert said[-1] == (
    f"results  {workdir / 'report.html'}   compare.csv   compare.png  "
    " attention_vqt.png"
  )
  rows = read_csv((workdir / "compare.csv").read_text())
  assert [row["run"] for row in rows] == list(summary["runs"])
  for row in rows:
    own = runs.results(workdir / row["run"])
    weights = workdir / row["run"] / "tuned" / "model.safetensors"
    size = weights.stat().st_size // 2  # Of two seeds.
    assert int(row["tuned_bytes"]) == own["tuned_bytes"] == size
    assert int(row["peak_bytes"]) == own["memory"]["peak_bytes"] > 2**27
    assert 2**12 < int(row["step_bytes"]) == own["memory"]["step_bytes"]
    assert float(row["epoch_seconds"]) == own["seconds"]["epoch"] > 0
    assert int(row["settings"]) == 2
  assert_paired(workdir, summary["runs"])

  # One more method joins those that are finished; other changes do not, but of
  # what only other methods use.
  before = runs.files(workdir / "vqt")
  (workdir / "vqt" / "report.html").unlink()  # Written again.
  status, said = started(material, workdir, capfd, methods="vqt,linear", rank=2)
  assert status == 0 and said[:3] == [
    "note     rank is not used by vqt, linear",
    "method   1 of 2: vqt is finished already",
    "method   2 of 2: linear is finished already",
  ]
  assert runs.files(workdir / "vqt") == before
  status, said = started(material, workdir, capfd, methods=names, rank=2)
  assert status == 2 and len(said) == 1
  lora = workdir / "lora"
  assert f"{lora} holds a run of another config: rank was 8" in said[0]
  status, said = started(material, workdir, capfd, methods=names, epochs=4)
  assert status == 2 and len(said) == 1
  assert f"{workdir} holds a run of another config: epochs was 3" in said[0]
  vqt = workdir / "vqt"  # What a single run leaves is no comparison.
  status, said = started(material, vqt, capfd, methods="vqt,linear")
  assert status == 2 and " method was 'vqt', is now ''" in said[0]


@pytest.mark.parametrize(
  "arg, words",
  [
    ("methods=", "names no method: expected e.g. methods=linear,vqt"),
    ("methods=linear,vqtt", "Unknown config.methods 'vqtt'. Did you mean"),
    ("methods=vqt+lra", "Unknown editor of config.methods 'lra'."),
    ("methods=vqt,linear,vqt", "names vqt twice"),
    ("methods=vqt,tsk=dtd", "'tsk'. Did you mean task?"),
    ("linear,vqt", "Unknown config argument 'linear'"),
    ("methods=vqt,settings=few", "expected settings=value, with a whole"),
    ("methods=vqt,task=all", "to compare config.methods=vqt, name one"),
  ],
)
def test_what_is_refused(arg, words, tmp_path, capsys):
  argv = ["main.py", f"--config=configs/compare.py:{arg}"]
  assert main.main([*argv, f"--workdir={tmp_path / 'new'}"]) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"method": "lora"}, "give one of them"),
    ({"preset": "authors"}, "depends on the method"),
    ({"features": "host"}, "config.method=lora changes the stream"),
  ],
)
def test_what_does_not_go_with_methods(changes, words):
  config = compare_config.get_config("methods=vqt,lora")
  config.update(changes)
  with pytest.raises(errors.UserError, match=words):
    resolve.resolve(config, keep=tuple(changes))


def test_a_comparison_has_the_configs_of_single_runs():
  arg = "methods=linear,vqt, lora,task=digits,settings=3"
  config = compare_config.get_config(arg)
  config.solver = "gradient"
  config = resolve.resolve(config)
  assert config.methods == "linear,vqt,lora"
  assert resolve.resolve(config) == config
  for method, rates in {
    "linear": (2.0, 0.5, 0.1),
    "lora": (5e-3, 5e-4, 1e-4),
  }.items():
    alone = digits.get_config(f"method={method}")
    alone.settings, alone.solver = 3, config.solver
    alone = resolve.resolve(alone)
    assert resolve.config_for(config, method=method) == alone
    assert (alone.lr, alone.weight_decay) == (rates, (1e-4,))
  assert alone.image_size == 28


def test_a_solver_is_for_the_methods_that_have_it():
  for solver, others in (("gradient", "instant"), ("exact", "vqt")):
    names = f"linear,{others}"
    config = resolve.resolve({"methods": names, "solver": solver})
    found = [resolve.config_for(config, method=x) for x in names.split(",")]
    own = resolve.resolve({"method": others}).solver
    assert [each.solver for each in found] == [solver, own]


def test_all_methods():
  config = compare_config.get_config("task=dtd,variant=S/16")
  config = resolve.resolve(config)
  assert config.init == "howto-i21k-S/16" and config.task == "dtd"
  names = config.methods.split(",")
  assert set(methods.NAMES + methods.PAIRS) == set(names)


@pytest.mark.parametrize(
  "count, rates",
  [
    (1, (1.0,)),
    (2, (100.0, 0.01)),
    (3, (100.0, 1.0, 0.01)),
    (4, (100.0, 10.0, 0.1, 0.01)),
    (5, (100.0, 10.0, 1.0, 0.1, 0.01)),
    (9, (100, 31.6, 10, 3.16, 1, 0.316, 0.1, 0.0316, 0.01)),
  ],
)
def test_settings_are_spread_evenly(count, rates):
  assert resolve.choose_rates((100.0, 10.0, 1.0, 0.1, 0.01), count) == rates


def test_peak_memory():
  peak = memory.PeakMemory()
  held = np.ones(2**25)  # 256 MiB
  high = peak.bytes()
  assert high >= peak.start + 0.9 * held.nbytes
  del held
  assert peak.bytes() >= high
  again = memory.PeakMemory()
  assert again.bytes() < high - 2**27
  again.include(2 * high)  # What was found before the run was resumed.
  assert again.bytes() == 2 * high


def test_the_mark_of_an_earlier_run_is_not_taken_for_this_ones(monkeypatch):
  marks = {"bytes_in_use": 5, "peak_bytes_in_use": 100}
  device = type("Device", (), {"memory_stats": lambda self: marks})
  monkeypatch.setattr(memory.jax, "local_devices", lambda: [device()])
  monkeypatch.setattr(memory, "_reset_peak", lambda: False)
  peak = memory.PeakMemory()
  assert (peak.start, peak.bytes()) == (5, None)
  marks["peak_bytes_in_use"] = 120
  assert peak.bytes() == 120


def test_table_and_file(tmp_path, capsys):
  old = outcome("lora", 0.7)  # Of a program that did not measure.
  del old["memory"], old["tuned_bytes"], old["seconds"]["epoch"]
  del old["data"], old["weights"], old["test_accuracy"]["images"]
  for name, found in {"a": outcome(), "b": old}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(found))
  old["method"] = "linear"
  summary = compare.summarize({"b": old, "a": outcome()})
  assert list(summary["runs"]) == ["a", "b"]
  rows = read_csv(compare.to_csv(summary))
  assert [row["accuracy_percent"] for row in rows] == ["90.00", "70.00"]
  assert (rows[0]["peak_bytes"], rows[1]["peak_bytes"]) == (str(2**30), "")
  assert (
    compare_compare.main(
      ["compare", str(tmp_path / "b"), f"--output={tmp_path}"]
    )
    == 0
  )
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].split()[:3] == ["digits", "test", "accuracy"]
  assert lines[1].split()[:4] == ["lora", "70.00", "+-", "1.00"]
  assert lines[1].count("unknown") == 6
  assert lines[2].startswith("results")  # A single run differs from nothing.


@pytest.mark.parametrize("why", ["kept no predictions", "other labels"])
def test_runs_that_cannot_be_paired(tmp_path, why):
  """Their interval is that of independent predictions; the page says so."""
  found = {"a": outcome(accuracy=0.8), "b": outcome("lora", 0.6)}
  label = np.zeros(400, int)
  answers = {
    name: results_lib.Predictions(label, np.zeros((3, 400), int))
    for name in found
  }
  assert compare.summarize(found, answers)["runs"]["b"]["difference"]["paired"]
  answers["b"] = (
    answers["b"]._replace(label=label + 1) if why == "other labels" else None
  )
  summary = compare.summarize(found, answers)
  assert summary["runs"]["b"]["difference"] == {
    "mean": pytest.approx(-0.2),
    "seeds": pytest.approx((-0.2, -0.2)),
    "images": accuracy.difference(
      *(found[name]["test_accuracy"] for name in "ba")
    ),
    "paired": False,
  }
  workdirs = {name: tmp_path / name for name in found}
  compare_report.report(tmp_path / "report.html", summary, "", workdirs)
  page = (tmp_path / "report.html").read_text()
  assert "Not paired by image" in page and "paired by image)" not in page
  found["b"]["data"]["sha256"] = "c" * 64
  assert compare.summarize(found)["runs"]["b"]["difference"] is None


def test_reports_below_the_page_are_linked(tmp_path):
  """A folder with both can be moved; other runs may be anywhere."""
  output = tmp_path / "out"
  workdirs = {"a": output / "a: b?", "b": tmp_path / "b", "c": output / "c"}
  for name in "ab":
    workdirs[name].mkdir(parents=True)
    (workdirs[name] / "report.html").touch()
  summary = compare.summarize(dict.fromkeys(workdirs, outcome()))
  compare_report.report(output / "report.html", summary, "", workdirs)
  page = (output / "report.html").read_text()
  assert re.findall('<a href="([^"]*)"', page) == ["a%3A%20b%3F/report.html"]


def test_one_seed_has_no_deviation(capsys):
  found = outcome(accuracy=0.7)
  found["test_accuracy"] |= {"per_seed": {"7": 0.7}, "std": 0.0}
  summary = compare.summarize({"a": found})
  compare.show(console_lib.Console(), summary)
  _, line = capsys.readouterr().err.splitlines()
  assert line.split()[:7] == ["vqt,", "T=1", "70.00", "%", "65.3", "to", "74.3"]
  (row,) = read_csv(compare.to_csv(summary))
  assert (row["std_percent"], row["accuracy_percent"]) == ("", "70.00")
  assert row["interval_low_percent"] == "65.34"
  assert row["interval_high_percent"] == "74.28"


def test_what_runs_do_not_have_in_common_is_said(capsys):
  same, other, old = outcome(), outcome("lora", 0.8), outcome("linear", 0.7)
  summary = compare.summarize({"a": same, "b": other})
  assert summary["differences"] == {}
  assert compare.describe_differences(summary) == ""
  other["image_size"], other["dtype"] = [16, 16], "bfloat16"
  other["backbone"] = "ViT-64x4/4 /elsewhere/tiny.npz"  # The same weights.
  other["data"]["splits"]["test"]["slices"] = "test[:200]"
  del old["data"], old["dtype"], old["weights"]  # Of an earlier program.
  summary = compare.summarize({"a": same, "b": other, "c": old})
  compare.show(console_lib.Console(), summary)
  *_, said = capsys.readouterr().err.splitlines()
  assert said == (
    "differ   not the same in all runs: backbone ViT-64x4/4 /folder/tiny.npz"
    " (a, c), ViT-64x4/4 /elsewhere/tiny.npz (b); image size 8x12 (a, c),"
    " 16x16 (b); dtype float32 (a), bfloat16 (b), unknown (c); test split"
    " test[:1%], 1,797 images (a), test[:200], 1,797 images (b), unknown (c);"
    " not known of c: weights, dataset, classes, contents of the dataset,"
    " train split, val split, trainval split"
  )
  rows = read_csv(compare.to_csv(summary))
  assert [row["image_size"] for row in rows] == ["8x12", "16x16", "8x12"]
  assert [row["dtype"] for row in rows] == ["float32", "bfloat16", ""]
  assert [row["dataset"] for row in rows] == ["digits/1.0.0"] * 2 + [""]
  assert rows[0]["test_split"] == "test[:1%], 1,797 images"
  assert (rows[0]["weights"], rows[2]["weights"]) == ("a" * 64, "")
  # Of two files that are called alike the weights tell.
  other = outcome() | {"weights": "c" * 64}
  told = compare.describe_differences(
    compare.summarize({"a": same, "b": other})
  )
  where = "of ViT-64x4/4 /folder/tiny.npz"
  assert told == (
    f"not the same in all runs: weights aaaaaaaa {where} (a), cccccccc"
    f" {where} (b)"
  )


def test_runs_of_one_method_are_told_apart():
  found = {"a": outcome("vqt"), "b": outcome("vqt"), "c": outcome("linear")}
  told = {
    name: run["details"]
    for name, run in compare.summarize(found)["runs"].items()
  }
  assert told["a"].endswith(", a") and told["b"].endswith(", b")
  assert not told["c"].endswith(", c")
  found["a"]["task"] = "dtd"
  told = compare.summarize(found)["runs"]
  assert told["a"]["details"].endswith(", dtd")
  assert told["b"]["details"].endswith(f", {found['b']['task']}")


def test_runs_that_are_called_alike_get_longer_names(
  tmp_path, monkeypatch, capsys
):
  paths = [compare.files.path(p) for p in ("x/vqt", "y/vqt")]
  assert list(compare_compare.workdir_names(paths)) == ["x_vqt", "y_vqt"]
  monkeypatch.chdir(tmp_path)
  paths = [compare.files.path(p) for p in (".", "x/../vqt")]
  assert list(compare_compare.workdir_names(paths)) == [tmp_path.name, "vqt"]
  assert compare_compare.main(["compare", "x/vqt", "x/vqt"]) == 2
  assert "The same run is given twice." in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 20])
def test_picture(tmp_path, pictures, count):
  names = [*methods.NAMES, "vqt+lora", *methods.NAMES]
  outcomes = {
    f"{i} {name}": outcome(name, 0.8 + i / 200, (2**28) * (1 + i % 5))
    for i, name in enumerate(names[:count])
  }
  outcomes[f"{count - 1} {names[count - 1]}"]["memory"] = None
  path = tmp_path / "compare.png"
  summary = compare.summarize(outcomes)
  assert style.backbone_name(summary["backbone"]) == "ViT-64x4/4 tiny.npz"
  compare_figure.draw(summary, path)
  assert helpers.colours(path) > 400  # Words alone have half as many.


def test_numbers_in_the_picture_do_not_overlap(tmp_path):
  """Thirteen points that nearly coincide."""
  figure = style.figure_of(14, 6)
  ax = figure.subplots()
  outcomes = [outcome(accuracy=0.9 + i / 1e4) for i in range(13)]
  values = [1000 + i for i in range(13)]
  compare_figure._against(ax, outcomes, values, "", compare_figure.UNITS)
  figure.draw_without_rendering()
  compare_figure.number_points(ax, outcomes, values)
  figure.draw_without_rendering()
  extent = matplotlib.text.Text.get_window_extent  # Without its line.
  boxes = [extent(text) for text in ax.texts]
  assert len(boxes) == 13
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])
