"""Stages of a run: runs trained together and judged, each stage done once.

What a finished stage found, and the weights that later ones need, is kept in
`<workdir>/stages/<name>.safetensors`, which appears at once; a stage that was
interrupted goes on from its last checkpoint.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import statistics
from typing import Any

import flax.traverse_util
import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from vqt_jax import errors
from vqt_jax import files
from vqt_jax import head as head_lib
from vqt_jax import parallel
from vqt_jax import results as results_lib
from vqt_jax import tuner as tuner_lib
from vqt_jax.train import checkpoint
from vqt_jax.train import loop
from vqt_jax.train import packing
from vqt_jax.train import sources
from vqt_jax.train import step as step_lib

SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Stage:
  """What to train, and what to judge it by.

  Attributes:
    name: names the stage's file and its rows in metrics.jsonl.
    label: for people, short.
    tuner: of all runs.
    runs: trained on the same examples.
    what: a run is, for people, e.g. "setting".
    split: trained on.
    rows: of the split; None: all.
    judge: split and rows whose accuracy is wanted, or None.
    trains: the parts that train.
    held: the other parts, leaves (R, ...).
    lasso: weight of the group lasso on the head's rows.
    kept: (R, F) of 0 and 1, the features of each run; None: all.
    least: runs whose loss must stay finite, others that diverge are out; None:
      all of them.
    keeps_weights: whether later stages need what was trained.
  """

  name: str
  label: str
  tuner: tuner_lib.Tuner
  runs: tuple[loop.Run, ...]
  what: str
  split: str = "trainval"
  rows: np.ndarray | None = None
  judge: tuple[str, np.ndarray | None] | None = None
  trains: tuple[str, ...] = tuner_lib.TRAINED
  held: dict[str, Any] = dataclasses.field(default_factory=dict)
  lasso: float = 0.0
  kept: np.ndarray | None = None
  least: int | None = None
  keeps_weights: bool = True


@dataclasses.dataclass
class Outcome:
  """What came out of a stage.

  Attributes:
    history: per epoch {"loss": per run, "accuracy": per run}.
    seconds: of training.
    diverged: runs whose loss stopped being finite.
    accuracy: of each run where it was judged, 0 of one that diverged; None if
      they were not.
    variables: {"tuner", "head"}, numpy leaves (R, ...), if kept.
    side_by_side: runs that trained at the same time.
    epoch_seconds: wall time of an epoch for each of these, compiling left out;
      None if no epoch followed that of the compiling.
    step_bytes: memory of the compiled step of these, see `step.step_bytes`.
    peak_bytes: of memory, in the run so far; None if unknown.
  """

  history: list[dict[str, list[float]]]
  seconds: float
  diverged: list[int]
  accuracy: list[float] | None
  variables: Any = None
  side_by_side: int = 1
  epoch_seconds: float | None = None
  step_bytes: int | None = None
  peak_bytes: int | None = None


@dataclasses.dataclass
class Saved:
  """Whose state a save holds, and where it stands; json-able."""

  stage: str = ""
  progress: loop.Progress = dataclasses.field(default_factory=loop.Progress)

  def __post_init__(self):
    if isinstance(self.progress, dict):
      self.progress = loop.Progress(**self.progress)


class Stages:
  """Runs stages, or finds what they gave before."""

  def __init__(self, job, examples, saver, metrics, stop, peak, forecast):
    """Reads what there is.

    Args:
      job: the `run.Job`.
      examples: an `Examples`.
      saver: a `Checkpointer`.
      metrics: a `MetricsWriter`.
      stop: a `StopSignal`.
      peak: a `memory.Peak`.
      forecast: a `forecast.Forecast`.

    Raises:
      UserError: it was begun with other weights of the backbone.
    """
    self._job, self._examples, self._saver = job, examples, saver
    self._metrics, self._stop, self._peak = metrics, stop, peak
    self._forecast, self._size = forecast, 1
    self._folder = job.workdir / "stages"
    with parallel.together():
      names = files.names(self._folder)
      self._done = {
        name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)
      }
    self._saved = saver.progress(Saved) or Saved()
    with parallel.together():
      if parallel.is_first():
        self._check_weights()

  def _check_weights(self) -> None:
    """Notes down the backbone's, or that they are those that it began with."""
    path = self._folder / "backbone.json"
    found = {"sha256": self._job.backbone.identity}
    begun = (self._done or self._saved.stage) and files.exists(path)
    if not begun:
      results_lib.write_json(path, found)
    elif results_lib.read_json(path) != found:
      raise errors.UserError(
        f"The run in {self._job.workdir} was begun with other weights: what"
        " config.init names has changed since. Choose another --workdir, or"
        " bring the old weights back to resume."
      )

  def run(self, stage: Stage) -> Outcome:
    """Does a stage, in as many packs of runs as memory asks for."""
    self._size = packing.runs_at_once(
      stage.tuner,
      self._job.config.batch_size,
      self._job.mesh,
      self._job.config.remat,
    )
    parts = packs(stage, self._size)
    if len(parts) == 1:
      return self._pack(stage)
    starts = range(0, len(stage.runs), self._size)
    joined = _joined([self._pack(part) for part in parts], starts)
    if len(stage.runs) - len(joined.diverged) < (stage.least or 0):
      raise errors.UserError(
        f"The loss of all {len(stage.runs)} runs of phase {stage.name} became"
        " infinite or undefined. Lower config.lr in a new workdir, or look at"
        " the value range of the inputs."
      )
    return joined

  def _pack(self, stage: Stage) -> Outcome:
    path = self._folder / f"{stage.name}{SUFFIX}"
    if parallel.any_process(stage.name in self._done):
      with parallel.together():
        outcome = _read(path, stage)
      self._peak.include(outcome.peak_bytes)
      self._log(stage, _rows(stage, outcome.history))
      return outcome
    state, progress = self._train(stage)
    outcome = Outcome(
      history=progress.history,
      seconds=progress.seconds,
      diverged=sorted(map(int, progress.diverged)),
      accuracy=None,
      side_by_side=len(stage.runs),
      epoch_seconds=_each(progress.epoch_seconds, len(stage.runs)),
      step_bytes=progress.step_bytes,
    )
    ready = step_lib.Ready(
      _variables(state, stage), np.array([r.normalize for r in stage.runs])
    )
    if stage.judge:
      (accuracy,) = self.evaluate(*stage.judge, [(stage.tuner, ready)], "val")
      able = [i not in outcome.diverged for i in range(len(accuracy))]
      outcome.accuracy = [a if ok else 0.0 for a, ok in zip(accuracy, able)]
    if stage.keeps_weights:
      outcome.variables = jax.tree.map(parallel.to_host, ready.variables)
    outcome.peak_bytes = self._peak.bytes()
    with parallel.together():
      if parallel.is_first():
        _write(path, outcome)
    return outcome

  def _train(self, stage: Stage) -> tuple[step_lib.State, loop.Progress]:
    """Trains from the start, or from the checkpoint."""
    job, c, runs = self._job, self._job.config, stage.runs
    progress = loop.Progress()
    recipe = recipe_of(c, stage)
    seeds = np.array([run.seed for run in runs], np.uint32)
    state = step_lib.init_on(job.mesh, stage.tuner, recipe)(job.params, seeds)
    if self._saved.stage == stage.name:
      progress = self._saved.progress
      self._peak.include(progress.peak_bytes)
      state = self._saver.restore(state)
      if progress.epoch < c.epochs:
        after = f"{stage.label} after epoch {progress.epoch}"
        job.console.note(after, "resume")
    self._saved = Saved()  # From here on the last save is another.

    self._log(stage, _rows(stage, progress.history))

    def save(state):
      progress.peak_bytes = self._peak.bytes()
      saved = Saved(stage.name, progress)
      self._saver.save(state, dataclasses.asdict(saved))

    if progress.epoch == c.epochs:
      return state, progress
    with self._stop.at_once(), parallel.together():
      source = self._examples.source(stage.split, stage.rows)
    phase = loop.Phase(
      stage.name,
      runs,
      source,
      c.epochs,
      c.warmup_epochs,
      per_step=c.schedule == "step",
      least=len(runs) if stage.least is None else stage.least,
      held=parallel.replicate(stage.held, job.mesh),
      kept=parallel.replicate(stage.kept, job.mesh),
    )
    plural = "s" if len(runs) > 1 else ""
    detail = f"{len(runs)} {stage.what}{plural} x {c.epochs} epochs"
    if stage.tuner != job.tuner:
      detail += f", {stage.tuner.num_queries} queries"
    with job.console.phase(stage.label, c.epochs, detail=detail) as line:

      def report(epoch, loss, accuracy, speed):
        self._log(stage, _rows(stage, progress.history, epoch))
        able = np.isfinite(loss)
        able |= ~able.any()
        line.update(
          epoch + 1,
          loss=float(np.mean(loss[able])),
          accuracy=float(np.mean(accuracy[able])),
          images_per_second=speed,
        )

      def timed(steps, seconds):
        all_steps = c.epochs * source.steps
        left = all_steps - progress.epoch * source.steps - progress.step
        self._forecast.hear(left, steps, seconds)

      live = self._examples.is_live(stage.split)
      self._forecast.begin(stage, self._size, self._done, live)
      frozen = tuner_lib.partition(job.params, stage.tuner.shapes())[1]
      state = loop.train_phase(
        phase,
        stage.tuner,
        recipe,
        frozen,
        state,
        progress,
        save=save,
        due=self._saver.due,
        stop=self._stop,
        report=report,
        timed=timed,
      )
    save(state)
    return state, progress

  def _log(self, stage: Stage, rows: list[dict[str, Any]]) -> None:
    if parallel.is_first():
      self._metrics.epochs(stage.name, rows)

  def evaluate(
    self,
    split: str,
    rows: np.ndarray | None,
    ready: Sequence[tuple[tuner_lib.Tuner, step_lib.Ready]],
    label: str,
  ) -> list[list[float]]:
    """Accuracy of every run of several tuners, in one pass of the backbone.

    In several, if the devices cannot hold what all of them have trained.

    Args:
      split: each of its images counts exactly once.
      rows: of the split; None: all.
      ready: tuners with their trained runs; if any reads the blocks, so does
        the first.
      label: for people.
    """
    size = min(packing.held_at_once(tuner) for tuner, _ in ready)
    if sum(len(runs.normalize) for _, runs in ready) <= size:
      return self._pass(split, rows, ready, label)
    found = []
    for tuner, runs in ready:
      accuracy = []
      for start in range(0, len(runs.normalize), size):
        some = jax.tree.map(lambda x, i=start: x[i : i + size], runs)
        accuracy += self._pass(split, rows, [(tuner, some)], label)[0]
      found.append(accuracy)
    return found

  def _pass(self, split, rows, ready, label) -> list[list[float]]:
    """What `evaluate` gives, in one pass of the backbone."""
    job = self._job
    tuners, runs = zip(*ready)
    runs = parallel.replicate(runs, job.mesh)
    right, count = None, 0
    total = self._examples.count(split) if rows is None else len(rows)
    with self._stop.at_once(), parallel.together():
      chunks = self._examples.evaluation(split, rows)
    with job.console.phase(label, total, "image") as line:
      evaluate = functools.partial(
        step_lib.eval_steps, tuners, runs, job.params
      )
      ask = lambda: parallel.ask(lambda: [self._stop.received])
      done = ((evaluate(*chunk), chunk[2].sum(), ask()) for chunk in chunks)
      for part, real, stopped in sources.behind(done):
        part = [x.astype(np.float64) for x in parallel.to_host(part)]
        right = [a + b for a, b in zip(right, part)] if right else part
        count += int(real)
        line.update(count)
        if stopped().any():
          raise checkpoint.Stopped
    return [(x / count).tolist() for x in right]


def recipe_of(config: ml_collections.ConfigDict, stage: Stage):
  """What of a stage's recipe is compiled in, a `step.Recipe`."""
  return step_lib.Recipe(
    optimizer=config.optimizer,
    query_dropout=stage.tuner.has_queries
    and any(run.query_dropout for run in stage.runs),
    embedding_dropout=config.embedding_dropout,
    lasso=stage.lasso,
    trains=stage.trains,
    editor_rate=config.editor_rate if stage.tuner.editor else 1.0,
    remat=config.remat,
  )


def packs(stage: Stage, size: int) -> list[Stage]:
  """A stage in parts of at most so many runs; itself, if it has no more."""
  if len(stage.runs) <= size:
    return [stage]
  return [_part(stage, i, size) for i in range(0, len(stage.runs), size)]


def _part(stage: Stage, start: int, size: int) -> Stage:
  """Some runs of a stage, named after which they are.

  So a run that is resumed where memory holds more or fewer of them does not
  take them for others.
  """
  some = slice(start, min(start + size, len(stage.runs)))
  return dataclasses.replace(
    stage,
    name=f"{stage.name}_{some.start + 1}-{some.stop}",
    runs=stage.runs[some],
    held=jax.tree.map(lambda x: x[some], stage.held),
    kept=None if stage.kept is None else stage.kept[some],
    least=None if stage.least is None else 0,
  )


def _variables(state: step_lib.State, stage: Stage) -> Any:
  """{"tuner", "head"} as they are now, without the features left out."""
  variables = {
    name: stage.held.get(name, state.trained[name])
    for name in tuner_lib.TRAINED
  }
  if stage.kept is not None:
    variables["head"] = head_lib.select(variables["head"], stage.kept)
  return variables


def _joined(parts: Sequence[Outcome], starts: Sequence[int]) -> Outcome:
  """Packs of a stage as one."""
  together = lambda *lists: [x for each in lists for x in each]
  return Outcome(
    history=[
      {name: together(*(e[name] for e in epoch)) for name in epoch[0]}
      for epoch in zip(*(part.history for part in parts))
    ],
    seconds=sum(part.seconds for part in parts),
    diverged=[s + i for s, part in zip(starts, parts) for i in part.diverged],
    accuracy=parts[0].accuracy and together(*(part.accuracy for part in parts)),
    variables=parts[0].variables
    and jax.tree.map(
      lambda *x: np.concatenate(x), *(part.variables for part in parts)
    ),
    side_by_side=max(part.side_by_side for part in parts),
    epoch_seconds=_each(
      [p.epoch_seconds for p in parts if p.epoch_seconds is not None]
    ),
    step_bytes=max(p.step_bytes or 0 for p in parts) or None,
  )


def _each(seconds: Sequence[float], runs: int = 1) -> float | None:
  """The median of what so many runs take together, for each of them."""
  return statistics.median(seconds) / runs if seconds else None


def _rows(
  stage: Stage, history: list[dict[str, list[float]]], first: int = 0
) -> list[dict[str, Any]]:
  """The metrics of all epochs from the first on, a row per epoch and run."""
  return [
    {
      "epoch": epoch + 1,
      "run": i,
      **dataclasses.asdict(run),
      "loss": history[epoch]["loss"][i],
      "accuracy": history[epoch]["accuracy"][i],
    }
    for epoch in range(first, len(history))
    for i, run in enumerate(stage.runs)
  ]


def _write(path: files.Path, outcome: Outcome) -> None:
  flat = flax.traverse_util.flatten_dict(outcome.variables or {}, sep="/")
  info = dataclasses.asdict(dataclasses.replace(outcome, variables=None))
  files.write(
    path,
    safetensors.numpy.save(
      {name: np.ascontiguousarray(x) for name, x in flat.items()},
      metadata={"outcome": json.dumps(info)},
    ),
  )


def _read(path: files.Path, stage: Stage) -> Outcome:
  """What `_write` wrote of a stage."""
  with files.as_file(path) as local:
    return _parse(path, local, stage)


def _parse(path: files.Path, local: pathlib.Path, stage: Stage) -> Outcome:
  """Reads a local copy of the file at a path."""
  runs = len(stage.runs)
  try:
    with safetensors.safe_open(local, "numpy") as file:
      outcome = Outcome(**json.loads((file.metadata() or {})["outcome"]))
      flat = {name: file.get_tensor(name) for name in file.keys()}
    if any(len(row["loss"]) != runs for row in outcome.history):
      raise ValueError(f"expected {runs} runs")
    if flat:  # An empty part leaves no trace.
      variables = flax.traverse_util.unflatten_dict(flat, sep="/")
      outcome.variables = {"tuner": {}, **variables}
    _check_shapes(outcome.variables, stage)
  except (
    OSError,
    KeyError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
  ) as e:
    raise errors.UserError(
      f"Cannot read {path}: {e!r}. Delete it to do this part again."
    ) from e
  return outcome


def _check_shapes(variables: Any, stage: Stage) -> None:
  """Raises a `ValueError` if these are not a stage's weights."""
  expected = None
  if stage.keeps_weights:
    shape = lambda x: (len(stage.runs), *x.shape)
    expected = jax.tree.map(shape, stage.tuner.shapes())
  found = jax.tree.map(np.shape, variables)
  if found != expected:
    raise ValueError(f"expected weights {expected}, found {found}")
