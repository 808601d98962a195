"""Training steps: official trajectories, and the laws of running together."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.features import batches as batches_lib
from vqt_jax.features import images as images_lib
from vqt_jax.features import store
from vqt_jax.models import combo
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import optim
from vqt_jax.training import step as step_lib

TRAJECTORIES = [
  ("traj_adam", "adam", ""),
  ("traj_sgd", "sgd", ""),
  ("traj_adam_minibatch", "adam", ""),
  ("traj_no_weight_decay", "adam", "adam/"),
  ("traj_no_weight_decay", "sgd", "sgd/"),
]


@pytest.mark.parametrize("name, optimizer, prefix", TRAJECTORIES)
def test_trajectories_of_the_official_trainer(name, optimizer, prefix):
  golden = helpers.golden(name)
  get = lambda key: golden.get(prefix + key, golden.get(key))
  backbone = helpers.golden_backbone()
  tuner = vqt_jax.make_tuner("vqt", backbone.config, 7)
  recipe = step_lib.StaticSettings(optimizer)
  kernel, bias = get("init/head/kernel"), get("init/head/bias")
  start = {
    "tuner": {"queries": get("init/queries")},
    "head": {"kernel": kernel, "bias": bias},
  }
  start = jax.tree.map(lambda x: jnp.asarray(x)[None], start)
  trained, frozen = tuner_lib.partition(backbone.params, start)
  state = step_lib.init(tuner, recipe, backbone.params, np.zeros(1, np.uint32))
  state = state.replace(trained=trained)
  lr, decay = float(get("hparam/lr")), float(get("hparam/weight_decay"))
  settings = step_lib.Settings(jnp.array([lr]), jnp.array([decay]))
  data = {"image": golden["images"], "label": golden["labels"]}
  epochs = int(get("hparam/epochs"))
  factor = optim.schedule(epochs, int(get("hparam/warmup_epochs")))
  batch_size = 6 if "minibatch" in name else 16
  order, mask = batches_lib.batch_order(np.arange(16), batch_size, 1)
  if "minibatch" in name:
    assert mask.sum(1).tolist() == golden["batch_sizes"].tolist()
  for epoch in range(epochs):
    rate = float(factor(epoch))
    helpers.assert_close(rate * lr, get("lr_per_epoch")[epoch], 1e-6)
    state, losses, _ = step_lib.train_steps(
      tuner,
      recipe,
      state,
      frozen,
      settings,
      data,
      order,
      mask,
      jnp.full(len(order), rate),
    )
    loss = float(losses.sum()) / 16
    helpers.assert_close(loss, get("loss_per_epoch")[epoch], name="loss")
  trained = jax.tree.map(lambda x: x[0], state.trained)
  helpers.assert_close(trained["tuner"]["queries"], get("final/queries"))
  helpers.assert_close(trained["head"]["kernel"], get("final/head/kernel"))
  helpers.assert_close(trained["head"]["bias"], get("final/head/bias"))


def test_schedule_of_the_official_program():
  for name, expected in helpers.golden("schedule").items():
    if name.startswith("hardrestart"):
      continue
    epochs, warmup = map(int, name.split("_"))
    curve = optim.schedule(epochs, warmup)
    ours = [float(curve(epoch)) for epoch in range(epochs)]
    np.testing.assert_allclose(ours, expected, atol=2e-7, err_msg=name)


def test_adamw_decays_apart_from_the_moments():
  """A zero gradient moves nothing but the decay, and biases not at all."""
  params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
  grads = jax.tree.map(jnp.zeros_like, params)
  update = optim.optimizer("adamw", 0.1, 0.5)
  updates, _ = update.update(grads, update.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], 0)


class Case:
  """A tiny task on a tiny backbone, trained for a few steps.

  Cases of one method have the same settings, so that programs are shared.
  """

  def __init__(self, method="vqt", recipe=None, mesh=None):
    self.backbone = helpers.tiny_backbone()
    self.tuner = vqt_jax.make_tuner(
      method,
      self.backbone.config,
      5,
      num_queries=2,
      target_size=48,  # Of 10 tokens, 3 times 3.
    )
    self.recipe = recipe or step_lib.StaticSettings(query_dropout=True)
    self.examples = helpers.tiny_examples(self.backbone, 21, 5)
    self.mesh = mesh or single_device_mesh()
    self.params = sharding_lib.place_backbone(
      self.backbone.params, self.mesh, "float32"
    )
    variables = self.tuner.init(jax.random.key(0))
    self.frozen = tuner_lib.partition(self.params, variables)[1]

  def source(self, how):
    """All examples: "live", or features kept in one of three ways.

    On the "device", there as keys and values ("projected"), or on the "host".
    """
    rows = np.arange(21)
    if how == "live":
      held = images_lib.images_on_devices(self.examples, self.mesh, "float32")
      return batches_lib.ResidentBatches(held, rows, 8, 0, self.mesh)
    reads = self.tuner.reads_blocks
    layout = store.Layout(
      self.tuner.config, reads, "float32", self.mesh, self.tuner.window
    )
    images = np.pad(self.examples["image"], [(0, 3)] + 3 * [(0, 0)])
    batches = [{"image": images[i : i + 8]} for i in range(0, 24, 8)]
    parts = store.extract(layout, self.params, batches)
    label = self.examples["label"]
    if how == "host":
      kept = store.store_on_host(layout, parts, 21)
      return batches_lib.HostBatches(kept, label, rows, 8, 0)
    if how == "projected":
      layout = dataclasses.replace(layout, projected=True)
      parts = store.project(layout, self.params, parts)
    held = store.store_on_devices(layout, parts, label)
    return batches_lib.ResidentBatches(held, rows, 8, 0, self.mesh)

  def train(
    self,
    how="live",
    seeds=(3,),
    lr=(0.1,),
    decay=(1e-3,),
    epochs=3,
    normalize=None,
    dropout=None,
    kept=None,
    answers=True,
  ):
    """Train for some epochs, of which only the first may compile."""
    settings = step_lib.Settings(
      np.array(lr, np.float32),
      np.array(decay, np.float32),
      np.array(dropout or [0.2] * len(lr), np.float32),
      np.array(normalize or [True] * len(lr)),
      feature_mask=kept,
    )
    source = self.source(how)
    with jax.set_mesh(self.mesh):
      state = step_lib.init_on(self.mesh, self.tuner, self.recipe)(
        self.params, np.array(seeds, np.uint32)
      )
      with compilations("jit(train_steps)") as compiled:
        for epoch in range(epochs):
          losses = []
          for data, order, mask in source.epoch(epoch, 0):
            state, some, _ = step_lib.train_steps(
              self.tuner,
              self.recipe,
              state,
              self.frozen,
              settings,
              data,
              order,
              mask,
              np.full(len(order), 1.0, np.float32),
            )
            losses.append(some)
      assert len(compiled) <= 1
      ready = step_lib.TrainedTrials(
        {name: state.trained[name] for name in ("tuner", "head")},
        settings.normalize,
      )
      found = {"trained": state.trained, "loss": np.concatenate(losses)}
      if not answers:
        return jax.tree.map(np.asarray, found)
      answers = []
      for chunk in source.epoch(0, 0):
        label, (predicted,), _ = step_lib.eval_steps(
          (self.tuner,), (ready,), self.params, *chunk
        )
        answers.append(np.moveaxis(predicted, 1, -1)[label >= 0, :-1])
    found["answers"] = np.concatenate(answers).T
    return jax.tree.map(np.asarray, found)


@contextlib.contextmanager
def compilations(name):
  """Yield the list of compilations of a function, as they happen."""
  compiled = []

  def listen(event, seconds, **what):
    del seconds
    if "backend_compile" in event and what.get("fun_name") == name:
      compiled.append(what)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def single_device_mesh():
  auto = (jax.sharding.AxisType.Auto,) * 2
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  return jax.sharding.Mesh(devices, ("data", "model"), axis_types=auto)


def assert_trees_close(a, b, tolerance):
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    name = jax.tree_util.keystr(path)
    helpers.assert_close(x, y, tolerance, name)


@pytest.mark.parametrize(
  "method, how",
  [
    ("vqt", "device"),
    ("vqt", "projected"),
    ("vqt", "host"),
    ("head2toe", "device"),
    ("linear", "host"),
  ],
)
def test_stored_equals_live(method, how):
  case = Case(method)
  stored, live = case.train(how), case.train("live")
  assert_trees_close(stored, live, 1e-5)


@pytest.mark.parametrize(
  "how, selected", [("device", True), ("projected", False)]
)
def test_together_equals_alone(how, selected):
  case = Case()
  lr, decay, seeds = (0.1, 0.01, 0.1), (1e-3, 0.0, 0.1), (3, 3, 5)
  normalize, dropout = (True, False, True), (0.2, 0.5, 0.0)
  shape = (3, case.tuner.num_features)
  kept = np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)
  masks = lambda runs: kept[runs] if selected else None
  together = case.train(
    how, seeds, lr, decay, 3, normalize, dropout, masks(slice(3))
  )
  for i in range(3):
    one = slice(i, i + 1)
    alone = case.train(
      how,
      seeds[one],
      lr[one],
      decay[one],
      3,
      normalize[one],
      dropout[one],
      masks(one),
    )
    run = slice(i, i + 1)
    mine = {
      "trained": jax.tree.map(lambda x, r=run: x[r], together["trained"]),
      "loss": together["loss"][:, run],
      "answers": together["answers"][run],
    }
    assert_trees_close(mine, alone, 2e-5)


@pytest.mark.parametrize(
  "data, model, how, method",
  [
    (2, 2, "live", "vqt"),
    (4, 1, "host", "vqt"),
    (1, 4, "device", "vqt"),
    (2, 2, "device", "head2toe"),
  ],
)
def test_sharded_equals_single(data, model, how, method):
  single = Case(method).train(how)
  mesh = mesh_lib.make_mesh(data, model)
  sharded = Case(method, mesh=mesh).train(how)
  assert_trees_close(sharded["trained"], single["trained"], 2e-5)
  np.testing.assert_array_equal(sharded["answers"], single["answers"])


def test_rows_that_fill_up_a_batch_change_nothing(monkeypatch):
  """Masks of dropout are of the examples, however many follow."""
  case = Case()
  padded = case.source("device")
  expected = case.train("device")

  def longer(epoch, start):
    for data, order, mask in padded.epoch(epoch, start):
      pad = lambda x, **kw: np.pad(np.asarray(x), [(0, 0), (0, 3)], **kw)
      yield data, pad(order), pad(mask)

  monkeypatch.setattr(
    case, "source", lambda _: types.SimpleNamespace(epoch=longer)
  )
  found = case.train()
  assert_trees_close(found["trained"], expected["trained"], 2e-5)
  np.testing.assert_array_equal(found["answers"], expected["answers"])


def test_devices_of_a_process_follow_one_another():
  """On a TPU's links, in whose order JAX has them, hosts take turns."""

  @dataclasses.dataclass(frozen=True)
  class Device:
    process_index: int
    id: int
    platform: str = "tpu"

  devices = [Device(p, i) for i in range(4) for p in (1, 0, 3, 2)]
  for model in (1, 2):
    mesh = mesh_lib.make_mesh(-1, model, devices)
    order = [device.process_index for device in mesh.devices.flat]
    assert order == sorted(order) and mesh.shape["model"] == model


def test_editors_sharded_equal_single():
  """Each device has its own part of noise, and one share of the lasso."""
  method, data, model = "vqt+lora", 2, 2
  recipe = step_lib.StaticSettings(
    "sgd", query_dropout=True, embedding_dropout=0.1, lasso=1e-2
  )
  settings = dict(lr=(0.01,), epochs=2, answers=False)
  single = Case(method, recipe).train(**settings)
  mesh = mesh_lib.make_mesh(data, model)
  sharded = Case(method, recipe, mesh=mesh).train(**settings)
  assert_trees_close(sharded["trained"], single["trained"], 2e-5)
  assert_trees_close(sharded["loss"], single["loss"], 2e-5)


def test_a_network_over_an_editor_sharded_equals_single(monkeypatch):
  """Its dropout is that of the whole batch, not another on each device."""
  monkeypatch.setattr(combo, "LAYERS", 1)
  settings = dict(lr=(0.01,), epochs=1, answers=False)
  recipe = step_lib.StaticSettings("sgd")
  single = Case("combo+lora", recipe).train(**settings)
  sharded = Case("combo+lora", recipe, mesh=mesh_lib.make_mesh(2, 2))
  assert_trees_close(sharded.train(**settings), single, 2e-5)


def test_backbone_is_sharded_over_model():
  mesh = mesh_lib.make_mesh(2, 2)
  params = sharding_lib.place_backbone(
    helpers.tiny_backbone().params, mesh, "float32"
  )
  block = params["Transformer"]["encoderblock"]
  for leaf in (
    block["MlpBlock_0"]["Dense_0"]["kernel"],
    block["MlpBlock_0"]["Dense_1"]["kernel"],
    block["MultiHeadDotProductAttention_0"]["query"]["kernel"],
    block["MultiHeadDotProductAttention_0"]["out"]["kernel"],
  ):
    assert leaf.addressable_shards[0].data.size * 2 == leaf.size


def one_step(case, class_weights=None, weigh=None):
  """Losses and head after a step, with weights of classes or of examples."""
  settings = step_lib.Settings(
    np.array([0.1], np.float32),
    np.array([1e-3], np.float32),
    np.array([0.2], np.float32),
    np.array([True]),
    class_weights=class_weights,
  )
  with jax.set_mesh(case.mesh):
    state = step_lib.init_on(case.mesh, case.tuner, case.recipe)(
      case.params, np.array([3], np.uint32)
    )
    data, order, mask = next(case.source("live").epoch(0, 0))
    if weigh is not None:
      mask = mask * weigh[case.examples["label"][order]]
    first = np.arange(len(order)) == 0  # The others move nothing.
    state, losses, right = step_lib.train_steps(
      *(case.tuner, case.recipe, state, case.frozen, settings, data),
      *(order, mask, first.astype(np.float32)),
    )
  return np.asarray(losses)[:1], jax.tree.map(np.asarray, state.trained["head"])


def test_a_class_weighs_what_its_examples_would():
  case = Case()
  alike = one_step(case)
  ones = one_step(case, np.ones((1, 5), np.float32))
  for a, b in zip(jax.tree.leaves(alike), jax.tree.leaves(ones)):
    np.testing.assert_array_equal(a, b)
  first = next(case.source("live").epoch(0, 0))[1][0]
  count = np.bincount(case.examples["label"][first], minlength=5)
  weights = len(first) / (np.maximum(count, 1) * np.count_nonzero(count))
  weights = weights.astype(np.float32)
  loss, head = one_step(case, weights[None])
  expected_loss, expected_head = one_step(case, weigh=weights)
  assert np.abs(loss - alike[0]).max() > 1e-3
  helpers.assert_close(loss, expected_loss, 1e-6)
  assert_trees_close(head, expected_head, 1e-5)


def test_answers_are_the_largest_logits():
  case = Case()
  found = case.train(epochs=1)
  variables = {k: found["trained"][k] for k in ("tuner", "head")}
  out = vqt_jax.apply(
    case.backbone,
    case.tuner,
    jax.tree.map(lambda x: x[0], variables),
    case.examples["image"],
  )
  ((_, order, mask),) = case.source("live").epoch(0, 0)
  expected = np.argmax(out.logits, -1)[order[mask > 0]]
  np.testing.assert_array_equal(found["answers"], [expected])


def test_frozen_leaves_keep_their_bits_and_trained_ones_move():
  case = Case()
  before = jax.tree.map(np.array, case.params)
  start = case.train(epochs=1, lr=(0.0,))
  after = case.train(epochs=2)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(case.params)):
    np.testing.assert_array_equal(a, b)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(start["trained"]),
    jax.tree.leaves(after["trained"]),
  ):
    assert np.abs(a - b).max() > 0, path


def test_labels_decide_what_is_trained():
  case = Case()
  variables = {**case.tuner.init(jax.random.key(0)), "backbone": case.params}
  labels = tuner_lib.labels(variables)
  assert set(jax.tree.leaves(labels["backbone"])) == {"frozen"}
  assert set(jax.tree.leaves((labels["tuner"], labels["head"]))) == {"train"}
  trained, frozen = tuner_lib.split(variables, labels)
  assert len(jax.tree.leaves(trained)) == 3
  merged = tuner_lib.merge(trained, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(variables)


def test_embedding_dropout_makes_the_stream_noisy():
  recipe = step_lib.StaticSettings(query_dropout=True, embedding_dropout=0.1)
  quiet = Case().train(answers=False)
  noisy = Case(recipe=recipe).train(answers=False)
  assert np.abs(quiet["loss"] - noisy["loss"]).max() > 1e-4


def test_same_seed_same_bits_other_seed_other_run():
  a, b = Case().train("device"), Case().train("device")
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)
  c = Case().train("device", seeds=(4,))
  assert np.abs(a["loss"] - c["loss"]).max() > 1e-3


@pytest.mark.parametrize("devices", [1, 4])
def test_one_compilation_serves_all_epochs(devices):
  """As in `Case.train` in every test; here the program is a new one."""
  mesh = single_device_mesh() if devices == 1 else mesh_lib.make_mesh(1, 4)
  step_lib.train_steps.clear_cache()
  with compilations("jit(train_steps)") as compiled:
    Case(mesh=mesh).train("device", answers=False)
  assert len(compiled) == 1


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 30])
def test_order_holds_every_row_once(shards, batch_size):
  rows = np.arange(5, 26)
  order, mask = batches_lib.batch_order(rows, batch_size, shards, (0, 3))
  assert sorted(order[mask > 0].tolist()) == rows.tolist()
  assert order.shape[1] % shards == 0
  steps = -(-21 // batch_size)
  assert len(order) == steps
  assert mask.sum(1).max() <= batch_size
  again = batches_lib.batch_order(rows, batch_size, shards, (0, 3))[0]
  np.testing.assert_array_equal(order, again)
  other = batches_lib.batch_order(rows, batch_size, shards, (0, 4))[0]
  assert (order != other).any()
