"""Reading with queries: goldens of the official program, and the laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.models import chunked_attention
from vqt_jax.models import chunks
from vqt_jax.models import head
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config

CASES = {
  "vqt_T1": {},
  "vqt_T5": {},
  "vqt_T5_nonorm": {"normalize": False},
  "vqt_T5_pool": {"combine": "mean"},
  "vqt_T5_wsum": {"combine": "weighted_sum"},
  "vqt_mae": {},
  "vqt_train_dropout": {},
  "linear": {},
}


def _variables(golden):
  variables = {
    "tuner": {},
    "head": {
      "kernel": golden["head/kernel"],
      "bias": golden["head/bias"],
    },
  }
  if "queries" in golden:
    variables["tuner"]["queries"] = golden["queries"]
  if "combine_params" in golden:
    variables["tuner"]["combine"] = golden["combine_params"]
  return variables


@functools.partial(jax.jit, static_argnums=0)
def _stream(config, params, images, mask):
  """The stream as training gets it, with the outputs of its blocks."""
  stream = tuner_lib.run_backbone(config, True, params, images, mask)
  seen = vit.ViT(config).apply({"params": params}, images, collect=("blocks",))
  return dataclasses.replace(stream, blocks=seen.blocks)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_the_official_program(name):
  golden = helpers.golden(name)
  backbone = helpers.golden_backbone("mae" if name == "vqt_mae" else None)
  method = "linear" if name == "linear" else "vqt"
  queries = golden["queries"].shape[1] if method == "vqt" else 1
  tuner = vqt_jax.make_tuner(
    method, backbone.config, 7, num_queries=queries, **CASES[name]
  )
  mask = golden.get("embedding_dropout_mask")
  stream = _stream(backbone.config, backbone.params, golden["images"], mask)

  def objective(variables):
    out = tuner(
      {**variables, "backbone": backbone.params},
      stream.tokens,
      stream.final,
      golden.get("query_dropout_mask"),
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      out.logits, golden["labels"]
    )
    return losses.mean(), out

  variables = _variables(golden)
  (loss, out), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    variables
  )
  helpers.assert_close(out.logits, golden["logits"], name="logits")
  helpers.assert_close(loss, golden["loss"], name="loss")
  for key in ("kernel", "bias"):
    helpers.assert_close(
      grads["head"][key], golden[f"grad/head/{key}"], name=key
    )
  if method == "vqt":
    helpers.assert_close(out.queries, golden["query_outputs"], name="outputs")
    helpers.assert_close(out.features, golden["features"], name="features")
    helpers.assert_close(
      grads["tuner"]["queries"], golden["grad/queries"], name="grad queries"
    )
  if "combine_params" in golden:
    helpers.assert_close(
      grads["tuner"]["combine"], golden["grad/combine_params"]
    )
  if "block_outputs" in golden and mask is None:
    helpers.assert_close(stream.blocks, golden["block_outputs"], name="stream")
    helpers.assert_close(stream.final, golden["cls"], name="class token")


def _direct(config, params, tokens, queries):
  """A block's reading as the paper writes it: project all, then attend."""
  attention = params["MultiHeadDotProductAttention_0"]

  def norm(x, p):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    x = (x - mean) / jnp.sqrt(variance + config.layer_norm_epsilon)
    return x * p["scale"] + p["bias"]

  def project(x, p):
    return jnp.einsum("...nd,dhk->...nhk", x, p["kernel"]) + p["bias"]

  q = project(norm(queries, params["LayerNorm_0"]), attention["query"])
  k = project(tokens, attention["key"])
  if config.posemb == "rope":
    k = jnp.concatenate([k[:, :-9], _turn(config, k[:, -9:])], axis=1)
  v = project(tokens, attention["value"])
  q = jnp.broadcast_to(q, (len(tokens), *q.shape[-3:]))
  scores = jnp.einsum("bthk,bnhk->bhtn", q, k) / np.sqrt(config.head_dim)
  heads = jnp.einsum("bhtn,bnhk->bthk", jax.nn.softmax(scores, -1), v)
  out = attention["out"]
  x = queries + jnp.einsum("bthk,hkd->btd", heads, out["kernel"]) + out["bias"]
  y = norm(x, params["LayerNorm_1"])
  mlp = params["MlpBlock_0"]
  hidden = y @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"]
  if config.gated_mlp:
    gate = y @ mlp["gate"]["kernel"] + mlp["gate"]["bias"]
    y = gate * jax.nn.sigmoid(gate) * hidden
  elif config.gelu == "quick":
    y = hidden * jax.nn.sigmoid(1.702 * hidden)
  else:
    y = jax.nn.gelu(hidden, approximate=config.gelu == "tanh")
  return x + y @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]


def _turn(config, patches):
  """Rotate the keys of a 3x3 grid as DINOv3's paper has it, pair by pair."""
  quarter = config.head_dim // 4
  turned = np.zeros((9, 2 * quarter), np.complex64)
  for i, (row, column) in enumerate(np.ndindex(3, 3)):
    for axis, place in enumerate((row, column)):
      for j in range(quarter):
        period = config.rope_theta ** (j / quarter)
        angle = 2 * np.pi * (2 * (place + 0.5) / 3 - 1) / period
        turned[i, axis * quarter + j] = np.exp(1j * angle)
  half = 2 * quarter
  pairs = patches[..., :half] + 1j * patches[..., half:]
  pairs = pairs * turned[:, None]
  return jnp.concatenate([pairs.real, pairs.imag], axis=-1)


DINOV3 = dict(posemb="rope", registers=2, gated_mlp=True)
CLIP = dict(gelu="quick", pre_norm=True, layer_norm_epsilon=1e-2)


WAYS = ("absorbed", "by parts", "projected")


@pytest.mark.parametrize(
  "num_queries, per_example, family",
  [
    (1, False, {}),
    (4, True, {}),
    (3, True, DINOV3),
    (1, False, DINOV3),
    (3, False, CLIP),
  ],
)
def test_reading_equals_direct(num_queries, per_example, family):
  """Each of the ways to read."""
  backbone = helpers.tiny_backbone(**family)
  config = backbone.config
  blocks = backbone.params["Transformer"]["encoderblock"]
  params = jax.tree.map(lambda x: x[1], blocks)
  rng = np.random.default_rng(0)
  stored = rng.standard_normal((9, config.num_tokens, 16)).astype(np.float32)
  rows = np.array([[4, 0], [8, 3], [3, 5]])
  tokens = stored[rows.reshape(-1)]
  shape = (6, num_queries, 16) if per_example else (num_queries, 16)
  queries = rng.standard_normal(shape).astype(np.float32)
  weights = rng.standard_normal((6, num_queries, 16)).astype(np.float32)

  def read(how, queries):
    block = functools.partial(vit.Block(config).apply, {"params": params})
    if how == "absorbed":
      out = block(tokens, queries, method="read")
    else:
      kept = stored if how == "by parts" else block(stored, method="project")
      out = block(kept, queries, rows=rows, method="read")
    return (out * weights).sum(), out

  def direct(queries):
    out = _direct(config, params, tokens, queries)
    return (out * weights).sum(), out

  theirs = jax.jit(jax.grad(direct, has_aux=True))(queries)
  for how, ours in _each_way(read, queries).items():
    helpers.assert_close(ours[1], theirs[1], 5e-6, f"values, {how}")
    helpers.assert_close(ours[0], theirs[0], 5e-6, f"gradients, {how}")


def _each_way(read, queries):
  """Gradients and values of `read(how, queries)`, in one program."""
  grad = jax.grad(read, argnums=1, has_aux=True)
  return jax.jit(lambda q: {how: grad(how, q) for how in WAYS})(queries)


def test_reading_in_bfloat16():
  """Off by some roundings, whichever way, in values and gradients."""
  backbone = helpers.tiny_backbone()
  blocks = backbone.params["Transformer"]["encoderblock"]
  params = jax.tree.map(lambda x: x[1], blocks)
  rng = np.random.default_rng(0)
  stored = rng.standard_normal((9, 10, 16)).astype(jnp.bfloat16)
  rows = np.array([[4, 0], [8, 3], [3, 5]])
  tokens = stored[rows.reshape(-1)]
  queries = rng.standard_normal((2, 16)).astype(np.float32)
  weights = rng.standard_normal((6, 2, 16)).astype(np.float32)
  half = lambda path, x: (
    x if "LayerNorm" in str(path) else x.astype(jnp.bfloat16)
  )
  halved = jax.tree_util.tree_map_with_path(half, params)
  config = dataclasses.replace(backbone.config, dtype="bfloat16")
  block = functools.partial(vit.Block(config).apply, {"params": halved})

  def read(how, queries):
    if how == "absorbed":
      out = block(tokens, queries, method="read")
    else:
      kept = stored if how == "by parts" else block(stored, method="project")
      assert kept.dtype == jnp.bfloat16
      out = block(kept, queries, rows=rows, method="read")
    return (out * weights).sum(), out

  def direct(queries):
    exact = functools.partial(_direct, backbone.config, params)
    out = exact(jnp.float32(tokens), queries)
    return (out * weights).sum(), out

  theirs = jax.jit(jax.grad(direct, has_aux=True))(queries)
  for how, ours in _each_way(read, queries).items():
    helpers.assert_close(ours[1], theirs[1], 0.02, f"values, {how}")
    helpers.assert_close(ours[0], theirs[0], 0.02, f"gradients, {how}")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_read_in_chunks_is_the_same(monkeypatch, dropout):
  """Also under a gradient and with several runs at once."""
  backbone = helpers.tiny_backbone()
  depth = backbone.config.depth
  blocks = backbone.params["Transformer"]["encoderblock"]
  step = readers.query_step(backbone.config)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  tokens, rows = draw(depth, 20, 10, 16), rng.permutation(20)[:16]
  queries = draw(3, depth, *((16,) if dropout else ()), 2, 16)

  def grad(tokens):
    def loss(queries):
      index = jnp.asarray(rows)
      _, out = readers.scan(step, blocks, queries, tokens, index, fetches=True)
      return (out**2).sum(), out

    of_all = jax.vmap(jax.grad(loss, has_aux=True))
    return jax.jit(lambda queries: of_all(queries))(queries)

  whole = grad(tokens)
  project = functools.partial(
    vit.Block(backbone.config).apply, method="project"
  )
  of_blocks = jax.jit(jax.vmap(lambda p, x: project({"params": p}, x)))
  asked = []
  attend = chunked_attention.attend
  monkeypatch.setattr(
    chunked_attention,
    "attend",
    lambda *args: asked.append(args[2].shape) or attend(*args),
  )
  monkeypatch.setattr(chunks, "CACHE_BYTES", tokens[0, :8].nbytes)
  for kept in (tokens, of_blocks(blocks, tokens)):
    parts = grad(kept)
    assert set(asked) == {(2, 8)}
    asked.clear()
    helpers.assert_close(parts[1], whole[1], 5e-6, "values")
    helpers.assert_close(parts[0], whole[0], 5e-6, "gradients")


def test_the_stream_is_intact():
  """With queries reading, every bit of the stream is as without them."""
  backbone = helpers.tiny_backbone()
  images = helpers.tiny_examples(backbone, 5, 3)["image"]
  tuner = vqt_jax.make_tuner("vqt", backbone.config, 3, num_queries=4)
  variables = helpers.random_variables(tuner)

  @jax.jit
  def with_queries(variables):
    stream = tuner_lib.run_backbone(tuner.config, True, backbone.params, images)
    everything = {**variables, "backbone": backbone.params}
    out = tuner(everything, stream.tokens, stream.final)
    return stream, out.queries

  stream, queries = with_queries(variables)
  plain = jax.jit(
    lambda: vit.ViT(backbone.config).apply(
      {"params": backbone.params}, images, collect=("tokens",)
    )
  )()
  assert np.abs(queries).max() > 0
  for name in ("tokens", "encoded", "final"):
    np.testing.assert_array_equal(
      getattr(stream, name), getattr(plain, name), err_msg=name
    )


def test_queries_do_not_see_each_other():
  backbone = helpers.tiny_backbone()
  images = helpers.tiny_examples(backbone, 2, 3)["image"]
  many = vqt_jax.make_tuner("vqt", backbone.config, 3, num_queries=3)
  one = vqt_jax.make_tuner("vqt", backbone.config, 3, num_queries=1)
  queries = helpers.random_variables(many)["tuner"]["queries"]
  out = lambda tuner, queries: (
    vqt_jax.apply(
      backbone,
      tuner,
      {**helpers.random_variables(tuner), "tuner": {"queries": queries}},
      images,
    ).queries
  )
  together = out(many, queries)
  for t in range(3):
    alone = out(one, queries[:, t : t + 1])
    helpers.assert_close(together[:, :, t : t + 1], alone, 1e-6)


def test_attention_weights_are_those_of_reading():
  backbone = helpers.tiny_backbone()
  blocks = backbone.params["Transformer"]["encoderblock"]
  params = jax.tree.map(lambda x: x[0], blocks)
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((2, 10, 16)).astype(np.float32)
  queries = rng.standard_normal((3, 16)).astype(np.float32)
  block = vit.Block(backbone.config)
  weights = jax.jit(functools.partial(block.apply, method="attention_weights"))(
    {"params": params}, tokens, queries
  )
  assert weights.shape == (2, 2, 3, 10)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_normalize_has_no_nan_at_zero():
  sum_ = lambda x: head.normalize(x).sum()
  value, grad = jax.jit(jax.value_and_grad(sum_))(np.zeros(4, np.float32))
  assert value == 0
  np.testing.assert_allclose(grad, 1 / head.NORM_FLOOR, rtol=1e-5)


@pytest.mark.parametrize(
  "options, features",
  [
    ({}, 768 + 12 * 768),
    ({"num_queries": 10}, 92_928),
    ({"num_queries": 10, "combine": "mean"}, 768 * 13),
  ],
)
def test_sizes_for_vit_b(options, features):
  config = vit_config.ViTConfig(
    **vit_config.decode_variant("B/16"), image_size=(224, 224)
  )
  tuner = vqt_jax.make_tuner("vqt", config, 100, **options)
  shapes = jax.eval_shape(tuner.init, jax.random.key(0))
  queries = options.get("num_queries", 1)
  assert tuner.num_features == features
  assert shapes["head"]["kernel"].shape == (features, 100)
  assert shapes["tuner"]["queries"].shape == (12, queries, 768)


def test_initialisation_is_the_authors():
  """Queries uniform within 0.0625 for B/16; bias -log 99; std sqrt(2/C)."""
  config = vit_config.ViTConfig(
    **vit_config.decode_variant("B/16"), image_size=(224, 224)
  )
  tuner = vqt_jax.make_tuner("vqt", config, 100)
  variables = jax.jit(tuner.init)(jax.random.key(0))
  queries = np.asarray(variables["tuner"]["queries"])
  assert 0.0620 < np.abs(queries).max() <= 0.0625
  assert abs(queries.std() - 0.0625 / np.sqrt(3)) < 1e-3
  np.testing.assert_allclose(variables["head"]["bias"], -np.log(99), rtol=1e-6)
  assert abs(np.std(variables["head"]["kernel"]) - np.sqrt(2 / 100)) < 1e-3


def test_unknown_method_and_sizes():
  config = helpers.tiny_config()
  with pytest.raises(
    vqt_jax.UserError, match="vpq.*vqt, head2toe, combo, instant"
  ):
    vqt_jax.make_tuner("vpq", config, 3)
  with pytest.raises(vqt_jax.UserError, match="num_queries: .* found 0"):
    vqt_jax.make_tuner("vqt", config, 3, num_queries=0)


def test_a_stream_in_chunks_is_the_stream(monkeypatch):
  """A CPU computes a large batch in chunks, with the same result."""
  backbone = helpers.tiny_backbone()
  images = helpers.tiny_examples(backbone, 6, 3)["image"]

  def run():
    run_backbone = jax.jit(
      lambda x: vit.ViT(backbone.config).apply(
        {"params": backbone.params}, x, collect=("tokens", "blocks")
      )
    )
    return run_backbone(images)

  whole = run()
  monkeypatch.setattr(vit, "_LEAST_ROWS", 1)
  monkeypatch.setattr(
    chunks,
    "CACHE_BYTES",
    8 * backbone.config.num_tokens * backbone.config.mlp_dim,
  )
  asked = []
  split = chunks.split
  monkeypatch.setattr(
    chunks, "split", lambda x, count: asked.append(count) or split(x, count)
  )
  parts = run()
  assert set(asked) == {3}
  for name in ("tokens", "blocks", "final"):
    found, expected = getattr(parts, name), getattr(whole, name)
    helpers.assert_close(found, expected, 1e-6, name)
