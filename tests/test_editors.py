"""Editors: goldens of the official program, and the laws of what trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import helpers
import vqt_jax
from vqt_jax import editors

UNCHANGED = ("adapter", "adaptformer", "lora", "ssf", "finetune", "partial")
OPTIONS = editors.Options(num_prompts=2, bottleneck=3, rank=2)
CLASSES = 5


def weights_of(name, golden):
  """An editor's weights from the official program's, and the other way."""
  match name:
    case "vpt_shallow":
      return {"embedded": golden["prompt_embeddings"][0]}
    case "vpt_deep":
      prompts = [golden["prompt_embeddings"], golden["deep_prompt_embeddings"]]
      return {"encoderblock": {"input": np.concatenate(prompts)}}
  parts = {
      part: {n: golden[f"adapter/{part}_{n}"] for n in ("kernel", "bias")}
      for part in ("down", "up")
  }
  return {"encoderblock": {"MlpBlock_0": parts}}


def gradients(tuner, backbone, variables, golden, remat=False):
  """(loss, logits), gradients of {"tuner", "head"}."""

  @functools.partial(jax.value_and_grad, has_aux=True)
  def objective(variables):
    everything = {**variables, "backbone": backbone.params}
    stream = tuner.stream(everything, golden["images"], remat=remat)
    logits = tuner(everything, stream.tokens, stream.final).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, golden["labels"]
    )
    return losses.mean(), logits

  return jax.jit(objective)(variables)


def head_of(golden):
  return {n: golden[f"head/{n}"] for n in ("kernel", "bias")}


@pytest.mark.parametrize(
    "name", ["vpt_shallow", "vpt_deep", "adapter", "adaptformer"]
)
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_equal_the_official_program(name, remat):
  golden = helpers.golden(name)
  backbone = helpers.golden_backbone()
  options = editors.Options(num_prompts=5)
  tuner = vqt_jax.make_tuner(name, backbone.config, 7, options=options)
  variables = {
      "tuner": {"editor": weights_of(name, golden)},
      "head": head_of(golden),
  }
  (loss, logits), grads = gradients(tuner, backbone, variables, golden, remat)
  helpers.assert_close(loss, golden["loss"], name="loss")
  helpers.assert_close(logits, golden["logits"], name="logits")
  of_golden = {
      key.removeprefix("grad/"): value
      for key, value in golden.items()
      if key.startswith("grad/")
  }
  expected = {
      "tuner": {"editor": weights_of(name, of_golden)},
      "head": head_of(of_golden),
  }
  jax.tree.map(helpers.assert_close, grads, expected)


def test_fine_tuning_gradients_equal_the_official_program(tmp_path):
  golden = helpers.golden("finetune")
  backbone = helpers.golden_backbone()
  tuner = vqt_jax.make_tuner("finetune", backbone.config, 7)
  fresh = tuner.init(jax.random.key(0), backbone.params)
  variables = {**fresh, "head": head_of(golden)}
  (loss, logits), grads = gradients(tuner, backbone, variables, golden)
  helpers.assert_close(loss, golden["loss"], name="loss")
  helpers.assert_close(logits, golden["logits"], name="logits")
  # Gradients have the shapes of weights: the loader knows the layout.
  prefix = "grad/backbone/"
  np.savez(tmp_path / "grads.npz", **{
      key.removeprefix(prefix): value
      for key, value in golden.items()
      if key.startswith(prefix)
  })  # fmt: skip
  expected = vqt_jax.load_backbone(tmp_path / "grads.npz", gelu="exact").params
  expected["cls"] = golden[f"{prefix}cls"]  # Loading adds its position to it.
  jax.tree.map(
      helpers.assert_close, grads["tuner"]["editor"]["backbone"], expected
  )


def test_the_official_initialisation_of_adapters_is_dead():
  """With zeros everywhere only the up bias gets a gradient; not with ours."""
  golden = helpers.golden("adapter")
  backbone = helpers.golden_backbone()
  tuner = vqt_jax.make_tuner("adapter", backbone.config, 7)
  ours = tuner.init(jax.random.key(0))["tuner"]
  zeros = jax.tree.map(jnp.zeros_like, ours)
  head = head_of(golden)
  (loss, logits), grads = gradients(
      tuner, backbone, {"tuner": zeros, "head": head}, golden
  )
  helpers.assert_close(logits, golden["official_init/logits"])
  helpers.assert_close(loss, golden["official_init/loss"])
  grads = grads["tuner"]["editor"]["encoderblock"]["MlpBlock_0"]
  up = grads["up"].pop("bias")
  helpers.assert_close(up, golden["official_init/grad/adapter/up_bias"])
  assert not any(np.abs(x).max() for x in jax.tree.leaves(grads))
  _, grads = gradients(tuner, backbone, {"tuner": ours, "head": head}, golden)
  grads = grads["tuner"]["editor"]["encoderblock"]["MlpBlock_0"]
  assert np.abs(grads["up"]["kernel"]).max() > 0
