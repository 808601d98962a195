"""All VTAB-1k tasks as one outcome; published numbers beside it."""

import csv
import io
import pathlib

import numpy as np
import pytest

from vqt_jax.data import vtab
from vqt_jax.reports import published
from vqt_jax.reports import vtab_summary
from vqt_jax.runtime import console as console_lib

# Means that were printed (OSU's) or computed (V-PETL Bench's) by others than
# this program, per cent: of groups, of tasks.
PRINTED = {
  ("V-PETL Bench", "full fine-tuning"): (68.97, 65.57),
  ("V-PETL Bench", "linear probing"): (57.64, 52.94),
  ("V-PETL Bench", "BitFit"): (65.22, 62.05),
  ("V-PETL Bench", "VPT-shallow"): (67.82, 64.85),
  ("V-PETL Bench", "VPT-deep"): (71.97, 69.43),
  ("V-PETL Bench", "Adapter"): (73.86, 71.44),
  ("V-PETL Bench", "LoRA"): (74.60, 72.25),
  ("V-PETL Bench", "AdaptFormer"): (74.75, 72.32),
  ("V-PETL Bench", "SSF"): (75.69, 73.10),
  ("V-PETL Bench", "FacT"): (75.55, 73.23),
  ("V-PETL Bench", "NOAH"): (75.48, 73.25),
  ("V-PETL Bench", "RepAdapter"): (76.09, 73.84),
  ("V-PETL Bench", "GPS"): (77.47, 75.18),
  ("V-PETL Bench", "LST"): (74.25, 71.70),
  ("V-PETL Bench", "LAST"): (76.44, 74.15),
  ("V-PETL Bench", "DTL"): (76.76, 74.58),
  ("V-PETL Bench", "HST"): (78.13, 75.99),
  ("OSU unifying study", "full fine-tuning"): (61.85, 58.49),
  ("OSU unifying study", "linear probing"): (60.52, 55.86),
}
PRINTED_GROUPS = {
  "full fine-tuning": (59.70, 78.36, 47.50),
  "linear probing": (68.94, 80.54, 32.07),
}


def results(names=tuple(vtab.VTAB), method="vqt"):
  """Contents of the tasks' `results.json`, as far as they are looked at."""
  found = {}
  for i, name in enumerate(names):
    per_seed = {"7": 0.5 + 0.02 * i, "8": 0.52 + 0.02 * i}
    values = list(per_seed.values())
    found[name] = {
      "task": name,
      "method": method,
      "num_queries": 1 if method == "vqt" else 0,
      "backbone": "ViT-64x4/4 tiny.npz",
      "image_size": [8, 8],
      "value_range": "-1..1",
      "resize": "bilinear",
      "protocol": "full",
      "test_accuracy": {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)),
        "per_seed": per_seed,
        "images": 30,
      },
      "chosen": {"lr": 0.1, "weight_decay": 0.0},
      "trained_parameters": 12345,
      "seconds": {
        "training": 2.0,
        "epoch": None,
        "test": 1.0,
        "process": 4.0,
      },
    }
  return found


def test_published_rows_have_the_means_that_were_printed():
  for row in published.ROWS:
    assert list(sorted(row.accuracy)) == sorted(vtab.VTAB)
    means = vtab_summary.means(row.accuracy)
    groups, tasks = PRINTED[row.source.name, row.method]
    percent = {name: 100 * mean["mean"] for name, mean in means.items()}
    assert percent["mean_of_groups"] == pytest.approx(groups, abs=0.0051)
    assert percent["mean_of_tasks"] == pytest.approx(tasks, abs=0.0051)
    if row.source is published.STUDY:
      printed = PRINTED_GROUPS[row.method]
      for group, expected in zip(vtab.GROUPS, printed, strict=True):
        assert percent[group] == pytest.approx(expected, abs=0.0051)
  assert len(published.ROWS) == len(PRINTED)


def test_the_rows_named_beside_ours_end_with_the_best():
  mean = lambda row: np.mean(list(row.accuracy.values()))
  assert published.familiar()[-1] is max(published.ROWS, key=mean)


def test_means_of_groups_and_of_tasks():
  summary = vtab_summary.summarize(results())
  each = [t["test_accuracy"]["mean"] for t in summary["tasks"].values()]
  groups = np.mean(each[:7]), np.mean(each[7:11]), np.mean(each[11:])
  means = summary["means"]
  assert [means[g]["mean"] for g in vtab.GROUPS] == pytest.approx(groups)
  assert [m["count"] for m in means.values()] == [7, 4, 8, 3, 19]
  assert means["mean_of_groups"]["mean"] == pytest.approx(np.mean(groups))
  assert means["mean_of_tasks"]["mean"] == pytest.approx(np.mean(each))
  assert summary["missing"] == []
  assert summary["seconds"]["training"] == 2 * 19
  assert vtab_summary.labels(summary) == {
    "natural": "natural",
    "specialized": "specialized",
    "structured": "structured",
    "mean_of_groups": "3 groups",
    "mean_of_tasks": "19 tasks",
  }


def test_means_are_over_the_tasks_that_are_there_also_theirs():
  summary = vtab_summary.summarize(results(["kitti", "caltech101", "dtd"]))
  assert list(summary["tasks"]) == ["caltech101", "dtd", "kitti"]
  assert len(summary["missing"]) == 16
  a = {n: t["test_accuracy"]["mean"] for n, t in summary["tasks"].items()}
  natural = (a["caltech101"] + a["dtd"]) / 2
  means = summary["means"]
  assert means["specialized"] == {"mean": None, "count": 0}
  assert means["mean_of_groups"] == {
    "mean": pytest.approx((natural + a["kitti"]) / 2),
    "count": 2,
  }
  assert means["mean_of_tasks"]["count"] == 3
  row = published.ROWS[0]
  theirs = vtab_summary.same_tasks(row, summary)
  assert theirs["mean_of_tasks"]["mean"] == pytest.approx(
    (0.877 + 0.643 + 0.655) / 3
  )
  words = list(vtab_summary.labels(summary).values())
  assert words == [
    "2 natural",
    "0 specialized",
    "1 structured",
    "2 groups",
    "3 tasks",
  ]


def test_csv_has_ours_then_theirs():
  summary = vtab_summary.summarize(results(["caltech101", "kitti"]))
  rows = list(csv.DictReader(io.StringIO(vtab_summary.to_csv(summary))))
  ours = {row["task"]: row for row in rows if row["source"] == "ours"}
  assert list(ours) == [
    "caltech101",
    "kitti",
    "mean of natural",
    "mean of structured",
    "mean of groups",
    "mean of tasks",
  ]
  assert ours["kitti"] == {
    "source": "ours",
    "method": "vqt",
    "backbone": "ViT-64x4/4 tiny.npz",
    "task": "kitti",
    "group": "structured",
    "accuracy_percent": "53.00",
    "std_percent": "1.41",
    "interval_low_percent": "35.84",
    "interval_high_percent": "69.48",
    "seeds": "2",
    "tasks": "1",
    "num_queries": "1",
    "trained_parameters": "12345",
    "training_seconds": "2",
  }
  assert ours["mean of tasks"]["accuracy_percent"] == "52.00"
  assert ours["mean of tasks"]["tasks"] == "2"
  theirs = [row for row in rows if row["source"] != "ours"]
  assert len(theirs) == len(published.ROWS) * (19 + 4)
  assert all("ImageNet-21k" in row["backbone"] for row in theirs)
  full = {r["task"]: r["accuracy_percent"] for r in theirs[:23]}
  assert (full["cifar100"], full["caltech101"]) == ("68.90", "87.70")
  assert full["mean of tasks"] == "76.60"


@pytest.mark.parametrize("method", ["vqt", "linear"])
def test_the_table_on_the_screen(method):
  stream = io.StringIO()
  summary = vtab_summary.summarize(results(["caltech101", "dtd"], method))
  vtab_summary.show(
    console_lib.Console(stream), pathlib.Path("runs/vtab"), summary
  )
  lines = [line.split() for line in stream.getvalue().splitlines()]
  queries = ["1"] if method == "vqt" else []
  assert [
    "caltech101",
    "51.00",
    "+-",
    "1.41",
    "%",
    "34.0",
    "to",
    "67.7",
    *queries,
    "12,345",
    "2",
  ] in lines
  assert ["sun397", "not", "prepared"] in lines
  assert [method, "52.00", "52.00", "52.00"] in lines
  assert ["linear", "probing", "*", "74.10", "74.10", "74.10"] in lines
  assert "* theirs, not ours: V-PETL Bench" in stream.getvalue()
  assert lines[-1][1:] == [
    "runs/vtab/results.json",
    "report.html",
    "vtab.csv",
    "vtab.png",
  ]
