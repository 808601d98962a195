"""cuDNN's attention, with XLA's own in its place: no GPU takes part."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases
import vqt_jax
from vqt_jax.models import fused_attention
from vqt_jax.models import vit
from vqt_jax.planning import cost
from vqt_jax.runtime import mesh as mesh_lib


class Cudnn:
  """What is asked of cuDNN, done by XLA; refuses what JAX would refuse."""

  def __init__(self):
    self.shapes = []

  def __call__(self, q, k, v, **lengths):
    assert q.shape == k.shape
    size = q.shape[3]
    if q.dtype == jnp.float32 or size % 8 or size > 128:
      raise NotImplementedError
    if lengths:
      assert q.shape[1] % 2 == 0  # In a gradient JAX wants it even.
    self.shapes.append(q.shape)
    return jax.nn.dot_product_attention(q, k, v, **lengths)


@pytest.fixture
def cudnn(monkeypatch):
  fake = Cudnn()
  monkeypatch.setattr(fused_attention, "is_available", lambda: True)
  monkeypatch.setattr(fused_attention, "_cudnn", fake)
  return fake


def _traced_anew(case):
  """The step, which has not been traced yet; it donates nothing."""
  static = range(len(case.static))
  return jax.jit(case.function.__wrapped__, static_argnums=static)


def _mesh(data, model):
  devices = jax.devices()[: data * model]
  return jax.set_mesh(mesh_lib.make_mesh(data, model, devices))


@pytest.mark.parametrize("tokens, mesh", [(6, (1, 1)), (7, (2, 2))])
def test_value_and_gradient(cudnn, tokens, mesh):
  shape = (8, tokens, 4, 8)
  draw = np.random.default_rng(0).standard_normal
  q, k, v, c = (draw(shape).astype(jnp.bfloat16) for _ in range(4))

  def value_and_gradient(attend):
    value, gradient = jax.vjp(attend, q, k, v)
    return value, *gradient(c)

  want = jax.jit(lambda: value_and_gradient(jax.nn.dot_product_attention))()
  with _mesh(*mesh):
    got = jax.jit(lambda: value_and_gradient(fused_attention.attend))()
    np.testing.assert_array_equal(
      jax.jit(fused_attention.attend)(q, k, v), want[0]
    )
  for a, b in zip(got, want, strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max())
  local = (8 // mesh[0], tokens + tokens % 2, 4 // mesh[1], 8)
  assert local in cudnn.shapes


def test_odd_tokens_are_filled_up_for_a_gradient_only(cudnn):
  q = jax.ShapeDtypeStruct((2, 7, 1, 8), jnp.bfloat16)
  attend = lambda q: fused_attention.attend(q, q, q).sum()
  jax.eval_shape(attend, q)
  assert {shape[1] for shape in cudnn.shapes} == {7}
  jax.eval_shape(jax.grad(attend), q)
  assert {shape[1] for shape in cudnn.shapes} == {7, 8}


def test_a_step_with_it(cudnn, monkeypatch):
  """Gradients of two runs, as Adam's first moments tell."""
  config = cases.vit_config("Ti/16", 48, "bfloat16")
  config = dataclasses.replace(config, depth=2, num_heads=4)
  tuner = vqt_jax.make_tuner("lora", config, cases.NUM_CLASSES)

  case = cases.train(tuner, 4, runs=2)

  def moments(arrays):
    state = _traced_anew(case)(*arrays)[0]
    leaves = jax.tree.leaves(state.opt_state)
    return [np.asarray(x, np.float32) for x in leaves if x.ndim > 1]

  with _mesh(2, 2):
    arrays = case.arrays()
    got = moments(arrays)
    assert cudnn.shapes
    monkeypatch.setattr(fused_attention, "is_available", lambda: False)
    want = moments(arrays)
  largest = max(np.linalg.norm(x) for x in want)
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) < 0.03 * largest


@pytest.mark.parametrize(
  "shape, keys, dtype",
  [
    ((8, 6, 2, 8), (8, 6, 2, 8), "float32"),
    ((8, 1, 2, 8), (8, 6, 2, 8), "bfloat16"),  # Queries, attention pooling.
    ((8, 6, 2, 4), (8, 6, 2, 4), "bfloat16"),
    ((8, 6, 2, 136), (8, 6, 2, 136), "bfloat16"),
    ((1, 6, 2, 8), (1, 6, 2, 8), "bfloat16"),  # Of two devices.
    ((8, 6, 3, 8), (8, 6, 3, 8), "bfloat16"),  # The same, of heads.
  ],
)
def test_what_it_leaves_to_others(cudnn, shape, keys, dtype):
  q, k = np.ones(shape, dtype), np.ones(keys, dtype)
  with _mesh(2, 2):
    assert not fused_attention.is_supported(q, k)
    good = np.ones((8, 6, 2, 8), "bfloat16")
    assert fused_attention.is_supported(good, good)


@pytest.mark.parametrize(
  "platform, capability, expected",
  [
    ("gpu", "9.0", True),
    ("gpu", "8.6", True),
    ("gpu", "12.0", True),
    ("gpu", "7.5", False),
    ("gpu", "gfx90a", False),
    ("tpu", "9.0", False),
  ],
)
def test_where_it_is(monkeypatch, platform, capability, expected):
  class Device:
    compute_capability = capability

  monkeypatch.setattr(mesh_lib, "backend", lambda: platform)
  monkeypatch.setattr(jax, "local_devices", lambda backend: [Device])
  assert fused_attention.is_available() is expected


@pytest.mark.parametrize("method", ["vqt", "lora"])
def test_steps_lower_for_gpus(monkeypatch, method):
  """JAX does so without one, if it is made to believe in one."""
  module = "jax._src.cudnn.fused_attention_stablehlo"
  for name, answer in (
    ("check_cudnn_version", 91000),
    ("check_compute_capability", True),
    ("is_cuda_compute_capability_equal", False),
  ):
    monkeypatch.setattr(f"{module}.{name}", lambda *_, x=answer: x)
  monkeypatch.setattr(fused_attention, "is_available", lambda: True)
  config = cases.vit_config("Ti/16", 48, "bfloat16")
  config = dataclasses.replace(config, depth=2)
  tuner = vqt_jax.make_tuner(method, config, cases.NUM_CLASSES)
  case = cases.train(tuner, 4, runs=2)
  step, shapes = _traced_anew(case), case.shapes()
  text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax(" in text
  assert ("__cudnn$fmhaSoftmaxBackward(" in text) == (method == "lora")
  fused = cost.matmuls(step, *shapes)
  monkeypatch.setattr(fused_attention, "is_available", lambda: False)
  by_products = cost.matmuls(_traced_anew(case), *shapes)
  assert by_products <= fused < 1.01 * by_products


def test_backend_is_that_of_the_mesh(monkeypatch):
  assert mesh_lib.backend() == "cpu"
  assert not fused_attention.is_available()
  with _mesh(2, 1):
    assert mesh_lib.backend() == "cpu"
  device = types.SimpleNamespace(platform="tpu")  # As of a slice in a plan.
  mesh = types.SimpleNamespace(abstract_device=device)
  monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
  assert mesh_lib.backend() == "tpu"


def test_frozen_backbone_uses_it(cudnn):
  config = cases.vit_config("Ti/16", 48, "bfloat16")
  images = np.ones((2, 48, 48, 3), np.float32)
  jax.eval_shape(
    lambda p: vit.ViT(config).apply({"params": p}, images),
    vit.param_shapes(config),
  )
  assert (2, 10, 3, 64) in cudnn.shapes
