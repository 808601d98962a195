"""One compiled, sharded training step for any number of trials at once.

Everything trained has a leading axis R, one entry per trial: `vmap` over it
computes or reads the frozen stream, which no trial changes, once for all. Only
trained leaves get gradients, and only the reading is differentiated: the
backbone runs before differentiation begins. With an editor each trial has a
stream of its own, and gradients go through it.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from vqt_jax.models import head
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import optim

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StaticSettings:
  """Settings that are compiled into the step.

  Attributes:
    optimizer: "adam", "sgd" or "adamw".
    query_dropout: whether elements of the queries drop out, per example.
    embedding_dropout: dropout rate of the embedded tokens, 0.1 in the official
      program. If it is not 0 the stream is noisy and cannot be stored.
    lasso: weight of the group lasso on the head's rows.
    trains: parts of the variables that train.
    editor_rate: learning rate of an editor's leaves, times `lr`.
    remat: whether the blocks that an editor changes are recomputed for the
      gradient, rather than kept.
  """

  optimizer: str = "adam"
  query_dropout: bool = False
  embedding_dropout: float = 0.0
  lasso: float = 0.0
  trains: tuple[str, ...] = tuner_lib.TRAINED
  editor_rate: float = 1.0
  remat: bool = False

  def update_rule(
    self, lr: jax.typing.ArrayLike, weight_decay: jax.typing.ArrayLike
  ) -> optax.GradientTransformation:
    return optim.optimizer(self.optimizer, lr, weight_decay, self.editor_rate)


@flax.struct.dataclass
class State:
  """State of training; leaves have the trial axis R in front.

  Attributes:
    trained: variables, with `optax.MaskedNode` for frozen leaves.
    opt_state: of the optimiser.
    key: (R,) typed keys.
    step: steps taken, () int32.
  """

  trained: Any
  opt_state: Any
  key: jax.Array
  step: jax.Array


@flax.struct.dataclass
class Settings:
  """Settings that differ between trials and are traced; (R, ...) each.

  Attributes:
    lr: (R,) float32, peak learning rate.
    weight_decay: (R,) float32.
    query_dropout: (R,) float32, rate; None: queries do not drop out.
    normalize: (R,) bool, whether feature groups are divided by their norms.
    frozen_parts: those of "tuner" and "head" that do not train.
    feature_mask: (R, F) float32, 0 for features left out; None: all in use.
    class_weights: (R, C) float32, of the loss; None: all classes weigh 1.
  """

  lr: jax.Array
  weight_decay: jax.Array
  query_dropout: jax.Array | None = None
  normalize: jax.Array | None = None
  frozen_parts: dict[str, Any] = flax.struct.field(default_factory=dict)
  feature_mask: jax.Array | None = None
  class_weights: jax.Array | None = None


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(
  tuner: tuner_lib.Tuner, static: StaticSettings, params: Any, seeds: jax.Array
) -> State:
  """Initialise trials with seeds (R,) uint32 on the backbone `params`."""

  def one(seed):
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = tuner.init(init_key, params)
    trained, _ = tuner_lib.partition(params, variables, static.trains)
    opt_state = static.update_rule(1.0, 0.0).init(trained)
    return trained, opt_state, key

  trained, opt_state, key = jax.vmap(one)(seeds)
  return State(trained, opt_state, key, jnp.zeros((), jnp.int32))


@functools.cache
def init_on(
  mesh: jax.sharding.Mesh, tuner: tuner_lib.Tuner, static: StaticSettings
) -> Callable[[Any, jax.Array], State]:
  """Compile `init` with its result replicated over a mesh."""
  return jax.jit(
    functools.partial(init, tuner, static),
    out_shardings=mesh_lib.replicated_sharding(mesh),
  )


@functools.cache
def draw_on(
  mesh: jax.sharding.Mesh, tuner: tuner_lib.Tuner
) -> Callable[[int], dict[str, Any]]:
  """Compile the function from a seed to {"tuner", "head"} as `init` draws them.

  Without an editor, so the backbone is not needed. Replicated over a mesh.
  """

  def draw(seed):
    init_key, _ = jax.random.split(jax.random.key(seed))
    return tuner.init(init_key)

  place = mesh_lib.replicated_sharding(mesh)
  compiled = jax.jit(draw, out_shardings=place)
  return lambda seed: compiled(np.uint32(seed))


def take_rows(state: State, rows: np.ndarray) -> State:
  """Return a state with some rows of all heads, and of their moments."""
  return _map_kernels(lambda kernel: kernel[:, rows], state)


def spread_rows(state: State, rows: np.ndarray, num_features: int) -> State:
  """Return a state with all F rows of all heads; other rows are 0."""

  def spread(kernel):
    trials, _, classes = kernel.shape
    whole = jnp.zeros((trials, num_features, classes), kernel.dtype)
    return whole.at[:, rows].set(kernel)

  return _map_kernels(spread, state)


def _map_kernels(function: Callable[[jax.Array], jax.Array], state: State):
  def change(path, leaf):
    ends = [getattr(key, "key", None) for key in path[-2:]]
    return function(leaf) if ends == ["head", "kernel"] else leaf

  return jax.tree_util.tree_map_with_path(change, state)


def take(data: Batch, index: jax.Array) -> Batch:
  """Gather rows of resident data; "tokens" stay whole, with "rows" to read."""
  batch = {
    name: mesh_lib.constrain(jnp.take(values, index, axis=0), "data")
    for name, values in data.items()
    if name != "tokens"
  }
  if "tokens" in data:
    batch |= {"tokens": data["tokens"], "rows": index}
  return batch


def _keep_mask(key: jax.Array, rate: Any, shape: tuple[int, ...]):
  """Multiplier of inverted dropout: 0 or 1 / (1 - rate)."""
  return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _tokens_and_final(tuner, variables, batch, remat=False):
  """Return (tokens, rows to read of them, final feature) of a batch.

  From the store if the batch has its features, else from the backbone.
  """
  if "features" in batch:  # Of the head: all is read.
    return None, None, batch["features"]
  if "final" in batch:
    return batch.get("tokens"), batch.get("rows"), batch["final"]
  images = batch["image"]
  images = images.reshape(len(images), *tuner.config.image_size, 3)
  mask = batch.get("embedding_mask")
  stream = tuner.stream(variables, images, mask, remat)
  return stream.tokens, None, stream.final


def _by_device(gradient):
  """Take the gradient per device, and sum over the devices once at the end.

  Through the stream, gradients of the blocks come from a loop; left to itself
  the compiler sums them over the devices in every iteration.
  """

  def summed(trained, batch):
    specs = {
      name: P(None, "data") if name == "query_mask" else P("data")
      for name in batch
    }

    def of_part(trained, batch):
      return jax.lax.psum(gradient(trained, batch), "data")

    return jax.shard_map(
      of_part,
      in_specs=(P(), specs),
      out_specs=P(),
      axis_names={"data"},
      check_vma=False,  # With it, shard_map inserts sums of its own.
    )(trained, batch)

  return summed


def _score(logits, batch, class_weights):
  """Sum loss and correct predictions over the real examples of a batch."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  )
  if class_weights is not None:
    losses *= class_weights[batch["label"]]
  right = jnp.argmax(logits, axis=-1) == batch["label"]
  return jnp.sum(losses * batch["mask"]), jnp.sum(right * batch["mask"])


def run_step(
  tuner: tuner_lib.Tuner,
  static: StaticSettings,
  frozen: Any,
  batch: Batch,
  step: jax.Array,
  trained: Any,
  opt_state: Any,
  key: jax.Array,
  settings: Settings,
) -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
  """Update one trial; return its state and (loss sum, number correct)."""
  batch = dict(batch)
  key = jax.random.fold_in(key, step)
  embed_key, query_key = jax.random.split(key)
  reader_key = jax.random.fold_in(key, 2)  # Leaves the other two as before.
  config, size = tuner.config, len(batch["label"])
  if static.embedding_dropout and "image" in batch:
    shape = (size, config.num_tokens, config.width)
    batch["embedding_mask"] = _keep_mask(
      embed_key, static.embedding_dropout, shape
    )
  if tuner.has_queries and static.query_dropout:
    # Drawn with examples in front, so that padding changes no other mask.
    shape = (size, config.depth, tuner.num_queries, config.width)
    mask = _keep_mask(query_key, settings.query_dropout, shape)
    batch["query_mask"] = jnp.moveaxis(mask, 0, 1)
  if not tuner.editor:
    seen = _tokens_and_final(tuner, frozen, batch, static.remat)
  count = jnp.maximum(batch["mask"].sum(), 1)
  # A network draws its dropout itself, and must do so for the whole batch.
  by_device = tuner.editor and not tuner.reader.is_network
  devices = mesh_lib.axis_size("data") if by_device else 1

  def objective(trained, batch):
    variables = {**tuner_lib.merge(trained, frozen), **settings.frozen_parts}
    if settings.feature_mask is not None:
      variables["head"] = head.mask_features(
        variables["head"], settings.feature_mask
      )
    tokens, rows, final = (
      _tokens_and_final(tuner, variables, batch, static.remat)
      if tuner.editor
      else seen
    )
    logits = tuner(
      variables,
      tokens,
      final,
      batch.get("query_mask"),
      settings.normalize,
      rows,
      reader_key,
    ).logits
    total, right = _score(logits, batch, settings.class_weights)
    loss = total / count
    if static.lasso:
      scores = head.feature_scores(variables["head"])
      loss += static.lasso * scores.sum() / devices
    return loss, (total, right)

  gradient = jax.grad(objective, has_aux=True)
  if devices > 1:
    gradient = _by_device(gradient)
  grads, sums = gradient(trained, batch)
  lr, weight_decay = settings.lr, settings.weight_decay
  update = static.update_rule(lr, weight_decay).update
  updates, opt_state = update(grads, opt_state, trained)
  return optax.apply_updates(trained, updates), opt_state, sums


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_steps(
  tuner: tuner_lib.Tuner,
  static: StaticSettings,
  state: State,
  frozen: Any,
  settings: Settings,
  data: Batch,
  order: jax.Array,
  mask: jax.Array,
  factor: jax.Array,
  count: jax.typing.ArrayLike | None = None,
) -> tuple[State, jax.Array, jax.Array]:
  """Take up to S steps in one call.

  Args:
    tuner: the method.
    static: settings that are compiled in.
    state: donated.
    frozen: frozen leaves, see `tuner.partition`.
    settings: of the trials.
    data: resident examples: images, or what is in the store (tokens, or their
      keys and values, and final features; or features of the head). Images only
      with an editor.
    order: (S, B) int32 rows of `data`.
    mask: (S, B) float32, 0 for rows that only fill up the last batch.
    factor: (S,) float32, factors of the peak learning rates.
    count: number of the S steps to take, () int32; None: all. One compiled
      program serves all counts, and the bits do not depend on it.

  Returns:
    The state; summed losses (S, R); numbers of correct examples (S, R). Both
    are 0 for steps that were not taken.
  """

  def one(trained, opt_state, key, settings, batch, step):
    return run_step(
      tuner, static, frozen, batch, step, trained, opt_state, key, settings
    )

  together = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None))

  def body(i, carry):
    state, done = carry
    rows = mesh_lib.constrain(mask[i], "data")
    batch = {**take(data, order[i]), "mask": rows}
    now = settings.replace(lr=settings.lr * factor[i])
    trained, opt_state, sums = together(
      state.trained, state.opt_state, state.key, now, batch, state.step
    )
    state = State(trained, opt_state, state.key, state.step + 1)
    return state, tuple(x.at[i].set(new) for x, new in zip(done, sums))

  steps = len(order)
  done = (jnp.zeros((steps, len(settings.lr))),) * 2
  state, (losses, right) = jax.lax.fori_loop(
    0, steps if count is None else count, body, (state, done)
  )
  return mesh_lib.constrain((state, losses, right))  # Replicated.


def step_bytes(*args: Any) -> int | None:
  """Return the bytes that `train_steps` of these arguments takes on a device.

  Arguments (backbone and resident data among them), results and temporaries, as
  the compiler counts them; None if it does not. After a call of `train_steps`
  nothing is compiled again.
  """
  found = train_steps.lower(*args).compile().memory_analysis()
  if found is None:
    return None
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes + new


@functools.partial(jax.jit, static_argnums=0)
def features_of(
  tuner: tuner_lib.Tuner,
  variables: Any,
  normalize: jax.typing.ArrayLike,
  params: Any,
  data: Batch,
  order: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the features of a batch that the head of a tuner sees.

  Args:
    tuner: the method, without an editor.
    variables: {"tuner", "head"} of one trial.
    normalize: as in `Settings`, of one trial.
    params: of the backbone.
    data: examples, resident or one batch.
    order: (B,) int32 rows of `data`.
    mask: (B,) float32, 0 for rows that only fill up a batch.

  Returns:
    Features (B, F), labels and mask, replicated.
  """
  batch = take(data, order)
  variables = {**variables, "backbone": params}
  tokens, rows, final = _tokens_and_final(tuner, variables, batch)
  found = tuner(variables, tokens, final, None, normalize, rows)
  return mesh_lib.constrain((found.features, batch["label"], mask))


@flax.struct.dataclass
class TrainedTrials:
  """Trained trials of one tuner, to be evaluated.

  Attributes:
    variables: {"tuner", "head"}, leaves (R, ...).
    normalize: (R,) bool, as in `Settings`.
  """

  variables: Any
  normalize: jax.Array | None = None


@functools.partial(jax.jit, static_argnums=0)
def eval_steps(
  tuners: tuple[tuner_lib.Tuner, ...],
  ready: tuple[TrainedTrials, ...],
  params: Any,
  data: Batch,
  order: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Classify with all trials of several tuners in one pass of the stream.

  Trials of an editor, whose streams differ, take one pass each.

  Args:
    tuners: on one backbone and with one editor, if any; the first one reads
      everything that any of them reads.
    ready: trained trials of each tuner.
    params: of the backbone.
    data: examples with "label", resident or one batch.
    order: (S, B) int32 rows of `data`.
    mask: (S, B) float32.

  Returns:
    Labels (S, B); of each tuner the predicted classes (S, R + 1, B) of each
    trial and, last, by the mean of the trials' probabilities; and of each tuner
    that of the last class (S, B), float32. Labels and classes are int32, -1
    where a row only fills up the batch.
  """

  def body(_, inputs):
    index, mask = inputs
    batch, real = take(data, index), mesh_lib.constrain(mask, "data") > 0
    if not tuners[0].editor:
      seen = _tokens_and_final(tuners[0], {"backbone": params}, batch)

    def one(tuner, ready):
      variables = {**ready.variables, "backbone": params}
      own = tuner.editor and _tokens_and_final(tuner, variables, batch)
      tokens, rows, final = own or seen
      return tuner(variables, tokens, final, None, ready.normalize, rows).logits

    def every(tuner, trials):
      run = functools.partial(one, tuner)
      run = (
        functools.partial(jax.lax.map, run) if tuner.editor else jax.vmap(run)
      )
      logits = run(trials)
      together = jax.nn.softmax(logits).mean(axis=0, keepdims=True)
      predicted = jnp.argmax(jnp.concatenate([logits, together]), axis=-1)
      return jnp.where(real, predicted, -1), together[0].max(axis=-1)

    predicted, probability = zip(*map(every, tuners, ready))
    return None, (jnp.where(real, batch["label"], -1), predicted, probability)

  predictions = jax.lax.scan(body, None, (order, mask))[1]
  return mesh_lib.constrain(predictions)  # Replicated.
