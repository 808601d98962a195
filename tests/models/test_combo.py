"""combo: a sum over blocks, read by a small network."""

import functools

import jax
import numpy as np
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.models import combo
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit_config

CLASSES = 3


@functools.cache
def start(method="combo"):
  """A tuner, its variables and the stream of 6 images."""
  backbone = helpers.tiny_backbone()
  tuner = vqt_jax.make_tuner(method, backbone, CLASSES)
  images = helpers.tiny_examples(backbone, 6, CLASSES)["image"]
  variables = helpers.random_variables(tuner)
  variables["backbone"] = backbone.params
  stream = jax.jit(tuner.stream)(variables, images)
  return tuner, variables, jax.tree.map(np.asarray, stream)


@pytest.mark.parametrize("some", [False, True])
def test_the_state_is_the_sum_of_projected_standardised_tokens(some):
  """Of all blocks, or of some: a factor for each block and image."""
  tuner, variables, stream = start()
  kernel = variables["tuner"]["kernel"]
  tokens = np.asarray(stream.tokens, np.float64)
  tokens -= tokens.mean(axis=-1, keepdims=True)
  tokens /= np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-6)
  factors = np.ones(tokens.shape[:2], np.float32)
  if some:
    factors[0, 2:] = factors[2, :4] = 0
    factors[1] = 2
  kernels = np.asarray(kernel, np.float64)
  expected = np.einsum("lb,lbnd,ldr->bnr", factors, tokens, kernels)
  zeros = np.zeros(expected.shape, np.float32)
  read = jax.jit(
    lambda tokens: tuner.read(
      readers._sum_step,
      variables,
      (kernel, factors if some else None),
      tokens,
      carry=zeros,
    )
  )
  state, _ = read(stream.tokens)
  helpers.assert_close(state, expected, 2e-5)


def test_stored_rows_give_the_direct_reading_and_its_gradients():
  tuner, variables, stream = start()
  rows = np.array([4, 0, 5], np.int32)

  def loss(own, tokens, final, rows):
    out = tuner({**variables, **own}, tokens, final, rows=rows)
    return (out.logits**2).sum(), out.features

  own = {name: variables[name] for name in tuner_lib.TRAINED}
  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  final = stream.final[rows]
  stored = run(own, stream.tokens, final, rows)
  direct = run(own, stream.tokens[:, rows], final, None)
  jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-5), stored, direct)
  assert stored[0][1].shape == (3, tuner.num_features)


def test_dropout_needs_a_key_and_fills_of_a_batch_change_no_other_image():
  tuner, variables, stream = start()

  @functools.partial(jax.jit, static_argnums=0)
  def ask(count, key=None):
    tokens, final = stream.tokens[:, :count], stream.final[:count]
    return tuner(variables, tokens, final, key=key).logits

  key = jax.random.key(3)
  np.testing.assert_array_equal(ask(4), ask(4))
  assert np.abs(ask(4, key) - ask(4)).max() > 0.01
  helpers.assert_close(ask(6, key)[:4], ask(4, key), 1e-5)


def test_blocks_drop_out_whole_and_by_image(monkeypatch):
  """Kept ones add more, so that the sum is the same on average."""
  draw = jax.vmap(lambda key: combo.draw_blocks(key, 3, 6))
  factors = draw(jax.random.split(jax.random.key(0), 400))
  kept = 1 - combo.BLOCK_DROPOUT
  np.testing.assert_allclose(np.unique(factors), [0, 1 / kept], rtol=1e-6)
  np.testing.assert_allclose(factors.mean(axis=0), np.ones((3, 6)), atol=0.2)

  tuner, variables, stream = start()
  none = np.zeros((3, 6), np.float32)
  monkeypatch.setattr(combo, "draw_blocks", lambda *_: none)
  ask = jax.jit(
    lambda tokens, key: tuner(variables, tokens, stream.final, key=key).logits
  )
  key = jax.random.key(1)
  other = np.flip(stream.tokens, axis=1)
  np.testing.assert_array_equal(ask(stream.tokens, key), ask(other, key))


def test_prompts_of_an_editor_are_not_read():
  """It has positions for the tokens of pre-training only."""
  tuner, variables, stream = start("combo+vpt_shallow")
  prompts = tuner.options.num_prompts
  assert stream.tokens.shape[2] == tuner.config.num_tokens + prompts
  changed = stream.tokens.copy()
  changed[:, :, 1 : 1 + prompts] += 1
  ask = jax.jit(lambda tokens: tuner(variables, tokens, stream.final).logits)
  np.testing.assert_array_equal(ask(changed), ask(stream.tokens))


def test_size_for_vit_b():
  """12 D R of the projections, 3 layers of 12 R^2, and what is per token."""
  config = vit_config.ViTConfig(
    **vit_config.decode_variant("B/16"), image_size=(224, 224)
  )
  shapes = vqt_jax.make_tuner("combo", config, 100).shapes()
  r = combo.WIDTH
  layer = 12 * r * r + (4 + 4 + 1) * r + 4 * r
  expected = 12 * 768 * r + 3 * layer + (197 + 1) * r + 2 * r
  size = sum(x.size for x in jax.tree.leaves(shapes["tuner"]))
  assert size == expected
  assert shapes["head"]["kernel"].shape == (r, 100)
