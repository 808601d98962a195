"""Numbers do not depend on what the environment says of JAX's options."""

from concurrent import futures
import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.config import config_dict
from vqt_jax.experiments import single
from vqt_jax.models import methods
from vqt_jax.training import preemption


@contextlib.contextmanager
def unusual():
  """As `JAX_ENABLE_X64=1` and others would have it, in this thread."""
  with (
    jax.enable_x64(True),
    jax.default_prng_impl("rbg"),
    jax.threefry_partitionable(False),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
    jax.debug_nans(True),
    jax.debug_infs(True),
    jax.disable_jit(True),
  ):
    yield


def test_a_run_in_another_thread_and_with_other_options(monkeypatch, tmp_path):
  """A thread cannot take signals, and need not."""

  def fake(config, workdir, console):
    with preemption.StopSignal() as stop:
      assert not stop.received
      jax.jit(lambda x: jnp.log(x - 2 * jnp.ones(1)))(jnp.zeros((2, 2)))  # NaN.
      return jax.random.uniform(jax.random.key(7), (3,))

  def unusually():
    with unusual():
      return vqt_jax.train(config_dict.default_config(), tmp_path)

  monkeypatch.setattr(single, "train", fake)
  expected = jax.random.uniform(jax.random.key(7), (3,))
  with futures.ThreadPoolExecutor(1) as pool:
    found = pool.submit(unusually).result()
  assert found.dtype == jnp.float32 and (found == expected).all()


@pytest.mark.parametrize("method", methods.NAMES)
def test_models_are_float32(method):
  backbone = helpers.tiny_backbone()
  images = jnp.zeros((2, *backbone.config.image_size, 3), jnp.float32)
  tuner = vqt_jax.make_tuner(
    method,
    backbone.config,
    3,
    **({"combine": "weighted_sum"} if method == "vqt" else {}),
  )
  shapes = jax.eval_shape(tuner.init, jax.random.key(0), backbone.params)
  with jax.enable_x64(True):
    own = jax.eval_shape(tuner.init, jax.random.key(0), backbone.params)
    output = jax.eval_shape(
      lambda own: vqt_jax.apply(backbone, tuner, own, images), shapes
    )
  assert own == shapes
  for leaf in jax.tree.leaves((own, output)):
    assert leaf.dtype == jnp.float32


def test_figures_need_no_backend_of_the_screen():
  program = "from vqt_jax.reports import figures; figures.matplotlib"
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"MPLBACKEND": "of_a_notebook"},
    check=False,
  )
  assert done.returncode == 0
