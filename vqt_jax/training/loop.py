"""The training loop: epochs of all trials of a stage, saved and resumable."""

from collections.abc import Iterator
import time
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.features import batches
from vqt_jax.runtime import processes
from vqt_jax.training import optim
from vqt_jax.training import preemption
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import step as step_lib

# Longest call, so that a preempted run saves itself in time: clouds give 30 s.
# A call has at most GROWTH times the steps of the call before it.
CALL_SECONDS = 5.0
GROWTH = 4


def run_epochs(
  stage: stage_lib.Stage,
  source: batches.Batches,
  schedule: optim.Schedule,
  static: step_lib.StaticSettings,
  settings: step_lib.Settings,
  frozen: Any,
  state: step_lib.State,
  progress: stage_lib.Progress,
  *,
  save,
  due,
  stop,
  report,
  timed,
) -> step_lib.State:
  """Train all trials of a stage to the end.

  Args:
    stage: trials to train.
    source: examples to train on.
    schedule: learning rate over the steps of `source`.
    static: settings that are compiled in.
    settings: settings of the trials, traced.
    frozen: frozen leaves, on the devices.
    state: training state at `progress`; donated.
    progress: updated in place.
    save: (state) -> None; starts a checkpoint of it and of `progress`.
    due: () -> bool; whether this process wants a checkpoint now.
    stop: its `received` becomes true when this process is asked to stop.
    report: (epoch, loss per trial, accuracy per trial, images per second) ->
      None. The speed is the mean since the first epoch, which compiles; the
      speed of a single epoch would be wrong, as steps are queued. May raise a
      `UserError`, on some of the processes: that ends all of them.
    timed: (steps, seconds) -> None; called after every compiled call, of which
      the first also compiles.

  Raises:
    UserError: the loss of too many trials is not finite, or what `report`
      raised on any process.
    Stopped: asked to stop; saved before.
  """
  measured = False
  pending = []  # Sums on the devices, read late so that steps queue up.
  clock, first = time.monotonic(), progress.epoch
  booked = clock  # Time up to which `progress.seconds` counts.
  compiled = clock  # End of the first epoch; speed counts from here.
  call_length = CallLength()
  failure = None  # Of `report`, on this process.

  def ask():
    """Reduce over all: stop?, save?, minus the call length, failed?"""
    return processes.all_reduce_max_async(
      lambda: [stop.received, due(), -call_length.wish, failure is not None]
    )

  def settle():
    """Wait for the queued steps and record finished epochs."""
    nonlocal clock, booked, compiled, failure
    for epoch, losses, right, count, last in pending:
      losses, right = (x[:count] for x in processes.to_host((losses, right)))
      seconds = call_length.measure(count)
      _check(stage, source, progress, epoch, losses)
      total = np.array(progress.sums or np.zeros((2, len(stage.trials))))
      # In order, so that the length of calls does not matter.
      for step in zip(losses, right):
        total += step
      progress.sums = total.tolist()
      progress.step += len(losses)
      if last:
        loss, accuracy = total / source.num_examples
        progress.history.append(
          {"loss": loss.tolist(), "accuracy": accuracy.tolist()}
        )
        progress.epoch, progress.step, progress.sums = epoch + 1, 0, []
        elapsed = time.monotonic() - clock
        clock += elapsed
        if epoch > first:
          progress.epoch_seconds.append(elapsed)
          epochs_per_second = (epoch - first) / max(clock - compiled, 1e-9)
        else:
          epochs_per_second, compiled = 1 / max(elapsed, 1e-9), clock
        seen = source.num_examples * len(stage.trials)
        try:
          report(epoch, loss, accuracy, seen * epochs_per_second)
        except errors.UserError as e:
          failure = e
      timed(count, seconds)
    pending.clear()
    now = time.monotonic()
    progress.seconds += now - booked
    booked = now

  asked = ask()
  while progress.epoch + len([p for p in pending if p[-1]]) < schedule.epochs:
    epoch = progress.epoch + len([p for p in pending if p[-1]])
    start = progress.step if epoch == progress.epoch else 0
    for call, count in _calls(source, schedule, epoch, start, call_length):
      state, losses, right = step_lib.train_steps(
        stage.tuner, static, state, frozen, settings, *call
      )
      if not measured:
        measured = True
        progress.step_bytes = step_lib.step_bytes(
          stage.tuner, static, state, frozen, settings, *call
        )
      start += count
      last = start == source.steps
      if pending:  # All but the call that was just started.
        settle()
      pending.append((epoch, losses, right, count, last))
      # Use the reduction of the call before: waiting for that of now would mean
      # to wait for the steps that were just started.
      asked, before = ask(), asked
      stopping, saving, minus_steps, failed = before()
      processes.raise_if_any(failure, failed)
      call_length.steps = int(-minus_steps)
      if stopping or saving:
        settle()
        save(state)
      if stopping:
        raise preemption.Stopped
      if saving:
        asked = ask()  # The pending one may ask for a second save.
  settle()
  processes.raise_if_any(failure, processes.any_process(failure is not None))
  return state


class CallLength:
  """Number of steps in a compiled call, chosen so that no call takes long.

  Signals are only noticed between calls. The first calls, one of which also
  compiles, are short.

  Attributes:
    steps: most steps of the next call, the same on all processes.
    wish: the number that this process's measurements suggest.
  """

  def __init__(self):
    self.steps = self.wish = 1
    self._clock = time.monotonic()

  def measure(self, steps: int) -> float:
    """Record that a call of `steps` steps just ended; return its seconds."""
    now = time.monotonic()
    seconds = max(now - self._clock, 1e-9)
    each = seconds / steps
    most = max(self.wish, GROWTH * steps)
    self.wish = max(1, min(int(CALL_SECONDS / each), most))
    self._clock = now
    return seconds


def _calls(
  source: batches.Batches,
  schedule: optim.Schedule,
  epoch: int,
  start: int,
  call_length: CallLength,
) -> Iterator[tuple[tuple[Any, ...], int]]:
  """Yield the last arguments of `train_steps`, and steps, to an epoch's end."""
  for data, order, mask in source.epoch(epoch, start):
    if len(order) == 1:
      yield (data, order, mask, schedule.factors(epoch, start, 1)), 1
      start += 1
      continue
    while start < source.steps:
      factor = schedule.factors(epoch, start, len(order))
      count = min(call_length.steps, source.steps - start)
      yield (data, order, mask, factor, np.int32(count)), count
      order, mask = np.roll(order, -count, 0), np.roll(mask, -count, 0)
      start += count


def _check(stage, source, progress, epoch, losses):
  """Record trials whose loss (S, R) is not finite.

  Raises:
    UserError: too few trials are left.
  """
  for i in np.flatnonzero(~np.isfinite(losses).all(axis=0)):
    if str(i) in progress.diverged:
      continue
    progress.diverged[str(i)] = epoch
    bad = int(np.argmin(np.isfinite(losses[:, i])))
    left = len(stage.trials) - len(progress.diverged)
    if left < stage.must_stay_finite:
      trial = stage.trials[i]
      raise errors.UserError(
        f"The loss became {losses[bad, i]} in epoch {epoch + 1}, step"
        f" {progress.step + bad + 1} of {source.steps}"
        f" ({trial.describe(source.batch_size)}, seed {trial.seed}, stage"
        f" {stage.name}). Lower config.lr in a new workdir, or look at the"
        " value range of the inputs."
      )
