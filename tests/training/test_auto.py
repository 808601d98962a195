"""method=auto: members are weighed on folds, and answer together."""

import jax
import numpy as np
import pytest
from scipy import optimize
from scipy import special

import main
from tests import runs
import vqt_jax
from vqt_jax.models import combo
from vqt_jax.training import auto
from vqt_jax.training import exact


def scores_of(rng, labels, *strengths):
  """Log-probabilities of members that see the labels more or less well."""
  z = rng.standard_normal((len(strengths), len(labels), 3))
  z[:, np.arange(len(labels)), labels] += np.array(strengths)[:, None]
  return special.log_softmax(z, axis=-1)


def test_weights_make_the_cross_entropy_least():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 200)
  scores = scores_of(rng, labels, 2.0, 1.9)
  right = np.exp(scores[:, np.arange(200), labels])
  loss = lambda w: -np.log(w * right[0] + (1 - w) * right[1]).mean()
  best = optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded").x
  assert 0.2 < best < 0.8
  weights = auto.mixing_weights(scores, labels)
  np.testing.assert_allclose(weights, [best, 1 - best], atol=1e-3)


def test_weights_of_classes_repeat_their_images():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 60)
  scores = scores_of(rng, labels, 2.0, 1.9)
  twice = np.append(np.arange(60), np.flatnonzero(labels == 1))
  np.testing.assert_allclose(
    auto.mixing_weights(scores, labels, np.array([1.0, 2.0, 1.0])),
    auto.mixing_weights(scores[:, twice], labels[twice]),
    atol=1e-9,
  )


def test_a_member_that_is_sure_and_wrong_gets_no_weight():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 100)
  scores = scores_of(rng, labels, 4.0, -8.0)
  scores[1, :5] = -np.inf  # Probabilities may underflow.
  weights = auto.mixing_weights(scores, labels)
  assert weights[1] < auto.LEAST_WEIGHT
  np.testing.assert_allclose(weights.sum(), 1)


def test_where_the_quick_look_is_enough_nothing_else_is_trained(
  material, tmp_path, monkeypatch
):
  monkeypatch.setattr(auto, "ENOUGH", 0.9)  # Of 48 images all are right.
  command = runs.command(material, tmp_path, method="auto", solver="")
  assert main.main(command) == 0
  results = runs.results(tmp_path)
  assert results["method"] == "auto"
  assert [each["name"] for each in results["tested"]] == ["instant"]
  assert results["auto"]["quick_look"] == 1


def test_members_answer_together_with_their_weights(
  material, tmp_path, monkeypatch
):
  """What is tested is what is shipped, and what each member would answer."""
  monkeypatch.setattr(auto, "ENOUGH", 2.0)
  monkeypatch.setattr(exact, "FOLDS", 2)
  monkeypatch.setattr(combo, "LAYERS", 1)
  weights = np.array([0.75, 0.25])
  monkeypatch.setattr(auto, "mixing_weights", lambda *args: weights.copy())
  options = {"epochs": 1, "warmup_epochs": 0, "lr": (0.1,), "seeds": (7,)}
  options["batch_size"] = 48  # One step: folds and the whole share a program.
  command = runs.command(
    material, tmp_path, method="auto", solver="", **options
  )
  assert main.main(command) == 0
  results = runs.results(tmp_path)
  assert [each["name"] for each in results["tested"]] == [
    "instant",
    "combo",
    "auto",
  ]
  assert results["chosen"] == {
    "instant": 0.75,
    "combo": 0.25,
    "keep_fraction": 1.0,
  }
  assert results["trained_parameters"] == sum(
    each["trained_parameters"] for each in results["tested"][:2]
  )
  model = vqt_jax.load(tmp_path)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (4, *model.tuner.config.image_size, 3))
  images = images.astype(np.float32)
  expected = sum(
    weight
    * jax.nn.softmax(
      vqt_jax.apply(
        model.backbone,
        member,
        jax.tree.map(lambda x: x[0], model.variables["tuner"][member.method]),
        images,
      ).logits
    )
    for weight, member in zip(weights, model.tuner.members)
  )
  found = jax.nn.softmax(model(images)[0])
  np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"protocol": "best"}, "chooses by cross-validation already"),
    ({"keep_fraction": (0.5,)}, "uses all features"),
    ({"method": "auto+lora"}, "e.g. combo+lora"),
    ({"solver": "exact"}, "learns by gradients"),
  ],
)
def test_what_auto_cannot_do(changes, told, material, tmp_path, capsys):
  options = {"method": "auto", "solver": "", **changes}
  assert main.main(runs.command(material, tmp_path / "w", **options)) == 2
  assert told in capsys.readouterr().err
