"""Pictures are drawn from results of every shape."""

import numpy as np
import pytest

from tests import helpers
from tests.reports import test_vtab_summary
from vqt_jax import accuracy as accuracy_lib
from vqt_jax import errors
from vqt_jax.data import vtab
from vqt_jax.reports import attention_figure
from vqt_jax.reports import run_figure
from vqt_jax.reports import vtab_figure
from vqt_jax.reports import vtab_summary


def outcome(
  method="vqt",
  num_queries=2,
  seeds=3,
  settings=4,
  task="digits",
  best=False,
  selected=False,
  fractions=False,
):
  """Contents of a `results.json`."""
  accuracy = np.linspace(0.8, 0.9, seeds)
  runs = [
    {"lr": 0.1 * (1 + i % 2), "weight_decay": 0.01 * (i // 2), "seed": 1}
    for i in range(settings)
  ]
  search = {
    "chosen": settings - 1,
    "runs": runs,
    "val_accuracy": np.linspace(0.5, 0.6, settings).tolist(),
    "diverged": [0],
  }
  test = accuracy_lib.summary(range(seeds), accuracy.tolist(), 797)
  tested = ["all"] + ["selected"] * selected
  tested += ["best_" + name for name in tested] * best
  return {
    "task": task,
    "method": method,
    "num_queries": num_queries if method == "vqt" else 0,
    "backbone": "ViT-64x4/4 tiny.npz",
    "test_accuracy": test,
    "chosen": {"lr": 0.2, "weight_decay": 0.01, "keep_fraction": 1.0},
    "tested": [
      {
        "name": name,
        "test_accuracy": test,
        "trained_parameters": 12345,
        "training_seconds": 6.7,
        "kept_share": [1, 0.5, 0.2] if "selected" in name else None,
      }
      for name in tested
    ],
    "selection": {
      "keep_fractions": [
        {"keep_fraction": x, "val_accuracy": x} for x in (0.1, 0.5)
      ],
      "chosen": 0.5,
    }
    if fractions
    else None,
    "best": _best(method) if best else None,
    "search": search if settings > 1 else None,
    "seeds": {
      "runs": [{"seed": s} for s in range(seeds)],
      "history": [
        {"loss": [1 / (e + 1)] * seeds, "accuracy": [0.1 * e] * seeds}
        for e in range(5)
      ],
    },
    "trained_parameters": 12345,
    "device": "1 x cpu",
  }


def _best(method):
  """What a wider search has found."""
  setting = {"lr": 0.1, "weight_decay": 0.01}
  if method == "vqt":
    setting |= {"num_queries": 2, "query_dropout": 0.1, "normalize": False}
  other = setting | {"lr": 0.2}
  fractions = (0.5, 1.0) if method == "vqt" else (1.0,)
  wide = [{**setting, "lr": 0.1 * n, "val_accuracy": 0.1 * n} for n in (1, 2)]
  beyond = [{**setting, "lr": 0.1 * n, "val_accuracy": None} for n in (4, 8)]
  return {
    "searched": 60,
    "tried": [
      *({**each, "extended": False} for each in wide),
      *({**each, "extended": True} for each in beyond),
    ],
    "folds": 5,
    "finalists": [
      {**setting, "val_accuracy": 0.8, "cv_accuracy": 0.7, "full": False},
      {**other, "val_accuracy": None, "cv_accuracy": 0.8, "full": True},
    ],
    "keep_fractions": [
      {"keep_fraction": x, "cv_accuracy": 0.7 + x / 10} for x in fractions
    ],
    "chosen": {**other, "keep_fraction": 1.0},
  }


def drawn(path):
  """Whether a picture has more than a few colours."""
  return helpers.colours(path) > 400  # Words alone have half as many.


@pytest.mark.parametrize("seeds, settings", [(3, 4), (1, 1), (2, 2)])
def test_report(tmp_path, seeds, settings):
  path = tmp_path / "report.png"
  run_figure.report(outcome(seeds=seeds, settings=settings), path)
  assert drawn(path)


@pytest.mark.parametrize(
  "changes",
  [
    {"selected": True},
    {"method": "head2toe", "fractions": True, "selected": True},
    {"best": True, "selected": True},
    {"best": True, "method": "linear"},
  ],
  ids=str,
)
def test_report_of_more_than_one_candidate(tmp_path, changes):
  path = tmp_path / "report.png"
  run_figure.report(outcome(**changes), path)
  assert drawn(path)


@pytest.mark.parametrize("names", [tuple(vtab.VTAB), ("dtd", "kitti")])
def test_vtab(tmp_path, names):
  path = tmp_path / "vtab.png"
  results = test_vtab_summary.results(names)
  vtab_figure.vtab(vtab_summary.summarize(results), path)
  assert drawn(path)


def test_attention(tmp_path):
  path = tmp_path / "attention.png"
  images = np.linspace(0, 1, 2 * 12 * 8 * 3).reshape(2, 12, 8, 3)
  maps = np.linspace(0, 1, 2 * 14 * 3 * 2).reshape(2, 14, 3, 2)
  attention_figure.attention(images, maps, ["3", "7"], path)
  assert drawn(path)


def test_a_picture_that_cannot_be_written(tmp_path):
  (tmp_path / "report.png").mkdir()
  with pytest.raises(errors.UserError, match="Cannot write .*report.png"):
    run_figure.report(outcome(), tmp_path / "report.png")
