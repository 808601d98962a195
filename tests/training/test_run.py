"""Whole runs through `main.py`, in this process, on four fake devices."""

import contextvars
import shutil
import signal

import jax
import numpy as np
import pytest

import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax import cli
from vqt_jax import data
from vqt_jax import results as results_lib
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.features import batches as batches_lib
from vqt_jax.models import scaling
from vqt_jax.reports import notable
from vqt_jax.reports import run_pictures
from vqt_jax.runtime import locks
from vqt_jax.training import optim
from vqt_jax.tuned import bundle

SEEDS = (7, 8)
EPOCHS = 3
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(material, tmp_path_factory):
  """Runs the command with changes, once; returns the workdir."""
  finished = {}

  def run(**changes):
    name = repr(changes)
    if name not in finished:
      workdir = tmp_path_factory.mktemp("run")
      assert main.main(runs.command(material, workdir, **changes)) == 0
      finished[name] = workdir
    return finished[name]

  return run


@pytest.fixture(scope="module")
def task(material):
  splits = {"train": "train[:40]", "val": "train[40:]"}
  return data.make_task("squares", data_dir=str(material), splits=splits)


def recount(workdir, task):
  """Labels and answers of the test, from the shipped weights and NumPy."""
  model = vqt_jax.load(workdir)
  examples = data.load_arrays(
    task,
    "test",
    image_size=model.backbone.config.image_size,
    value_range=model.backbone.value_range,
  )
  predicted = np.argmax(model.logits(examples["image"]), axis=-1)
  together = model.predict_proba(examples["image"])
  return examples["label"], predicted, together


def test_what_a_run_leaves_behind(run, material):
  workdir = run()
  assert {path.name for path in workdir.iterdir()} == {
    "checkpoints",
    "config.json",
    "log.txt",
    "metrics.jsonl",
    "report.html",
    "report.png",
    "results.json",
    "tensorboard",
    "test_predictions.safetensors",
    "tuned",
  }
  assert (workdir / "report.png").read_bytes().startswith(PNG)
  events = sorted((workdir / "tensorboard").glob("*/*/events*"))
  phases = [path.parts[-3] for path in events]
  assert phases == ["report", *sorted(["search", "seeds", "test_all"] * 2)]
  values = cli.parse(runs.command(material, workdir))
  resolved = config_dict.to_json(resolve.resolve(values.config))
  assert runs.read_json(workdir / "config.json") == resolved

  rows = runs.metrics(workdir)
  assert [(r["phase"], r["epoch"], r["run"]) for r in rows] == [
    (phase, epoch, run)
    for phase in ("search", "seeds")
    for epoch in range(1, EPOCHS + 1)
    for run in range(2)
  ]
  for row in rows:
    size = 40 if row["phase"] == "search" else 48
    right = row["accuracy"] * size
    assert right == pytest.approx(round(right))
    assert row["loss"] > 0

  found = runs.results(workdir)
  test = found["test_accuracy"]
  each = [test["per_seed"][str(seed)] for seed in SEEDS]
  assert test["images"] == 30
  classes = found["test_classes"]
  assert sum(classes["images"]) == 30
  assert sum(classes["predicted"]) == 30 * len(SEEDS)
  right = sum(classes["right"])
  assert right / (30 * len(SEEDS)) == pytest.approx(test["mean"])
  assert test["mean"] == pytest.approx(np.mean(each))
  assert test["std"] == pytest.approx(np.std(each, ddof=1))
  c = helpers.tiny_config()
  features = c.width * (1 + c.depth)
  assert found["trained_parameters"] == (
    c.depth * c.width + (features + 1) * runs.CLASSES
  )
  assert min(found["seconds"].values()) > 0
  assert found["versions"]["jax"] == jax.__version__
  assert found["device"] == "4 x cpu"


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"keep_fraction": 0.5},
    {"method": "linear", "data": "stream", "batch_size": 16},
    {
      "method": "head2toe+ssf",
      "keep_fraction": 0.3,
      "lr": "0.1,",
      "image_width": 12,
    },
  ],
  ids=str,
)
def test_answers_are_those_of_the_shipped_weights(run, task, changes):
  """In the order of the test set, and so are the accuracies."""
  workdir = run(**changes)
  found = runs.results(workdir)
  label, predicted, together = recount(workdir, task)
  answers = results_lib.read_predictions(workdir, found)
  np.testing.assert_array_equal(answers.label, label)
  np.testing.assert_array_equal(answers.predicted, predicted)
  np.testing.assert_array_equal(answers.together, together.argmax(axis=-1))
  helpers.assert_close(answers.probability, together.max(axis=-1))
  shares = (predicted == label).mean(axis=1)
  per_seed = found["test_accuracy"]["per_seed"]
  assert per_seed == dict(zip(map(str, SEEDS), shares))
  ensemble = found["test_ensemble_accuracy"]["mean"]
  assert ensemble == pytest.approx(np.mean(answers.together == label))


def test_the_report_has_the_images_that_it_names(run, task, pictures):
  """With the attention in them, and only if they are those of the run."""
  workdir = run()
  found, config = (
    runs.read_json(workdir / name) for name in ("results.json", "config.json")
  )
  predictions = results_lib.read_predictions(workdir, found)
  shown = run_pictures.read(workdir, found, config, predictions)
  shown = run_pictures.add_attention(shown, workdir, config)
  wrong = predictions.together != predictions.label
  count = min(notable.COUNT, wrong.sum())
  assert len(shown) == count + notable.COUNT
  read = dict(image_size=(8, 8), value_range=found["value_range"])
  images = data.load_arrays(task, "test", **read)["image"]
  look = vqt_jax.load(workdir).attention_maps
  for i, (answer, image, attention) in enumerate(shown):
    at = int(answer.name)
    assert answer.true == predictions.label[at]
    assert answer.predicted == predictions.together[at]
    assert answer.confidence == predictions.probability[at]
    assert wrong[at] == (i < count)
    np.testing.assert_array_equal(
      image, scaling.unscale(images[at], found["value_range"])
    )
    helpers.assert_close(attention, look(images[at][None])[0])
  expected = np.sort(predictions.probability[~wrong])[: notable.COUNT]
  assert [x.answer.confidence for x in shown[count:]] == expected.tolist()
  found["data"]["sha256"] = ""
  with pytest.raises(vqt_jax.UserError, match="squares has changed since"):
    run_pictures.read(workdir, found, config, predictions)


def test_a_report_is_written_without_what_is_damaged(
  run, material, tmp_path, pictures, capfd
):
  """And with all of it when it is mended."""
  workdir = tmp_path / "run"
  shutil.copytree(run(), workdir)
  page = workdir / "report.html"
  weights = workdir / "tuned" / "model.safetensors"
  whole = weights.read_bytes()
  for content in (whole[:-1], whole):
    weights.write_bytes(content)
    page.unlink()
    assert main.main(runs.command(material, workdir)) == 0
    damaged = content != whole
    assert ("incomplete: " in capfd.readouterr().err) == damaged
    assert 'id="images"' in page.read_text()
    assert ("in block" in page.read_text()) != damaged


def test_weights_that_have_changed_are_not_taken_for_the_same(
  material, tmp_path, monkeypatch, capfd
):
  """Neither by what was trained on them, nor by a run that is resumed."""
  init = tmp_path / "vit.npz"
  shutil.copy(material / "vit.npz", init)
  weights = dict(np.load(init))
  workdir = tmp_path / "run"
  argv = runs.command(material, workdir, init=init, epochs=2, lr=0.1, seeds=7)
  with monkeypatch.context() as patch:
    train = "vqt_jax.training.step:train_steps"
    runs.signal_on_call(patch.setattr, train, 1, signal.SIGTERM)
    assert main.main(argv) == 75
  name = next(n for n in weights if weights[n].ndim > 1 and "embed" not in n)
  np.savez(init, **weights | {name: 2 * weights[name]})
  assert main.main(argv) == 2
  assert "was begun with other weights" in capfd.readouterr().err
  np.savez(init, **weights)
  assert main.main(argv) == 0
  assert "resume " in capfd.readouterr().err

  model = vqt_jax.load(workdir)
  np.savez(init, **weights | {name: 2 * weights[name]})
  with pytest.raises(vqt_jax.UserError, match="other weights than .*backbone="):
    vqt_jax.load(workdir)
  again = vqt_jax.load(workdir, backbone=material / "vit.npz")
  assert again.backbone.identity == model.backbone.identity


def test_of_selected_features_only_the_rows_in_use_are_shipped(run):
  """And the others count for nothing, neither in size nor in cost."""
  workdir = run(keep_fraction=0.5)
  c, found = helpers.tiny_config(), runs.results(workdir)
  features = c.width * (1 + c.depth)
  everything, selected = found["tested"]
  assert [t["name"] for t in found["tested"]] == ["all", "selected"]
  assert selected["test_accuracy"] == found["test_accuracy"]
  assert found["chosen"]["keep_fraction"] == 0.5
  size = c.depth * c.width + (features // 2 + 1) * runs.CLASSES
  assert selected["trained_parameters"] == size
  assert selected["training_seconds"] > everything["training_seconds"] > 0
  assert everything["kept_share"] is None
  assert np.mean(selected["kept_share"]) == pytest.approx(0.5)
  assert len(selected["kept_share"]) == 1 + c.depth
  assert everything["test_accuracy"] == runs.results(run())["test_accuracy"]
  kept = set()
  head = bundle.read(workdir / "tuned").variables["head"]
  for rows, kernel in zip(head["features"], head["kernel"], strict=True):
    assert len(kernel) == len(set(rows)) == features // 2
    kept.add(tuple(rows))
  assert len(kept) == 2  # Each seed has its own.


def test_a_finished_run_is_not_redone(run, material, capfd):
  workdir = run()
  before = runs.files(workdir)
  assert main.main(runs.command(material, workdir, checkpoint_seconds=1)) == 0
  said = capfd.readouterr().err
  assert "finished already" in said and "results.json" in said
  after = runs.files(workdir)
  before.pop("log.txt"), after.pop("log.txt")
  assert before == after


def test_the_search_chooses_and_does_nothing_else(run):
  found = runs.results(run())
  search, chosen = found["search"], found["chosen"]
  accuracy = search["val_accuracy"]
  settings = [(r["lr"], r["weight_decay"]) for r in search["runs"]]
  assert settings == [(4.0 * 12 / 256, 1e-4), (0.1 * 12 / 256, 1e-4)]
  assert {r["seed"] for r in search["runs"]} == {100}
  assert (chosen["lr"], chosen["weight_decay"]) == min(
    settings, key=lambda s: (-accuracy[settings.index(s)], s)
  )
  alone = run(lr=chosen["lr"] * 256 / 12)
  assert "search" not in {row["phase"] for row in runs.metrics(alone)}
  outcome = runs.bits(run())
  for name, of_alone in runs.bits(alone).items():
    if name not in ("search", "metrics.jsonl"):
      assert outcome[name] == of_alone, name


def test_stored_and_live_features_give_the_same(run):
  stored, live = run(), run(features="live", data="device")
  a, b = runs.results(stored), runs.results(live)
  assert a["test_accuracy"] == b["test_accuracy"]
  assert a["search"]["val_accuracy"] == b["search"]["val_accuracy"]
  a, b = (bundle.read(w / "tuned").variables for w in (stored, live))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    helpers.assert_close(x, y, 1e-5)


def test_streaming_shows_every_example_once_an_epoch(
  material, task, tmp_path, monkeypatch
):
  seen = []
  on_devices = batches_lib.call_of_batch

  def watch(batch, mesh):
    seen.append(batch)
    return on_devices(batch, mesh)

  monkeypatch.setattr(batches_lib, "call_of_batch", watch)
  changes = dict(method="linear", data="stream", batch_size=16, lr=0.1)
  assert main.main(runs.command(material, tmp_path, **changes)) == 0
  size = {"image_size": 8, "value_range": "-1..1"}
  wanted = data.load_arrays(task, "trainval", **size)["image"]
  orders = []
  for _ in range(EPOCHS):
    batches = [seen.pop(0) for _ in range(3)]
    images = np.concatenate([b["image"][b["mask"] > 0] for b in batches])
    order = np.lexsort(images.reshape(48, -1).T)
    orders.append(tuple(order))
    np.testing.assert_array_equal(
      images[order], wanted[np.lexsort(wanted.reshape(48, -1).T)]
    )
  assert len(set(orders)) == EPOCHS
  batches = seen  # Of the test.
  assert sum(b["mask"].sum() for b in batches) == 30


def test_the_authors_program(material, tmp_path, capfd):
  """Its noise makes the stream differ in every step, so nothing is stored."""
  changes = dict(epochs=11, lr=0.1, weight_decay=0.0, seeds="7,8")
  argv = runs.command(material, tmp_path, preset="authors", **changes)
  assert main.main(argv) == 0
  assert "through the backbone every step" in capfd.readouterr().err
  resolved = runs.read_json(tmp_path / "config.json")
  assert (resolved["embedding_dropout"], resolved["gelu"]) == (0.1, "exact")
  losses = [row["loss"] for row in runs.metrics(tmp_path)]
  assert losses[0] > losses[-1]


def test_the_rate_follows_epochs_or_steps(monkeypatch):
  """And is computed once: later it would wait for the steps in the queue."""
  by_epoch, by_step = (optim.Schedule(4, 1, 3, x) for x in (False, True))
  by_epoch.factors(0, 0, 1), by_step.factors(0, 0, 1)
  schedule = optim.schedule
  monkeypatch.delattr(optim, "schedule")
  for epoch in range(4):
    factors = by_epoch.factors(epoch, 1, 2)
    np.testing.assert_allclose(factors, [schedule(4, 1)(epoch)] * 2)
    factors = by_step.factors(epoch, 1, 3)  # Of the last, two are taken.
    steps = 3 * epoch + np.arange(1, 4)
    np.testing.assert_allclose(factors, schedule(12, 3)(steps), atol=1e-7)


def test_digits(material, tmp_path, capfd, pictures):
  """The config that comes along, with its data; another, smaller ViT."""
  changes = {
    "init": material / "vit.npz",
    "image_size": 8,
    "data_dir": tmp_path / "data",
    "seeds": "7",
  }
  argv = runs.command(material, tmp_path / "run", method="linear", **changes)
  argv[1] = f"--config={helpers.ROOT / 'configs' / 'digits.py'}"
  assert main.main(argv) == 0
  assert runs.results(tmp_path / "run")["test_accuracy"]["images"] == 797
  assert helpers.colours(tmp_path / "run" / "report.png") > 400
  said = capfd.readouterr()
  assert said.out == ""
  first, *_, last = said.err.splitlines()
  assert first.startswith("linear on digits   ViT-")
  assert last.startswith(f"results  {tmp_path / 'run' / 'results.json'}")


def test_a_second_run_leaves_the_first_one_alone(material, tmp_path, capfd):
  argv = runs.command(material, tmp_path / "run")
  elsewhere = lambda *call: contextvars.Context().run(*call)
  with locks.lock_folder(tmp_path / "run"):
    before = runs.files(tmp_path)
    assert elsewhere(main.main, argv) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: Another run is already in ")
    assert said.count("\n") == 1
    with pytest.raises(vqt_jax.UserError, match="Another run is already in"):
      elsewhere(vqt_jax.train, cli.parse(argv).config, tmp_path / "run")
    assert runs.files(tmp_path) == before
