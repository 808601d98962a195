"""Runs stages; finished ones are loaded, an interrupted one is resumed."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from scipy import special

from vqt_jax import accuracy as accuracy_lib
from vqt_jax import data
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.features import batches
from vqt_jax.features import examples as examples_lib
from vqt_jax.models import head as head_lib
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import ahead
from vqt_jax.runtime import files
from vqt_jax.runtime import memory
from vqt_jax.runtime import mesh
from vqt_jax.runtime import processes
from vqt_jax.runtime import units
from vqt_jax.training import checkpoint
from vqt_jax.training import exact
from vqt_jax.training import forecast as forecast_lib
from vqt_jax.training import loop
from vqt_jax.training import metrics as metrics_lib
from vqt_jax.training import optim
from vqt_jax.training import preemption
from vqt_jax.training import setup
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import step as step_lib
from vqt_jax.training import trial as trial_lib
from vqt_jax.training import trial_memory


class Stages:
  """Trains and evaluates stages, or loads the results of an earlier start."""

  def __init__(
    self,
    context: setup.RunContext,
    examples: examples_lib.Examples,
    saver: checkpoint.Checkpointer,
    metrics: metrics_lib.MetricsWriter,
    stop: preemption.StopSignal,
    peak: memory.PeakMemory,
    forecast: forecast_lib.Forecast,
  ):
    """Find the stages that an earlier start has finished.

    Raises:
      UserError: the run was begun with another backbone or other data.
    """
    self._context, self._examples, self._saver = context, examples, saver
    self._metrics, self._stop, self._peak = metrics, stop, peak
    self._forecast, self._size = forecast, 1
    self._folder = files.below(context.workdir, "stages")
    with processes.raise_on_all():
      names = files.list_names(self._folder)
      self._done = {
        name.removesuffix(stage_lib.SUFFIX)
        for name in names
        if name.endswith(stage_lib.SUFFIX)
      }
    self._saved = (
      saver.progress(stage_lib.ResumePoint) or stage_lib.ResumePoint()
    )
    with processes.raise_on_all():
      if processes.is_first():
        self._check_inputs()

  def _check_inputs(self) -> None:
    """Record hashes of backbone and data, or compare them with those there."""
    path = self._folder / "backbone.json"
    found = {
      "sha256": self._context.backbone.identity,
      "data": data.dataset_identity(self._context.task)["sha256"],
    }
    begun = (self._done or self._saved.stage) and files.exists(path)
    if not begun:
      files.write_json(path, found)
      return
    old = found | files.read_json(path)  # Earlier versions wrote no "data".
    if old["data"] != found["data"]:
      raise errors.UserError(
        f"The run in {self._context.workdir} was begun with other data:"
        f" {self._context.task.name} has changed since. Choose another"
        " --workdir, or bring the old data back to resume."
      )
    if old != found:
      raise errors.UserError(
        f"The run in {self._context.workdir} was begun with other weights: what"
        " config.init names has changed since. Choose another --workdir, or"
        " bring the old weights back to resume."
      )

  def run(self, stage: stage_lib.Stage) -> stage_lib.StageResult:
    """Train and evaluate a stage, in packs of trials that memory holds."""
    if stage.solver:
      return self._load_or(self._solve, stage)
    self._size = trial_memory.trials_at_once(
      stage.tuner,
      self._context.config.batch_size,
      self._context.mesh,
      self._context.config.remat,
    )
    parts = stage_lib.packs(stage, self._size)
    if len(parts) == 1:
      return self._load_or(self._pack, stage)
    starts = range(0, len(stage.trials), self._size)
    joined = stage_lib.join_packs(
      [self._load_or(self._pack, part) for part in parts], starts
    )
    if len(stage.trials) - len(joined.diverged) < (stage.min_finite or 0):
      raise errors.UserError(
        f"The loss of all {len(stage.trials)} trials of stage {stage.name}"
        " became infinite or undefined. Lower config.lr in a new workdir, or"
        " look at the value range of the inputs."
      )
    return joined

  def _load_or(
    self,
    make: Callable[[stage_lib.Stage], stage_lib.StageResult],
    stage: stage_lib.Stage,
  ) -> stage_lib.StageResult:
    """Load the result of a stage if there is one; else make and write it."""
    path = self._folder / f"{stage.name}{stage_lib.SUFFIX}"
    if processes.any_process(stage.name in self._done):
      with processes.raise_on_all():
        result = stage_lib.read_result(path, stage)
      self._peak.include(result.peak_bytes)
      self._log(stage, _rows(stage, result.history))
      self._log_outcome(stage, result)
      return result
    result = make(stage)
    result.peak_bytes = self._peak.bytes()
    with processes.raise_on_all():
      if processes.is_first():
        stage_lib.write_result(path, result)
    self._log_outcome(stage, result)
    return result

  def _pack(self, stage: stage_lib.Stage) -> stage_lib.StageResult:
    """Train and evaluate trials that memory holds side by side."""
    state, progress = self._train(stage)
    result = stage_lib.StageResult(
      history=progress.history,
      seconds=progress.seconds,
      diverged=sorted(map(int, progress.diverged)),
      accuracy=None,
      side_by_side=len(stage.trials),
      epoch_seconds=stage_lib.median_per_trial(
        progress.epoch_seconds, len(stage.trials)
      ),
      step_bytes=progress.step_bytes,
    )
    ready = step_lib.TrainedTrials(
      _variables(state, stage), np.array([r.normalize for r in stage.trials])
    )
    if stage.judge:
      label, (predictions,), _ = self.evaluate(
        *stage.judge, [(stage.tuner, ready)], "val"
      )
      balanced = self._context.config.class_weights == "balanced"
      judge = accuracy_lib.balanced if balanced else accuracy_lib.accuracy
      accuracy = [
        judge(accuracy_lib.tally(each, label, stage.tuner.num_classes))
        for each in predictions[:-1]
      ]
      able = [i not in result.diverged for i in range(len(accuracy))]
      result.accuracy = [a if ok else 0.0 for a, ok in zip(accuracy, able)]
    if stage.keeps_weights:
      result.variables = jax.tree.map(processes.to_host, ready.variables)
    return result

  def _solve(self, stage: stage_lib.Stage) -> stage_lib.StageResult:
    """Compute the heads of a stage from the features of its examples."""
    context, tuner = self._context, stage.tuner
    count = self._count(stage.split, stage.rows)
    weights, each, solved = self._class_weights(stage), [], []
    show = functools.partial(context.console.progress, stage.label)
    detail = units.format_count(len(stage.trials), stage.trial_noun)
    with self._stop.at_once():
      with processes.raise_on_all():
        exact.check_memory(tuner, count)
      with processes.raise_on_all():  # With a line of its own, if it extracts.
        calls = self._examples.evaluation_calls(stage.split, stage.rows)
      started, total = time.monotonic(), count * len(stage.trials)
      with show(total, "image", f"{detail}, {stage.solver}") as line:
        for i, trial in enumerate(stage.trials):
          if self._stop:  # Several processes agree on it here.
            raise preemption.Stopped
          variables = step_lib.draw_on(context.mesh, tuner)(trial.seed)
          with processes.raise_on_all():
            if i:
              calls = self._examples.evaluation_calls(stage.split, stage.rows)
            features, labels = exact.read_features(
              tuner,
              variables,
              trial.normalize,
              context.params,
              calls,
              count,
              lambda done, i=i: line.update(i * count + done),
            )
          with processes.raise_on_all():
            head, found = exact.solve(
              stage.solver,
              features,
              labels,
              tuner.num_classes,
              weights,
              stage.fractions,
            )
          head = exact.of_first_process(head)
          each.append({**processes.to_host(variables), "head": head})
          solved.append(found)
        line.summary = _describe_solved(solved)
    return stage_lib.StageResult(
      history=[],
      seconds=time.monotonic() - started,
      diverged=[],
      accuracy=None,
      variables=jax.tree.map(lambda *x: np.stack(x), *each),
      solved=solved,
    )

  def _train(
    self, stage: stage_lib.Stage
  ) -> tuple[step_lib.State, stage_lib.Progress]:
    """Train the trials of a pack, from the start or from a checkpoint."""
    context, c, trials = self._context, self._context.config, stage.trials
    progress = stage_lib.Progress()
    static = static_settings(c, stage)
    seeds = np.array([trial.seed for trial in trials], np.uint32)
    state = step_lib.init_on(context.mesh, stage.tuner, static)(
      context.params, seeds
    )
    if self._saved.stage == stage.name:
      progress = self._saved.progress
      self._peak.include(progress.peak_bytes)
      state = self._saver.restore(state)
      if progress.epoch < c.epochs:
        after = f"{stage.label} after epoch {progress.epoch}"
        context.console.note(after, "resume")
    self._saved = stage_lib.ResumePoint()  # The next save replaces it.

    self._log(stage, _rows(stage, progress.history))

    def save(state):
      progress.peak_bytes = self._peak.bytes()
      saved = stage_lib.ResumePoint(stage.name, progress)
      self._saver.save(state, dataclasses.asdict(saved))

    if progress.epoch == c.epochs:
      return state, progress
    with self._stop.at_once(), processes.raise_on_all():
      source = self._examples.training_batches(stage.split, stage.rows)
    used, whole = _used_features(stage, source), lambda state: state
    if used is not None:
      size = stage.tuner.num_features
      whole = lambda state: step_lib.spread_rows(state, used, size)
      source = source.with_features(used)
      mask = stage.feature_mask[:, used]
      stage = dataclasses.replace(stage, feature_mask=mask)
      state = step_lib.take_rows(state, used)
    stage = dataclasses.replace(
      stage,
      frozen_parts=mesh.replicate(stage.frozen_parts, context.mesh),
      feature_mask=mesh.replicate(stage.feature_mask, context.mesh),
    )
    schedule = optim.Schedule(
      c.epochs, c.warmup_epochs, source.steps, c.schedule == "step"
    )
    trial_count = units.format_count(len(trials), stage.trial_noun)
    detail = f"{trial_count} x {units.format_count(c.epochs, 'epoch')}"
    if stage.tuner.num_queries != context.tuner.num_queries:
      detail += f", {stage.tuner.num_queries} queries"
    with context.console.progress(stage.label, c.epochs, detail=detail) as line:

      def report(epoch, loss, accuracy, speed):
        rows = _rows(stage, progress.history, epoch)
        if processes.is_first():
          self._metrics.epochs(stage.name, rows)
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
        self._forecast.add_call(left, steps, seconds)

      live = self._examples.is_live(stage.split)
      self._forecast.begin(stage, self._size, self._done, live)
      frozen = tuner_lib.partition(context.params, stage.tuner.shapes())[1]
      state = loop.run_epochs(
        stage,
        source,
        schedule,
        static,
        stage.settings(self._class_weights(stage)),
        frozen,
        state,
        progress,
        save=lambda state: save(whole(state)),
        due=self._saver.due,
        stop=self._stop,
        report=report,
        timed=timed,
      )
    state = whole(state)
    save(state)
    return state, progress

  def log_probabilities(
    self, stage: stage_lib.Stage, variables: Any, rows: np.ndarray
  ) -> np.ndarray:
    """Classify rows of a stage's split by its only trial, (rows, C) float32.

    Args:
      stage: of one trial.
      variables: of the trial, leaves (1, ...).
      rows: of the split.
    """
    own = jax.tree.map(lambda x: x[0], variables)
    with self._stop.at_once():
      features, _ = self._read(stage, own, rows)
    return _log_probabilities(own["head"], features)

  def cross_validate_head(
    self, stage: stage_lib.Stage, folds: Sequence[np.ndarray]
  ) -> tuple[np.ndarray, float]:
    """Classify each row of a stage's split by a head computed without its fold.

    Features are read once for all folds.

    Args:
      stage: of one trial, whose heads are computed.
      folds: the rows judged in each; together all of the split.

    Returns:
      Log-probabilities (n, C) float32; seconds.
    """
    context, tuner, (trial,) = self._context, stage.tuner, stage.trials
    count, started = self._count(stage.split, None), time.monotonic()
    scores = np.empty((count, tuner.num_classes), np.float32)
    detail = f"{stage.trial_noun}, {len(folds)} x {stage.solver}"
    with (
      self._stop.at_once(),
      context.console.progress(
        stage.label, count, "image", detail=detail
      ) as line,
    ):
      with processes.raise_on_all():
        exact.check_memory(tuner, count)
      variables = step_lib.draw_on(context.mesh, tuner)(trial.seed)
      features, labels = self._read(stage, variables, None, line.update)
      for judged in folds:
        rows = np.setdiff1d(np.arange(count), judged)
        with processes.raise_on_all():
          head, _ = exact.solve(
            stage.solver,
            features[rows],
            labels[rows],
            tuner.num_classes,
            self._class_weights(dataclasses.replace(stage, rows=rows)),
          )
        head = exact.of_first_process(head)
        scores[judged] = _log_probabilities(head, features[judged])
      share = (scores.argmax(axis=-1) == labels).mean()
      line.summary = f"{100 * share:.1f} % by cross-validation"
    return scores, time.monotonic() - started

  def _read(
    self,
    stage: stage_lib.Stage,
    variables: Any,
    rows: np.ndarray | None,
    progress: Callable[[int], None] = lambda done: None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels of rows, as the only trial reads them."""
    with processes.raise_on_all():
      return exact.read_features(
        stage.tuner,
        variables,
        stage.trials[0].normalize,
        self._context.params,
        self._examples.evaluation_calls(stage.split, rows),
        self._count(stage.split, rows),
        progress,
      )

  def _count(self, split: str, rows: np.ndarray | None) -> int:
    return self._examples.count(split) if rows is None else len(rows)

  def _class_weights(self, stage: stage_lib.Stage) -> np.ndarray | None:
    if self._context.config.class_weights != "balanced":
      return None
    labels = self._examples.labels(stage.split, stage.rows)
    return data.balanced_weights(labels, stage.tuner.num_classes)

  def _log(self, stage: stage_lib.Stage, rows: list[dict[str, Any]]) -> None:
    with processes.raise_on_all():
      if processes.is_first():
        self._metrics.epochs(stage.name, rows)

  def _log_outcome(
    self, stage: stage_lib.Stage, result: stage_lib.StageResult
  ) -> None:
    if result.accuracy is not None:
      epoch, name = len(result.history), "val_accuracy"
      self.log_accuracy(stage.name, stage.trials, epoch, name, result.accuracy)

  def log_accuracy(
    self,
    phase: str,
    trials: Sequence[trial_lib.Trial],
    epoch: int,
    name: str,
    accuracy: Sequence[float],
  ) -> None:
    """Add the accuracy of trials to the TensorBoard events."""
    with processes.raise_on_all():
      if processes.is_first():
        self._metrics.outcomes(
          phase,
          [
            {"epoch": epoch, "run": i, **dataclasses.asdict(trial), name: share}
            for i, (trial, share) in enumerate(zip(trials, accuracy))
          ],
        )

  def evaluate(
    self,
    split: str,
    rows: np.ndarray | None,
    ready: Sequence[tuple[tuner_lib.Tuner, step_lib.TrainedTrials]],
    label: str,
  ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Classify examples with every trial of several tuners.

    The backbone sees each image once, unless the devices cannot hold the
    trained variables of all trials at the same time.

    Args:
      split: split to evaluate on; each of its images comes exactly once.
      rows: rows of the split; None: all.
      ready: tuners with their trained trials; if any of them reads the blocks,
        the first one does.
      label: name on the progress line.

    Returns:
      Labels (n,), in the order of the split, which does not depend on devices,
      processes or batches; of each tuner the predicted classes (R + 1, n) of
      every trial and, last, of all together, all int32; and of each tuner the
      probability of that last class (n,), float32. The last ones are -1 and NaN
      if the trials were not evaluated together.
    """
    size = min(trial_memory.weights_at_once(tuner) for tuner, _ in ready)
    if sum(len(trials.normalize) for _, trials in ready) <= size:
      return self._pass(split, rows, ready, label)
    found, unknown = [], []
    for tuner, trials in ready:
      parts = []
      for start in range(0, len(trials.normalize), size):
        some = jax.tree.map(lambda x, i=start: x[i : i + size], trials)
        labels, (part,), _ = self._pass(split, rows, [(tuner, some)], label)
        parts.append(part[:-1])
      found.append(np.concatenate([*parts, np.full_like(part[-1:], -1)]))
      unknown.append(np.full(len(labels), np.nan, np.float32))
    return labels, found, unknown

  def _pass(
    self, split, rows, ready, label
  ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Classify with all tuners in one pass of the backbone."""
    context = self._context
    tuners, trials = zip(*ready)
    trials = mesh.replicate(trials, context.mesh)
    found, count = [], 0
    total = self._count(split, rows)
    with self._stop.at_once(), processes.raise_on_all():
      calls = self._examples.evaluation_calls(split, rows)
    with context.console.progress(label, total, "image") as line:
      evaluate = functools.partial(
        step_lib.eval_steps, tuners, trials, context.params
      )
      ask = lambda: processes.all_reduce_max_async(
        lambda: [self._stop.received]
      )
      run = lambda *call: (evaluate(*call), ask())
      for part, stopped in ahead.compute(run, calls):
        found.append(_real(*processes.to_host(part)))
        count += len(found[-1][0])
        line.update(count)
        if stopped().any():
          raise preemption.Stopped
    labels, *each = zip(*found)
    join = lambda calls: [np.concatenate(x, axis=-1) for x in zip(*calls)]
    return np.concatenate(labels), *map(join, each)


def _real(
  label: np.ndarray,
  predictions: Sequence[np.ndarray],
  probabilities: Sequence[np.ndarray],
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
  """Join the steps of `step.eval_steps`, without rows that only fill up."""
  real = label >= 0
  return (
    label[real],
    [np.moveaxis(x, 1, 0)[:, real] for x in predictions],
    [x[real] for x in probabilities],
  )


def _log_probabilities(head: Any, features: np.ndarray) -> np.ndarray:
  logits = features @ head["kernel"] + head["bias"]
  return special.log_softmax(logits, axis=-1)


def static_settings(config: ml_collections.ConfigDict, stage: stage_lib.Stage):
  """Return the settings of a stage that are compiled in."""
  return step_lib.StaticSettings(
    optimizer=config.optimizer,
    query_dropout=stage.tuner.has_queries
    and any(trial.query_dropout for trial in stage.trials),
    embedding_dropout=config.embedding_dropout,
    lasso=stage.lasso,
    trains=stage.trains,
    editor_rate=config.editor_rate if stage.tuner.editor else 1.0,
    remat=config.remat,
  )


def _used_features(
  stage: stage_lib.Stage, source: batches.Batches
) -> np.ndarray | None:
  """Return the features that any trial uses, if training on them alone pays.

  Features of the head are in device memory, and half of them, for which there
  is room, or fewer are in use. Else None.
  """
  resident = isinstance(source, batches.ResidentBatches)
  if (
    not resident or "features" not in source.data or stage.feature_mask is None
  ):
    return None
  used = np.flatnonzero(stage.feature_mask.any(axis=0))
  return used if 2 * len(used) <= stage.tuner.num_features else None


def _variables(state: step_lib.State, stage: stage_lib.Stage) -> Any:
  """Return {"tuner", "head"}; rows of the head that are masked out are 0."""
  variables = {
    name: stage.frozen_parts.get(name, state.trained[name])
    for name in tuner_lib.TRAINED
  }
  if stage.feature_mask is not None:
    variables["head"] = head_lib.mask_features(
      variables["head"], stage.feature_mask
    )
  return variables


def _describe_solved(solved: Sequence[dict[str, Any]]) -> str:
  """Describe how good computed heads are without a validation split."""
  accuracy = np.mean([each["accuracy"] for each in solved])
  text = f"{100 * accuracy:.1f} % by {results_lib.how_judged(solved[0])}"
  for which, end in (("smallest", min), ("largest", max)):
    if any(
      each["penalty"] == end(tried["penalty"] for tried in each["tried"])
      for each in solved
    ):
      text += f"; the {which} penalty that was tried"
  return text


def _rows(
  stage: stage_lib.Stage, history: list[dict[str, list[float]]], first: int = 0
) -> list[dict[str, Any]]:
  """Return rows of metrics.jsonl, one per epoch from `first` and trial."""
  return [
    {
      "epoch": epoch + 1,
      "run": i,
      **dataclasses.asdict(trial),
      "loss": history[epoch]["loss"][i],
      "accuracy": history[epoch]["accuracy"][i],
    }
    for epoch in range(first, len(history))
    for i, trial in enumerate(stage.trials)
  ]
