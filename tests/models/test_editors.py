"""Editors: goldens of the official program, and the laws of what trains."""

import dataclasses
import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import cases
import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.config import fields
from vqt_jax.models import editors
from vqt_jax.models import head
from vqt_jax.models import methods
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.training import optim
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial_memory

# What is inserted before anything is trained, for B/16 and 100 classes: the
# formula in depth L, width D, MLP M, and the numbers of the papers' tables.
L, D, M = 12, 768, 3072
BLOCK = 4 * D * (D + 1) + D * (M + 1) + M * (D + 1) + 4 * D
INSERTED = {
  "linear": 0,
  "vqt": L * D,
  "head2toe": 0,
  "finetune": L * BLOCK + 2 * D + (768 + 1 + 196 + 1) * D,  # 85.8 M
  "bitfit": (L * 11 + 2) * D,  # 0.10 M
  "partial": BLOCK + 2 * D,
  "vpt_shallow": 10 * D,
  "vpt_deep": L * 10 * D,
  "adapter": L * (2 * D * D // 8 + D // 8 + D),
  "adaptformer": L * (2 * D * 64 + 64 + D),  # 1.19 M
  "lora": L * 2 * 2 * D * 8,  # 0.29 M
  "ssf": 2 * (L * 11 + 2) * D,  # 0.21 M
  "vqt+vpt_deep": L * D + L * 10 * D,
  "vqt+adaptformer": L * D + L * (2 * D * 64 + 64 + D),
  "head2toe+lora": L * 2 * 2 * D * 8,
}
# Features of a block, in D.
PER_BLOCK = {"vqt": 1, "head2toe": 197 // (197 * D // 8192)}
# Every editor, some of them with another reader.
READ_BY = {
  "vpt_deep": "vqt+",
  "ssf": "vqt+",
  "lora": "head2toe+",
  "vpt_shallow": "head2toe+",
}
TRAINED = ["head2toe", *(READ_BY.get(e, "") + e for e in editors.EDITORS)]
CLASSES = 5
SEEDS = np.array([3, 4], np.uint32)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(tuner, remat, params, variables, images, labels):
  def objective(variables):
    everything = {**variables, "backbone": params}
    stream = tuner.stream(everything, images, remat=remat)
    logits = tuner(everything, stream.tokens, stream.final).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits

  return jax.value_and_grad(objective, has_aux=True)(variables)


def gradients(tuner, backbone, variables, golden, remat=False):
  """(loss, logits), gradients of {"tuner", "head"}."""
  batch = golden["images"], golden["labels"]
  return _gradients(tuner, remat, backbone.params, variables, *batch)


def golden_tuner(name, backbone):
  return vqt_jax.make_tuner(name, backbone.config, 7, num_prompts=5)


def head_of(golden):
  return {n: golden[f"head/{n}"] for n in ("kernel", "bias")}


@pytest.mark.parametrize(
  "name, remat",
  [
    ("vpt_shallow", False),
    ("vpt_deep", True),
    ("adapter", False),
    ("adaptformer", True),
  ],
)
def test_gradients_equal_the_official_program(name, remat):
  golden = helpers.golden(name)
  backbone = helpers.golden_backbone()
  tuner = golden_tuner(name, backbone)
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
  fresh = jax.jit(tuner.init)(jax.random.key(0), backbone.params)
  variables = {**fresh, "head": head_of(golden)}
  (loss, logits), grads = gradients(tuner, backbone, variables, golden)
  helpers.assert_close(loss, golden["loss"], name="loss")
  helpers.assert_close(logits, golden["logits"], name="logits")
  # Gradients have the shapes of weights: the loader knows the layout.
  prefix = "grad/backbone/"
  np.savez(
    tmp_path / "grads.npz",
    **{
      key.removeprefix(prefix): value
      for key, value in golden.items()
      if key.startswith(prefix)
    },
  )
  expected = vqt_jax.load_backbone(tmp_path / "grads.npz", gelu="exact").params
  expected["cls"] = golden[f"{prefix}cls"]  # Loading adds its position to it.
  jax.tree.map(
    helpers.assert_close, grads["tuner"]["editor"]["backbone"], expected
  )


def test_the_official_initialisation_of_adapters_is_dead():
  """With zeros everywhere only the up bias gets a gradient; not with ours."""
  golden = helpers.golden("adapter")
  backbone = helpers.golden_backbone()
  tuner = golden_tuner("adapter", backbone)
  ours = jax.jit(tuner.init)(jax.random.key(0))["tuner"]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), ours)
  (loss, logits), grads = gradients(
    tuner, backbone, {"tuner": zeros, "head": head_of(golden)}, golden
  )
  helpers.assert_close(logits, golden["official_init/logits"])
  helpers.assert_close(loss, golden["official_init/loss"])
  grads = grads["tuner"]["editor"]["encoderblock"]["MlpBlock_0"]
  up = grads["up"].pop("bias")
  helpers.assert_close(up, golden["official_init/grad/adapter/up_bias"])
  assert not any(np.abs(x).max() for x in jax.tree.leaves(grads))
  _, grads = gradients(
    tuner, backbone, {"tuner": ours, "head": head_of(golden)}, golden
  )
  grads = grads["tuner"]["editor"]["encoderblock"]["MlpBlock_0"]
  assert np.abs(grads["up"]["kernel"]).max() > 0


def tiny_tuner(method, backbone):
  options = editors.Options(num_prompts=2, bottleneck=3, rank=2)
  return vqt_jax.make_tuner(
    method, backbone.config, CLASSES, options=options, target_size=48
  )


def train(tuner, backbone, seeds, recipe, steps=3):
  """Runs side by side; {"tuner", "head"} before and after, leaves (R, ...)."""
  examples = helpers.tiny_examples(backbone, 8, CLASSES)
  state = step_lib.init(tuner, recipe, backbone.params, seeds)
  start = jax.tree.map(np.array, state.trained)
  settings = step_lib.Settings(
    np.full(len(seeds), 0.01, np.float32),
    np.full(len(seeds), 1e-3, np.float32),
    normalize=np.ones(len(seeds), bool),
  )
  order = np.tile(np.arange(8, dtype=np.int32), (steps, 1))
  frozen = tuner_lib.partition(backbone.params, tuner.shapes())[1]
  state, losses, _ = step_lib.train_steps(
    tuner,
    recipe,
    state,
    frozen,
    settings,
    examples,
    order,
    np.ones(order.shape, np.float32),
    np.ones(steps, np.float32),
  )
  own = lambda tree: {name: tree[name] for name in tuner_lib.TRAINED}
  return own(start), jax.tree.map(np.array, own(state.trained)), losses


@functools.cache
def trained(method):
  backbone = helpers.tiny_backbone()
  tuner = tiny_tuner(method, backbone)
  start, end, _ = train(
    tuner, backbone, SEEDS, step_lib.StaticSettings("adamw")
  )
  return backbone, tuner, start, end


def run_of(tree, run):
  return jax.tree.map(lambda x: x[run], tree)


def test_methods_listed_are_methods_tested():
  tested = {m for m in INSERTED if "+" not in m}
  own_tests = {"instant", "combo", "auto"}  # test_exact, test_combo, test_auto
  assert set(methods.NAMES) == tested | own_tests


@pytest.mark.parametrize("method", INSERTED)
def test_sizes_for_vit_b_are_the_papers(method):
  config = vit_config.ViTConfig(
    **vit_config.decode_variant("B/16"), image_size=(224, 224)
  )
  shapes = vqt_jax.make_tuner(method, config, 100).shapes()
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert size(shapes["tuner"]) == INSERTED[method]
  reader = methods.parse(method).reader
  features = D * (1 + L * PER_BLOCK.get(reader, 0))
  assert size(shapes["head"]) == (features + 1) * 100


@pytest.mark.parametrize("method", TRAINED)
def test_trained_leaves_move_and_the_backbone_keeps_its_bits(method):
  backbone, _, start, end = trained(method)
  for leaf, same in zip(
    jax.tree.leaves(backbone.params),
    jax.tree.leaves(helpers.tiny_backbone().params),
  ):
    np.testing.assert_array_equal(leaf, same)
  change = lambda a, b: np.abs(a - b).max((0, -1)).min()
  moved = jax.tree.map(change, start, end)
  for name, least in runs.flat(moved).items():
    assert least > 0, name
  assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), end))


@pytest.mark.parametrize("method", [m for m in TRAINED if "vpt" not in m])
def test_training_starts_from_the_backbone_as_it_is(method):
  backbone, tuner, start, _ = trained(method)
  images = helpers.tiny_examples(backbone, 3, CLASSES)["image"]
  out = vqt_jax.apply(backbone, tuner, run_of(start, 0), images)
  final = backbone(images).final
  if tuner.reads_blocks:
    final = head.normalize(final)
  found = out.features[:, : backbone.config.width]
  helpers.assert_close(found, final, 1e-6)


@pytest.mark.parametrize(
  "name", ["adapter", "adaptformer", "lora", "ssf", "vpt_deep"]
)
def test_a_query_passes_through_an_edited_block_as_a_token_would(name):
  backbone = helpers.tiny_backbone()
  tuner = tiny_tuner(name, backbone)
  rng = np.random.default_rng(0)
  own = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape[1:]).astype(np.float32),
    tuner.shapes()["tuner"]["editor"]["encoderblock"],
  )
  blocks = backbone.params["Transformer"]["encoderblock"]
  params = {"params": jax.tree.map(lambda x: x[0], blocks)}
  block = vit.Block(backbone.config, ("tokens",), tuner.edit)
  z = rng.standard_normal((2, 12, 16)).astype(np.float32)

  @jax.jit
  def both(z):
    after, seen = block.apply(params, z, own)
    read = block.apply(params, seen["tokens"], z[:, 5:8], own, method="read")
    return after[:, 5:8], read

  helpers.assert_close(*both(z), 1e-5)


def test_of_a_leaf_in_part_only_the_last_rows_train():
  backbone, _, start, end = trained("partial")
  copies = end["tuner"]["editor"]["backbone"]["Transformer"]
  assert set(copies) == {"encoderblock", "encoder_norm"}
  blocks = backbone.params["Transformer"]["encoderblock"]
  for copy, leaf in zip(
    jax.tree.leaves(copies["encoderblock"]), jax.tree.leaves(blocks)
  ):
    assert copy[0].shape == (1, *leaf.shape[1:])
  own = run_of(end["tuner"]["editor"], 0)
  params = jax.jit(editors.apply_copies)(backbone.params, own)
  for new, old in zip(
    jax.tree.leaves(params["Transformer"]["encoderblock"]),
    jax.tree.leaves(blocks),
  ):
    np.testing.assert_array_equal(new[:-1], old[:-1])
    assert np.abs(new[-1] - old[-1]).max() > 0


def test_together_equals_alone_and_rematerialised():
  backbone, tuner, _, together = trained("head2toe+lora")
  recipe = step_lib.StaticSettings("adamw", remat=True)
  _, alone, _ = train(tuner, backbone, SEEDS[1:], recipe)
  jax.tree.map(helpers.assert_close, run_of(together, [1]), alone)


def test_editors_move_at_their_own_rate():
  ones = lambda: {"kernel": jnp.ones(3)}
  params = {"tuner": {"editor": {"x": ones()}}, "head": ones()}
  for name in fields.OPTIMIZERS:
    rule = optim.optimizer(name, 0.1, 0.5, editor_rate=0.25)
    updates, _ = rule.update(params, rule.init(params), params)
    slow = updates["tuner"]["editor"]["x"]["kernel"]
    np.testing.assert_allclose(slow, 0.25 * updates["head"]["kernel"])
    assert (np.abs(slow) > 1e-3).all()


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_shipped_does_what_was_trained(method, tmp_path):
  """From its file, and folded into a plain ViT where that can be."""
  backbone, tuner, _, end = trained(method)
  backbone = dataclasses.replace(backbone, source="tiny")
  vqt_jax.save_npz(tmp_path / "vit.npz", backbone)
  variables = run_of(end, 1)
  images = helpers.tiny_examples(backbone, 3, CLASSES)["image"]
  logits = vqt_jax.apply(backbone, tuner, variables, images).logits
  model = helpers.tuned_model(backbone, tuner, variables)
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit.npz", model)
  loaded = vqt_jax.load(tmp_path / "tuned")
  assert loaded.tuner == tuner
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[0], y),
    loaded.variables,
    variables,
  )
  if tuner.editor and not editors.can_fold(tuner.editor):
    helpers.assert_close(loaded(images)[0], logits, 1e-6)
    with pytest.raises(vqt_jax.UserError, match="a plain ViT"):
      loaded.folded()
    return
  folded = loaded.folded()
  vqt_jax.save_npz(tmp_path / "folded.npz", folded.backbone)
  again = vqt_jax.load_backbone(
    tmp_path / "folded.npz", image_size=backbone.config.image_size
  )
  assert not folded.tuner.editor
  assert folded.tuner.method == methods.parse(method).reader
  again = dataclasses.replace(folded, backbone=again)
  helpers.assert_close(again(images)[0], logits, 1e-5)


@pytest.mark.parametrize("pool_type", ["gap", "mae", "map", "0"])
def test_prompts_are_not_pooled(pool_type):
  """They go through the blocks, and the stream ends as long as it began."""
  backbone = helpers.tiny_backbone(pool_type=pool_type)
  tuner = tiny_tuner("vqt+vpt_shallow", backbone)
  images = helpers.tiny_examples(backbone, 2, CLASSES)["image"]
  variables = {**tuner.shapes(), "backbone": backbone.params}
  stream = jax.eval_shape(tuner.stream, variables, images)
  tokens = backbone.config.num_tokens
  assert stream.tokens.shape[2] == tokens + 2
  assert stream.encoded.shape == (2, tokens, backbone.config.width)
  if pool_type == "gap":
    own = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), tuner.shapes())
    stream = jax.jit(tuner.stream)({**variables, **own}, images)
    np.testing.assert_allclose(stream.encoded.mean(1), stream.final, 1e-5)
  if pool_type == "0":  # What was the first patch.
    z = np.arange(tokens + 2)[None, :, None]
    assert tuner.edit("output", {}, None, z)[0, 0, 0] == 2


def test_attention_of_edited_keys_sums_to_one():
  backbone, tuner, _, end = trained("vqt+ssf")
  model = helpers.tuned_model(backbone, tuner, run_of(end, 0))
  images = helpers.tiny_examples(backbone, 2, CLASSES)["image"]
  folded = model.folded().attention(images)
  helpers.assert_close(model.attention(images), folded, 1e-5)


def test_copies_need_the_backbone():
  tuner = tiny_tuner("finetune", helpers.tiny_backbone())
  with pytest.raises(ValueError, match="give its params"):
    tuner.init(jax.random.key(0))
  config = helpers.tiny_config()
  with pytest.raises(vqt_jax.UserError, match="last_blocks of at most 3"):
    vqt_jax.make_tuner(
      "partial", config, 3, options=editors.Options(last_blocks=4)
    )


@pytest.mark.parametrize("remat", [False, True])
def test_memory_of_a_run_is_foreseen(remat):
  """And blocks that are computed again need less."""
  config = cases.vit_config("S/16", 64, "float32")
  tuner = vqt_jax.make_tuner("lora", config, cases.NUM_CLASSES)
  case = cases.train(tuner, 32, remat=remat)
  shapes = case.shapes()
  state = shapes[len(case.static)]
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  compiled = case.function.lower(*shapes).compile()
  needed = compiled.memory_analysis().temp_size_in_bytes + held
  foreseen = trial_memory.bytes_per_trial(tuner, 32, remat)
  assert 1 < foreseen / needed < 2
  kept = trial_memory.bytes_per_trial(tuner, 32)
  assert not remat or 4 * needed < kept


def test_a_run_is_resumed_to_the_bit(material, tmp_path, monkeypatch, capfd):
  """Queries and prompts, through the backbone in every step."""
  changes = dict(
    method="vqt+vpt_deep",
    lr="0.5,",
    epochs=2,
    num_prompts=2,
    remat=True,
  )

  def start(name):
    argv = runs.command(material, tmp_path / name, **changes)
    return main.main(argv), capfd.readouterr().err

  status, said = start("alone")
  assert status == 0
  assert "vqt+vpt_deep changes features in every step" in said
  assert "vpt_deep 96, queries 3 x 1 x 16, head 64 x 3" in said
  assert "inputs -1..1 (--config.value_range), tanh GELU" in said
  with monkeypatch.context() as patch:
    train = "vqt_jax.training.step:train_steps"
    runs.signal_on_call(patch.setattr, train, 1, signal.SIGTERM)
    status, said = start("a")
  assert status == 75 and "resume with" in said
  status, said = start("a")
  assert status == 0 and "resume   seeds after epoch 0" in said
  assert runs.bits(tmp_path / "a") == runs.bits(tmp_path / "alone")
