"""Heads that are computed: as scikit-learn's, and as leaving out by hand."""

import jax
import numpy as np
import pytest
from sklearn import linear_model

import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.runtime import memory
from vqt_jax.training import exact
from vqt_jax.training import logistic
from vqt_jax.training import ridge
from vqt_jax.training import selected_ridge

CLASSES = 3


def examples(count, width, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % CLASSES
  features = rng.standard_normal((count, width)).astype(np.float32) + 3
  features[:, :CLASSES] += 2 * np.eye(CLASSES)[labels]
  return features, labels


def softmax_loss(logits, labels):
  logits = logits - logits.max(axis=1, keepdims=True)
  lost = np.log(np.exp(logits).sum(axis=1)) - logits[range(len(labels)), labels]
  return lost.mean()


def by_hand(features, labels, penalty, weights):
  """Predictions of every example by a fit to the others, in float64."""
  x, found = features.astype(np.float64), []
  one_hot = np.eye(CLASSES)[labels]
  for i in range(len(x)):
    rest = np.arange(len(x)) != i
    model = linear_model.Ridge(alpha=penalty)
    model.fit(x[rest], one_hot[rest], weights[rest])
    found.append(model.predict(x[i : i + 1])[0])
  return np.array(found)


@pytest.mark.parametrize("width", [60, 8])  # More than there are images; fewer.
@pytest.mark.parametrize("balanced", [False, True])
def test_ridge_is_leaving_each_image_out_by_hand(width, balanced):
  features, labels = examples(30, width)
  class_weights = np.array([2.0, 0.5, 1.0]) if balanced else None
  weights = class_weights[labels] if balanced else np.ones(30)
  fit = ridge.fit(features.copy(), labels, CLASSES, class_weights)
  centred = features - np.average(features, axis=0, weights=weights)
  size = (weights[:, None] * centred**2).sum() / 30
  penalty = fit.penalty * size
  predicted = by_hand(features, labels, penalty, weights)
  assert fit.accuracy == (predicted.argmax(axis=1) == labels).mean()
  if not balanced:
    loss = softmax_loss(fit.temperature * predicted, labels)
    assert abs(fit.loss - loss) < 1e-4
    for temperature in (0.95, 1.05):
      other = temperature * fit.temperature * predicted
      assert softmax_loss(other, labels) > loss
  assert fit.loss == min(tried["loss"] for tried in fit.tried)
  whole = linear_model.Ridge(alpha=penalty)
  whole.fit(features, np.eye(CLASSES)[labels], weights)
  logits = features @ fit.kernel + fit.bias
  helpers.assert_close(logits / fit.temperature, whole.predict(features), 1e-4)


def test_ridge_with_a_few_images_at_a_time_on_the_device(monkeypatch):
  features, labels = examples(30, 8)
  whole = ridge.fit(features.copy(), labels, CLASSES)
  monkeypatch.setattr(ridge, "AT_ONCE", 13)
  parts = ridge.fit(features.copy(), labels, CLASSES)
  helpers.assert_close(parts.kernel, whole.kernel, 1e-4)
  assert (parts.penalty, parts.accuracy) == (whole.penalty, whole.accuracy)


def test_rounding_chooses_no_penalty_where_all_is_easy():
  labels = np.arange(40) % CLASSES
  features = np.tile(np.eye(CLASSES, dtype=np.float32)[labels], 30)
  rng = np.random.default_rng(0)
  features += 0.1 * rng.standard_normal(features.shape).astype(np.float32)
  fits = [ridge.fit(features + x, labels, CLASSES) for x in (0, 1e-3)]
  assert fits[0].penalty == fits[1].penalty
  assert abs(fits[0].temperature / fits[1].temperature - 1) < 0.01
  assert min(tried["loss"] for tried in fits[0].tried) >= 0


def test_ridge_is_that_of_scikit_learn():
  features, labels = examples(40, 12)
  fit = ridge.fit(features.copy(), labels, CLASSES)
  size = ((features - features.mean(axis=0)) ** 2).sum() / 40
  theirs = linear_model.RidgeClassifierCV(alphas=[fit.penalty * size])
  decision = theirs.fit(features, labels).decision_function(features)
  ours = (features @ fit.kernel + fit.bias) / fit.temperature
  helpers.assert_close(2 * ours - 1, decision, 1e-4)  # Theirs are -1 and 1.


def test_logistic_regression_is_that_of_scikit_learn():
  features, labels = examples(90, 60)
  folds = [np.arange(i, 90, 5) for i in range(5)]
  fit = logistic.fit(features, labels, CLASSES, folds)
  centred = features - features.mean(axis=0)
  c = 1 / (fit.penalty * (centred**2).sum())
  right, loss = 0, 0.0
  for rows in folds:
    rest = np.setdiff1d(np.arange(90), rows)
    theirs = linear_model.LogisticRegression(
      C=c * 90 / 72, max_iter=1000, tol=1e-6
    )
    theirs.fit(centred[rest], labels[rest])
    right += theirs.score(centred[rows], labels[rows]) * len(rows)
    logits = theirs.decision_function(centred[rows])
    loss += softmax_loss(logits, labels[rows]) * len(rows)
  assert abs(fit.accuracy - right / 90) < 0.012  # An image may be on the edge.
  assert abs(fit.loss - loss / 90) < 1e-3
  theirs = linear_model.LogisticRegression(C=c, max_iter=1000, tol=1e-6)
  theirs.fit(centred, labels)
  ours = softmax_loss(features @ fit.kernel + fit.bias, labels)
  assert abs(ours - softmax_loss(theirs.decision_function(centred), labels)) < (
    1e-3
  )


def test_weights_of_classes_repeat_their_images():
  features, labels = examples(30, 8)
  folds = [np.arange(i, 30, 5) for i in range(5)]
  twice = np.flatnonzero(labels == 1)
  more = np.concatenate([np.arange(30), twice])
  weights = np.array([1.0, 2.0, 1.0])
  penalties = [1e-2]
  fit = logistic.fit(features, labels, CLASSES, folds, weights, penalties)
  both = logistic.fit(
    features[more], labels[more], CLASSES, folds, None, penalties
  )
  helpers.assert_close(fit.kernel, both.kernel, 2e-3)


@pytest.mark.parametrize("balanced", [False, True])
def test_selected_ridge_scores_and_selects_in_each_fold_by_hand(balanced):
  features, labels = examples(45, 60)
  class_weights = np.array([2.0, 0.5, 1.0]) if balanced else None
  weights = class_weights[labels] if balanced else np.ones(45)
  one_hot, x = np.eye(CLASSES)[labels], features.astype(np.float64)
  folds, fractions = exact.stratified_folds(labels), (0.3, 0.05, 0.7)
  scoring = ridge.fit(features.copy(), labels, CLASSES, class_weights).penalty

  def ridge_by_hand(rows, columns, penalty):
    part, w = x[np.ix_(rows, columns)], weights[rows]
    size = w @ ((part - np.average(part, axis=0, weights=w)) ** 2).sum(axis=1)
    model = linear_model.Ridge(alpha=penalty * size / len(rows))
    return model.fit(part, one_hot[rows], w)

  def select(rows, fraction):
    scores = ridge_by_hand(rows, np.arange(60), scoring).coef_
    order = np.argsort(-np.linalg.norm(scores, axis=0))
    return order[: int(60 * fraction)]

  fit = selected_ridge.fit(
    features.copy(), labels, CLASSES, folds, fractions, class_weights
  )
  penalties, accuracy = [each["penalty"] for each in fit.tried], {}
  for fraction in fractions:
    predicted = np.empty((len(penalties), 45, CLASSES))
    for judged in folds:
      rows = np.setdiff1d(np.arange(45), judged)
      kept = select(rows, fraction)
      for each, penalty in zip(predicted, penalties):
        model = ridge_by_hand(rows, kept, penalty)
        each[judged] = model.predict(x[np.ix_(judged, kept)])
    accuracy[fraction] = (predicted.argmax(axis=2) == labels).mean(axis=1)
    if fraction == fit.keep_fraction:
      tried = accuracy[fraction]
      logits = fit.temperature * predicted[penalties.index(fit.penalty)]
  assert [each["accuracy"] for each in fit.tried] == pytest.approx(tried)
  assert [f["keep_fraction"] for f in fit.keep_fractions] == [0.05, 0.3, 0.7]
  for found in fit.keep_fractions:
    nearest = np.abs(accuracy[found["keep_fraction"]] - found["cv_accuracy"])
    assert nearest.min() < 1.5 / 45  # An image may lie on the border.
  if not balanced:
    assert abs(fit.loss - softmax_loss(logits, labels)) < 1e-4
  kept = select(np.arange(45), fit.keep_fraction)
  assert set(np.flatnonzero(fit.kernel.any(axis=1))) == set(kept)
  kernel = ridge_by_hand(np.arange(45), kept, fit.penalty).coef_.T
  helpers.assert_close(fit.kernel[kept], fit.temperature * kernel, 1e-3)


@pytest.mark.parametrize("solver", ["ridge", "selected ridge", "logistic"])
@pytest.mark.parametrize(
  "features, labels",
  [
    (np.ones((6, 4)), [0, 1, 2, 0, 1, 2]),  # All images alike.
    (np.ones((6, 9)), [0, 1, 2, 0, 1, 2]),
    (np.repeat(np.eye(3), 4, axis=1), [0, 1, 2]),  # One image of each class.
    (np.eye(2), [0, 1]),  # A class without images.
    (np.repeat(np.eye(3, 4), 2, axis=0), [0, 0, 1, 1, 0, 0]),  # Doubled.
    (np.arange(24.0).reshape(6, 4), [1, 1, 1, 1, 1, 1]),  # Of one class only.
  ],
)
def test_few_or_equal_images_give_a_finite_head(solver, features, labels):
  features, labels = features.astype(np.float32), np.array(labels)
  head, found = exact.solve(
    solver, features.copy(), labels, CLASSES, fractions=(0.3, 1.0)
  )
  assert np.isfinite(head["kernel"]).all() and np.isfinite(head["bias"]).all()
  assert 0 <= found["accuracy"] <= 1
  logits = features @ head["kernel"] + head["bias"]
  if len(set(labels)) == 1:
    assert (logits.argmax(axis=1) == labels).all()


def test_what_has_no_exact_head(monkeypatch):
  features, labels = examples(6, 4)
  with pytest.raises(vqt_jax.UserError, match="at least two images.*found 1"):
    exact.solve("ridge", features[:1], labels[:1], CLASSES)
  features[3, 2] = np.nan
  with pytest.raises(vqt_jax.UserError, match="infinite or NaN.*value_range"):
    exact.solve("logistic", features, labels, CLASSES)
  monkeypatch.setattr(memory, "device_memory", lambda: 100)
  with pytest.raises(vqt_jax.UserError, match="6 images and 4 features needs"):
    ridge.fit(*examples(6, 4), CLASSES)


def test_features_that_exceed_memory(monkeypatch):
  tuner = vqt_jax.make_tuner("instant", helpers.tiny_config(), CLASSES)
  monkeypatch.setattr(memory, "host_memory", lambda: 1000)
  with pytest.raises(vqt_jax.UserError, match="features of 7 images take"):
    exact.check_memory(tuner, 7)


def start(material, workdir, method, **changes):
  changes = {"method": method, "solver": "", **changes}
  assert main.main(runs.command(material, workdir, **changes)) == 0
  return runs.results(workdir)


@pytest.fixture(scope="module")
def workdirs(material, tmp_path_factory):
  """Of a run of each method that has an exact head."""
  place = tmp_path_factory.mktemp("exact")
  for method in ("instant", "linear"):
    start(material, place / method, method)
  return place


@pytest.mark.parametrize("method, seeds", [("instant", 2), ("linear", 1)])
def test_a_run_with_an_exact_head(method, seeds, workdirs):
  workdir = workdirs / method
  found = runs.results(workdir)
  assert (
    len(found["solved"]) == len(found["test_accuracy"]["per_seed"]) == seeds
  )
  assert (workdir / "report.png").exists()
  assert "leave-one-out" in (workdir / "report.html").read_text() or seeds == 1
  head = vqt_jax.load(workdir).variables["head"]
  assert len(head["bias"]) == seeds
  assert found["trained_parameters"] == sum(x[0].size for x in head.values())


def test_a_run_of_head2toe_selects_features_in_folds(material, tmp_path, capfd):
  changes = {"target_size": 32, "keep_fraction": "0.02,0.3,0.6"}
  found = start(material, tmp_path, "head2toe", **changes)
  (solved,) = found["solved"]
  tried = {
    each["keep_fraction"]: each["cv_accuracy"]
    for each in found["selection"]["keep_fractions"]
  }
  keep = found["selection"]["chosen"]
  assert list(tried) == [0.02, 0.3, 0.6] and keep in tried
  assert found["chosen"] == {
    "penalty": solved["penalty"],
    "keep_fraction": keep,
  }
  kept = int(16 * (1 + 3 * 2) * keep)
  assert found["trained_parameters"] == (kept + 1) * CLASSES
  kernel = vqt_jax.load(tmp_path).variables["head"]["kernel"]
  assert kernel.any(axis=-1).sum() == kept
  (tested,) = found["tested"]
  assert tested["name"] == "selected"
  final, *of_blocks = tested["kept_share"]
  assert 16 * final + 32 * sum(of_blocks) == pytest.approx(kept)
  assert "by cross-validation" in capfd.readouterr().err
  report = (tmp_path / "report.html").read_text()
  assert "cross-validation chose" in report and "in folds" in report


def outcome(workdir):
  """Accuracy and kernel of seed 7, the first."""
  accuracy = runs.results(workdir)["test_accuracy"]["per_seed"]["7"]
  return accuracy, vqt_jax.load(workdir).variables["head"]["kernel"][0]


@pytest.mark.parametrize("features, data", [("live", "device"), ("", "stream")])
def test_an_exact_head_from_live_features_is_that_from_stored_ones(
  features, data, workdirs, material, tmp_path
):
  changes = dict(features=features, data=data, seeds=7, batch_size=16)
  start(material, tmp_path, "instant", **changes)
  accuracy, kernel = outcome(tmp_path)
  expected_accuracy, expected = outcome(workdirs / "instant")
  helpers.assert_close(kernel, expected, 1e-3)
  assert accuracy == expected_accuracy


def test_queries_of_instant_are_those_that_vqt_begins_with():
  config = helpers.tiny_config()
  both = [
    vqt_jax.make_tuner(method, config, CLASSES, num_queries=2)
    for method in ("instant", "vqt")
  ]
  draw = jax.jit(lambda key: [tuner.init(key)["tuner"] for tuner in both])
  fixed, vqt = draw(jax.random.key(1))
  np.testing.assert_array_equal(fixed["queries"], vqt["queries"])


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"method": "instant+lora"}, "an editor learns by gradients, but instant"),
    ({"method": "instant", "solver": "gradient"}, "has an exact head only"),
    ({"method": "vqt", "solver": "exact"}, "vqt learns by gradients"),
    ({"method": "linear", "keep_fraction": 0.5}, "uses all features"),
    ({"method": "instant", "embedding_dropout": 0.1}, "without noise"),
  ],
)
def test_settings_that_an_exact_head_cannot_have(
  changes, said, material, tmp_path, capsys
):
  changes = {"solver": "", **changes}
  argv = runs.command(material, tmp_path / "run", **changes)
  assert main.main(argv) == 2
  assert said in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
