"""A reader is an entry of `READERS`, and nothing else has to know of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.config import fields
from vqt_jax.models import chunks
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib


def _mean_step(config, edit):
  return lambda block, weights, tokens, carry: (carry, tokens.mean(axis=1))


MEANS = readers.Reader(
  read=lambda t, v, *tokens, key: (
    t.read(_mean_step, v, (), *tokens)[1],
    None,
  ),
  group_features=lambda t: t.config.width,
)


@pytest.fixture(autouse=True)
def means(monkeypatch):
  monkeypatch.setitem(readers.READERS, "means", MEANS)


@pytest.mark.parametrize("method", ["means", "means+lora"])
def test_features_of_a_new_reader(method):
  backbone = helpers.tiny_backbone()
  images = helpers.tiny_examples(backbone, 4, 3)["image"]
  tuner = vqt_jax.make_tuner(method, backbone, 3, normalize=False)
  variables = tuner.init(jax.random.key(0), backbone.params)
  features = vqt_jax.apply(backbone, tuner, variables, images).features
  stream = tuner_lib.run_backbone(tuner.config, True, backbone.params, images)
  means = np.asarray(stream.tokens).mean(axis=2)
  expected = [stream.final, *means]  # LoRA begins with no change.
  helpers.assert_close(features, np.concatenate(expected, axis=1), 1e-5)


def test_a_batch_that_others_read_in_chunks(monkeypatch):
  backbone = helpers.tiny_backbone()
  tuner = vqt_jax.make_tuner("means", backbone, 3, normalize=False)
  variables = {**tuner.init(jax.random.key(0)), "backbone": backbone.params}
  shape = (tuner.config.depth, 20, tuner.config.num_tokens, tuner.config.width)
  tokens = np.random.default_rng(0).standard_normal(shape, np.float32)
  rows, final = jnp.arange(16), jnp.zeros((16, tuner.config.width))
  monkeypatch.setattr(chunks, "CACHE_BYTES", tokens[0, :8].nbytes)
  assert readers._num_chunks(tokens, rows) == 2
  out = jax.jit(tuner)(variables, tokens, final, rows=rows)
  expected = tokens[:, :16].mean(axis=2).swapaxes(0, 1).reshape(16, -1)
  blocks = out.features[:, tuner.config.width :]
  helpers.assert_close(blocks, expected, 1e-5)


def test_a_run_of_a_new_reader(material, tmp_path, monkeypatch):
  """Its rates are a field that `READERS` makes on import."""
  rates = fields.FIELDS["reader_lr.vqt"]
  monkeypatch.setitem(fields.FIELDS, "reader_lr.means", rates)
  command = runs.command(material, tmp_path, method="means", epochs=2)
  assert main.main(command) == 0
  assert runs.results(tmp_path)["method"] == "means"
