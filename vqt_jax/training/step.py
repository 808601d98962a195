"""One compiled, sharded training step for any number of runs at once.

Runs (a setting and a seed each) ride together on a leading axis R of
everything trained: `vmap` over them leaves the frozen stream, which none of
them changes, computed or read once for all. Gradients are taken with respect
to trained leaves only, and of the reading only: the backbone runs before
differentiation begins. An editor's stream is another for each run, and the
gradient goes through it.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from vqt_jax.models import head
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import optim

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StaticSettings:
  """What of a recipe is compiled in.

  Attributes:
    optimizer: "adam", "sgd" or "adamw".
    query_dropout: whether elements of the queries drop out, per example.
    embedding_dropout: rate of the same for the embedded tokens; the official
      program has 0.1. Not 0 makes the stream noisy, so it cannot come from a
      store.
    lasso: weight of the group lasso on the head's rows.
    trains: the parts whose leaves train.
    editor_rate: of what an editor trains, times the learning rate.
    remat: whether the blocks that an editor changes are computed again for the
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
  """All that changes in training; leaves lead with the runs' axis R.

  Attributes:
    trained: what the mask lets train, with holes for the frozen leaves.
    opt_state: the optimiser's.
    key: (R,) typed keys, one per run.
    step: steps taken, () int32.
  """

  trained: Any
  opt_state: Any
  key: jax.Array
  step: jax.Array


@flax.struct.dataclass
class Settings:
  """What differs between runs and stays as it is, traced; (R, ...) each.

  Attributes:
    lr: (R,) float32, peak learning rate.
    weight_decay: (R,) float32.
    query_dropout: (R,) float32, rate; None if queries do not drop out.
    normalize: (R,) bool, whether feature groups are divided by their norms.
    held: those of "tuner" and "head" that do not train, leaves (R, ...).
    kept: (R, F) float32, 0 where a feature is left out; None: all are kept.
  """

  lr: jax.Array
  weight_decay: jax.Array
  query_dropout: jax.Array | None = None
  normalize: jax.Array | None = None
  frozen_parts: dict[str, Any] = flax.struct.field(default_factory=dict)
  feature_mask: jax.Array | None = None


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(
  tuner: tuner_lib.Tuner, static: StaticSettings, params: Any, seeds: jax.Array
) -> State:
  """Fresh state of runs with these seeds, (R,) uint32, on backbone `params`."""

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
  """`init` for this tuner and recipe, its result on all devices of a mesh."""
  return jax.jit(
    functools.partial(init, tuner, static),
    out_shardings=mesh_lib.replicated(mesh),
  )


def take(data: Batch, index: jax.Array) -> Batch:
  """Rows of resident data, but "tokens" whole, with "rows" to read of them."""
  batch = {
    name: mesh_lib.constrain(jnp.take(values, index, axis=0), "data")
    for name, values in data.items()
    if name != "tokens"
  }
  if "tokens" in data:
    batch |= {"tokens": data["tokens"], "rows": index}
  return batch


def _keep_mask(key: jax.Array, rate: Any, shape: tuple[int, ...]):
  """Inverted dropout's multiplier: 0 or 1 / (1 - rate)."""
  return jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)


def _stream(tuner, variables, batch, remat=False):
  """Tokens, rows of them, and final feature; of the store or the backbone."""
  if "final" in batch:
    return batch.get("tokens"), batch.get("rows"), batch["final"]
  images = batch["image"]
  images = images.reshape(len(images), *tuner.config.image_size, 3)
  mask = batch.get("embedding_mask")
  stream = tuner.stream(variables, images, mask, remat)
  return stream.tokens, None, stream.final


def _by_device(gradient):
  """The gradient of each device's part of a batch, summed over them at last.

  Through the stream the gradient of each block comes in a turn of a loop, and
  left to itself the compiler sums it over the devices in every turn.
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
      check_vma=False,  # Else it sums by itself, and where it likes.
    )(trained, batch)

  return summed


def _score(logits, batch):
  """Sums over the batch's real examples: loss and number right."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  )
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
  """One update of one run; returns its state and (loss sum, number right)."""
  batch = dict(batch)
  embed_key, query_key = jax.random.split(jax.random.fold_in(key, step))
  config, size = tuner.config, len(batch["label"])
  if static.embedding_dropout and "image" in batch:
    shape = (size, config.num_tokens, config.width)
    batch["embedding_mask"] = _keep_mask(
      embed_key, static.embedding_dropout, shape
    )
  if tuner.has_queries and static.query_dropout:
    # Examples first: those that fill up a batch then change no other's mask.
    shape = (size, config.depth, tuner.num_queries, config.width)
    mask = _keep_mask(query_key, settings.query_dropout, shape)
    batch["query_mask"] = jnp.moveaxis(mask, 0, 1)
  if not tuner.editor:
    seen = _stream(tuner, frozen, batch, static.remat)
  count = jnp.maximum(batch["mask"].sum(), 1)
  devices = mesh_lib.size("data") if tuner.editor else 1

  def objective(trained, batch):
    variables = {**tuner_lib.merge(trained, frozen), **settings.frozen_parts}
    if settings.feature_mask is not None:
      variables["head"] = head.mask_features(
        variables["head"], settings.feature_mask
      )
    tokens, rows, final = (
      _stream(tuner, variables, batch, static.remat) if tuner.editor else seen
    )
    logits = tuner(
      variables,
      tokens,
      final,
      batch.get("query_mask"),
      settings.normalize,
      rows,
    ).logits
    total, right = _score(logits, batch)
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
  """Up to S steps in one call.

  Args:
    tuner: the method.
    recipe: the compiled part of the recipe.
    state: donated.
    frozen: the other half of `tuner.partition`.
    settings: per run.
    data: resident examples: images, or the store's tokens (or their keys and
      values) and final features; images only, if the tuner has an editor.
    order: (S, B) int32 rows of `data`.
    mask: (S, B) float32, 0 where a row only fills up the last batch.
    factor: (S,) float32, of each run's peak learning rate.
    count: how many of the S steps are taken, () int32; None: all. One compiled
      program serves calls of any length, and their bits don't depend on it.

  Returns:
    The state; sums of the losses (S, R); numbers of examples right (S, R); 0
    for steps that were not taken.
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


# Taken here, as `train_steps` may be replaced by one that watches its calls.
_lower = train_steps.lower


def step_bytes(*args: Any) -> int | None:
  """Memory that `train_steps` of these arguments takes, bytes on one device.

  Arguments and temporaries, as the compiler counts them: with the backbone and
  resident data. After a call it costs nothing, as that compiled it.

  Returns:
    None where the compiler does not tell.
  """
  found = _lower(*args).compile().memory_analysis()
  if found is None:
    return None
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + found.temp_size_in_bytes + new


@flax.struct.dataclass
class TrainedTrials:
  """Trained runs of one tuner, to be evaluated.

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
) -> tuple[jax.Array, ...]:
  """All runs of all tuners over examples in one pass of the stream.

  Runs of an editor have a pass each, one after the other.

  Args:
    tuners: of one backbone and with one editor, if any; the first of them reads
      all that any of them does.
    ready: the runs of each.
    params: the backbone's.
    data: examples with "label", resident or one batch.
    order: (S, B) int32 rows of `data`.
    mask: (S, B) float32.

  Returns:
    How many examples each run gets right, (R,) float32 for each tuner.
  """

  def body(right, inputs):
    index, mask = inputs
    batch = {**take(data, index), "mask": mesh_lib.constrain(mask, "data")}
    if not tuners[0].editor:
      seen = _stream(tuners[0], {"backbone": params}, batch)

    def one(tuner, ready):
      variables = {**ready.variables, "backbone": params}
      own = tuner.editor and _stream(tuner, variables, batch)
      tokens, rows, final = own or seen
      logits = tuner(
        variables, tokens, final, None, ready.normalize, rows
      ).logits
      return _score(logits, batch)[1]

    def every(tuner, trials):
      run = functools.partial(one, tuner)
      return jax.lax.map(run, trials) if tuner.editor else jax.vmap(run)(trials)

    return tuple(
      before + every(*those) for before, *those in zip(right, tuners, ready)
    ), None

  trials = [len(jax.tree.leaves(each.variables)[0]) for each in ready]
  right = tuple(map(jnp.zeros, trials))
  right = jax.lax.scan(body, right, (order, mask))[0]
  return mesh_lib.constrain(right)  # Replicated.
