"""Models that classify images with what a run has trained."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.models import backbone as backbone_lib
from vqt_jax.models import editors
from vqt_jax.models import head as head_lib
from vqt_jax.models import methods
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import ahead
from vqt_jax.runtime import files
from vqt_jax.runtime.files import PathLike
from vqt_jax.tuned import bundle as bundle_lib
from vqt_jax.tuned import find_backbone
from vqt_jax.tuned import inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A backbone, and what R seeds of a run have trained on it.

  Methods that take `x` take images as people have them, one or many: paths,
  encoded files (bytes), PIL images, uint8 arrays (height, width[, channels])
  of any size, an array (n, height, width, channels), or an iterable of these.
  They are prepared as in training, decoded in several threads, and answered in
  order; n is their number. Arrays of floats (n, height, width, 3) are taken as
  prepared already.

  Attributes:
    backbone: the frozen ViT.
    tuner: the method.
    variables: {"tuner", "head"}, leaves (R, ...).
    classes: names of the C classes.
    info: contents of the bundle's `bundle.json`.
  """

  backbone: backbone_lib.Backbone
  tuner: tuner_lib.Tuner
  variables: dict[str, Any]
  classes: tuple[str, ...]
  info: dict[str, Any]

  def __repr__(self) -> str:
    return (
      f"Model({self.tuner.method}, {len(self.classes)} classes,"
      f" {self.num_seeds} seed{'s' * (self.num_seeds > 1)}, {self.backbone})"
    )

  @property
  def num_seeds(self) -> int:
    return len(jax.tree.leaves(self.variables["head"])[0])

  def __call__(self, images: jax.Array) -> jax.Array:
    """Logits (R, B, C) of images that are prepared already.

    It can be compiled into other programs, and exported.

    Args:
      images: (B, height, width, 3), scaled as the backbone expects.

    Raises:
      UserError: the images do not fit, see `Backbone.checked`.
    """
    images = self.backbone.checked(images)
    variables, params = self._device_variables, self._device_params
    return classify((self.tuner,), (variables,), params, images)[0]

  def logits(self, x: Any) -> np.ndarray:
    """Logits of images, (R, n, C) float32."""
    (found,) = _run((self,), x)
    return found

  def predict_proba(self, x: Any) -> np.ndarray:
    """Probabilities of the classes, (n, C) float32: mean over the seeds."""
    return probabilities(self.logits(x))

  def predict(self, x: Any) -> np.ndarray:
    """Names of the most probable classes, (n,)."""
    return np.array(self.classes)[self.predict_proba(x).argmax(axis=-1)]

  def attention(self, x: Any) -> np.ndarray:
    """Attention weights of the queries, (R, L, n, H, T, N); sum to 1 over N.

    Raises:
      UserError: the method has no queries.
    """
    self.check_has_queries()
    run = functools.partial(
      attention, (self.tuner,), (self._device_variables,), self._device_params
    )
    parts = [
      np.asarray(run(images)[0])[:, :, :count]
      for images, count in self._batches(x)
    ]
    c = self.tuner.config
    none = (0, c.num_heads, self.tuner.num_queries, c.num_tokens)
    parts.append(np.zeros((self.num_seeds, c.depth, *none), np.float32))
    return np.concatenate(parts, axis=2)

  def attention_maps(self, x: Any) -> np.ndarray:
    """Attention on the patches, (n, L, rows, columns).

    Mean over seeds, heads and queries; prefix tokens are left out.

    Raises:
      UserError: the method has no queries.
    """
    c = self.backbone.config
    weights = self.attention(x).mean(axis=(0, 3, 4))
    weights = np.moveaxis(weights[..., c.num_prefix_tokens :], 0, 1)
    return weights.reshape(*weights.shape[:2], *c.grid)

  def check_has_queries(self) -> None:
    """Raise a `UserError` if the method has no queries."""
    if not self.tuner.has_queries:
      raise errors.UserError(
        f"{self.tuner.method} has no queries that learn, so there is no"
        " attention of queries to show."
      )

  def _batches(self, x: Any) -> Iterator[tuple[np.ndarray, int]]:
    return inputs.batches(x, self.prepare, self.backbone)

  def __getstate__(self) -> dict[str, Any]:
    """All but what is made again when it is used."""
    made = ("prepare", "_device_variables", "_device_params")
    return {name: x for name, x in vars(self).items() if name not in made}

  @functools.cached_property
  def _device_variables(self) -> Any:
    """The variables, transferred once."""
    with jax.ensure_compile_time_eval():  # Also within `jit` and `export`.
      return jax.device_put(self.variables)

  @functools.cached_property
  def _device_params(self) -> Any:
    """The parameters of the backbone, transferred once."""
    with jax.ensure_compile_time_eval():
      return jax.device_put(self.backbone.params)

  @functools.cached_property
  def prepare(self) -> inputs.Prepare:
    """The function from one image to the backbone's input, as in training."""
    return inputs.make_prepare(**self.info["preprocessing"])

  def save(self, directory: PathLike) -> None:
    """Write a bundle, which `load` reads; the backbone is not in it.

    Raises:
      UserError: it cannot be written, or there are other files.
    """
    bundle_lib.write(
      directory,
      self.backbone.source or self.info["backbone"]["source"],
      self.backbone,
      self.tuner,
      self.variables,
      {k: v for k, v in self.info.items() if k not in bundle_lib.WRITTEN},
    )

  def of_seed(self, seed: int) -> "Model":
    """The model of one seed.

    Raises:
      UserError: there is no such seed.
    """
    seeds = self.info["seeds"]
    if seed not in seeds:
      raise errors.unknown_name("seed", str(seed), map(str, seeds))
    i = seeds.index(seed)
    chosen = self.info["results"].get("chosen", {})
    return dataclasses.replace(
      self,
      variables=jax.tree.map(lambda leaf: leaf[i : i + 1], self.variables),
      info={**self.info, "seeds": [seed], "results": {"chosen": chosen}},
    )

  def folded(self) -> "Model":
    """Fold the editor into the backbone, which is a plain ViT then.

    `save_backbone` writes that backbone for transformers, timm or Big Vision.

    Raises:
      UserError: no plain ViT computes what the editor does, or there are
        several seeds, each with a backbone of its own.
    """
    if not self.tuner.editor:
      return self
    if self.num_seeds > 1:
      raise errors.UserError(
        f"Each of the {self.num_seeds} seeds has changed the backbone in its"
        f" own way; choose one: model.of_seed({self.info['seeds'][0]}).folded()"
      )
    tuner = {k: v for k, v in self.variables["tuner"].items() if k != "editor"}
    weights = jax.tree.map(lambda x: x[0], self.variables["tuner"]["editor"])
    params = editors.fold(
      self.tuner.editor, self.tuner.options, self.backbone.params, weights
    )
    params = jax.tree.map(np.asarray, params)
    reader = methods.parse(self.tuner.method).reader
    return dataclasses.replace(
      self,
      backbone=dataclasses.replace(self.backbone, params=params),
      tuner=dataclasses.replace(self.tuner, method=reader),
      variables={**self.variables, "tuner": tuner},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
  """Several models on one backbone, answered in one pass of it.

  Attributes:
    models: by the path that each was loaded from.
  """

  models: Mapping[str, Model]

  def logits(self, x: Any) -> dict[str, np.ndarray]:
    """Logits of every model, see `Model.logits`."""
    return dict(zip(self.models, _run(tuple(self.models.values()), x)))

  def predict_proba(self, x: Any) -> dict[str, np.ndarray]:
    """Probabilities of every model, see `Model.predict_proba`."""
    return {name: probabilities(z) for name, z in self.logits(x).items()}

  def predict(self, x: Any) -> dict[str, np.ndarray]:
    """Names of the most probable classes of every model."""
    return {
      name: np.array(self.models[name].classes)[p.argmax(axis=-1)]
      for name, p in self.predict_proba(x).items()
    }

  def stream(
    self, x: Any
  ) -> Iterator[list[dict[str, np.ndarray] | errors.UserError]]:
    """Answer images batch by batch, and go on after those that are faulty.

    Yields:
      For each image of a batch, in order: the probabilities (C,) by model, or
      why it cannot be read.
    """
    first, run = _compiled(tuple(self.models.values()))

    def answer(results, size):
      images = [r for r in results if not isinstance(r, errors.UserError)]
      found = run(inputs.pad(images, size)) if images else ()
      return results, [z[:, : len(images)] for z in found]

    for results, found in ahead.compute(
      answer, inputs.prepared(x, first.prepare)
    ):
      each = zip(*map(probabilities, found))
      left = iter([dict(zip(self.models, answer)) for answer in each])
      yield [
        r if isinstance(r, errors.UserError) else next(left) for r in results
      ]


def load(
  path: PathLike | Sequence[PathLike],
  backbone: PathLike | backbone_lib.Backbone | None = None,
) -> Model | Models:
  """Load what a run has trained, and the backbone that it was trained on.

  Args:
    path: the workdir of a finished run, its `tuned/`, or a copy of that; local
      or `gs://BUCKET/FOLDER`. Also the https:// address of a `tuned/`, or
      `hf://OWNER/NAME` of a copy on the hub. A list of them on one backbone
      makes `Models`.
    backbone: a `Backbone`, or what `load_backbone` takes. Default: where the
      run had it, a public name, the cache of the hub, or a file of its name
      beside the bundle.

  Raises:
    UserError: a file is missing or damaged or holds NaN; the backbone is not
      found or has other weights; several models differ in it.
  """
  if isinstance(path, str) or not isinstance(path, Iterable):
    return _load(path, backbone)
  models = {}
  for each in path:
    models[str(each)] = found = _load(each, backbone)
    backbone = found.backbone  # Loaded once; each compares it with its own.
    _check_same_preprocessing(models)
  if not models:
    raise errors.UserError("load: expected at least one path, found none.")
  return Models(models)


def _check_same_preprocessing(models: Mapping[str, Model]) -> None:
  (first, model), *others = models.items()
  expected = model.info["preprocessing"]
  for name, other in others:
    found = other.info["preprocessing"]
    if found != expected:
      raise errors.UserError(
        f"{name} cannot be answered together with {first}: its preprocessing is"
        f" {found}, not {expected}. Load it alone."
      )


def _load(place: PathLike, given: Any) -> Model:
  folder = bundle_lib.find(place)
  bundle = bundle_lib.read(folder)
  info = bundle.info
  with files.explain_damage(folder / bundle_lib.INFO):
    inputs.make_prepare(**info["preprocessing"])
    options = editors.Options(**info["tuner"]["options"])
    fetched = checkpoints.is_address(os.fspath(place))
    backbone = find_backbone.find(folder, info, given, fetched)
    tuner = tuner_lib.make_tuner(
      backbone=backbone,
      num_classes=len(info["classes"]),
      **info["tuner"] | {"options": options},
    )
  variables = {"tuner": {}, **bundle.variables}  # Empty dicts are not written.
  with files.explain_damage(folder / bundle_lib.WEIGHTS):
    head = dict(variables["head"])
    if "features" in head:  # Selected ones.
      rows = zip(head.pop("features"), head["kernel"], strict=True)
      spread = [head_lib.spread_rows(*x, tuner.num_features) for x in rows]
      variables["head"] = head | {"kernel": np.stack(spread)}
    expected = jax.tree.map(
      lambda leaf: (len(info["seeds"]), *leaf.shape), tuner.shapes()
    )
    found = jax.tree.map(np.shape, variables)
    if found != expected:
      raise ValueError(f"expected {expected}, found {found}")
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  checkpoints.check_finite(flat, str(folder / bundle_lib.WEIGHTS))
  return Model(backbone, tuner, variables, tuple(info["classes"]), info)


@functools.partial(jax.jit, static_argnums=0)
def classify(
  tuners: tuple[tuner_lib.Tuner, ...],
  variables: tuple[Any, ...],
  params: Any,
  images: jax.Array,
) -> tuple[jax.Array, ...]:
  """Return the logits (R, B, C) of all seeds of several tuners.

  The frozen backbone sees the images once; editors take a pass for each seed.

  Args:
    tuners: on one backbone.
    variables: {"tuner", "head"} of each, leaves (R, ...).
    params: of the backbone.
    images: (B, height, width, 3).
  """
  frozen = [tuner for tuner in tuners if not tuner.editor]
  if frozen:
    reads = any(tuner.reads_blocks for tuner in frozen)
    seen = tuner_lib.run_backbone(frozen[0].config, reads, params, images)

  def edited(tuner, own):
    own = {**own, "backbone": params}
    stream = tuner.stream(own, images)
    return tuner(own, stream.tokens, stream.final).logits

  def direct(tuner, own):
    tokens = seen.tokens if tuner.reads_blocks else None
    if tuner.window > 1:
      tokens = readers.pool(tuner.config, tokens, tuner.window)
    return tuner({**own, "backbone": params}, tokens, seen.final).logits

  def asked(tuner, own, outputs):
    weights = own["tuner"].get("combine")
    groups = readers.combine(outputs, tuner.combine, weights)
    return tuner.classify(own, groups, seen.final).logits

  with_queries = [
    (tuner, own)
    for tuner, own in zip(tuners, variables)
    if tuner.has_queries and not tuner.editor
  ]
  if with_queries:
    outputs = iter(_ask_together(with_queries, params, seen.tokens))
  logits = []
  for tuner, own in zip(tuners, variables):
    if tuner.editor:
      run = functools.partial(edited, tuner)
      logits.append(jax.lax.map(run, own))
    elif tuner.has_queries:
      run = functools.partial(asked, tuner)
      logits.append(jax.vmap(run)(own, next(outputs)))
    else:
      logits.append(jax.vmap(functools.partial(direct, tuner))(own))
  return tuple(logits)


def _ask_together(
  models: Sequence[tuple[tuner_lib.Tuner, Any]],
  params: Any,
  tokens: jax.Array,
) -> list[jax.Array]:
  """Read the tokens with the queries of all models at once.

  Args:
    models: tuners and {"tuner"}, with queries (R, L, T, D), which may differ in
      R and T.
    params: of the backbone.
    tokens: (L, B, N, D).

  Returns:
    The outputs (R, L, B, T, D) for each model.
  """
  queries = [own["tuner"]["queries"] for _, own in models]
  flat = [  # (L, R * T, D)
    jnp.moveaxis(q, 0, 1).reshape(q.shape[1], -1, q.shape[3]) for q in queries
  ]
  variables = {"backbone": params, "tuner": {}}
  _, found = models[0][0].read(
    readers.query_step, variables, jnp.concatenate(flat, axis=1), tokens
  )
  ends = np.cumsum([each.shape[1] for each in flat])[:-1]
  return [
    jnp.moveaxis(x.reshape(*x.shape[:2], len(q), -1, x.shape[3]), 2, 0)
    for x, q in zip(jnp.split(found, ends, axis=2), queries)
  ]


@functools.partial(jax.jit, static_argnums=0)
def attention(
  tuners: tuple[tuner_lib.Tuner, ...],
  variables: tuple[Any, ...],
  params: Any,
  images: jax.Array,
) -> tuple[jax.Array, ...]:
  """Return the attention weights (R, L, B, H, T, N) of several tuners.

  The frozen backbone sees the images once, as in `classify`.

  Args:
    tuners: on one backbone, with queries.
    variables: {"tuner", "head"} of each, leaves (R, ...).
    params: of the backbone.
    images: (B, height, width, 3).
  """
  if any(not tuner.editor for tuner in tuners):
    frozen = tuner_lib.run_backbone(tuners[0].config, True, params, images)

  def one(tuner, own):
    own = {**own, "backbone": params}
    stream = tuner.stream(own, images) if tuner.editor else frozen
    queries = own["tuner"]["queries"]
    return tuner.read(readers.attention_step, own, queries, stream.tokens)[1]

  return tuple(
    jax.lax.map(functools.partial(one, tuner), own)
    for tuner, own in zip(tuners, variables)
  )


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Mean over the seeds of the softmax of logits (R, n, C): (n, C)."""
  return np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1).mean(axis=0))


def best(
  probability: np.ndarray, classes: Sequence[str], top: int
) -> list[tuple[str, float]]:
  """Return the most probable classes (name, probability), best first."""
  order = np.argsort(-probability, kind="stable")[:top]
  return [(classes[i], float(probability[i])) for i in order]


def _run(models: tuple[Model, ...], x: Any) -> list[np.ndarray]:
  """Return the logits (R, n, C) of models on one backbone."""
  first, run = _compiled(models)
  some = lambda images, count: [logits[:, :count] for logits in run(images)]
  parts = [
    [np.asarray(logits) for logits in found]
    for found in ahead.compute(some, first._batches(x))
  ]
  if not parts:
    return [
      np.zeros((model.num_seeds, 0, len(model.classes)), np.float32)
      for model in models
    ]
  return [np.concatenate(each, axis=1) for each in zip(*parts)]


def _compiled(models: tuple[Model, ...]) -> tuple[Model, Any]:
  """Return the first model, and the function from a batch to all logits."""
  first = models[0]
  return first, functools.partial(
    classify,
    tuple(model.tuner for model in models),
    tuple(model._device_variables for model in models),
    first._device_params,
  )
