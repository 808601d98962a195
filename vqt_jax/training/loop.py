"""The training loop: epochs of all runs of a phase, saved and resumable."""

from collections.abc import Iterator
import dataclasses
import functools
import time
from typing import Any

import numpy as np

from vqt_jax import errors
from vqt_jax.features import batches
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.runtime import processes
from vqt_jax.training import optim
from vqt_jax.training import preemption
from vqt_jax.training import step as step_lib

# What a call may take, so that a run that must go saves itself in time: clouds
# give 30 s. The next call has at most so many times the steps of the last one.
CALL_SECONDS = 5.0
GROWTH = 4


@dataclasses.dataclass(frozen=True)
class Run:
  """One training: a setting and a seed.

  Attributes:
    lr: peak learning rate as used.
    weight_decay: as used.
    seed: of initialisation and dropout.
    query_dropout: rate.
    normalize: whether feature groups are divided by their norms.
  """

  lr: float
  weight_decay: float
  seed: int
  query_dropout: float = 0.0
  normalize: bool = True

  def told(self, batch_size: int) -> str:
    """The setting for people, with the rate per 256 images, as in config.lr."""
    rate = f"lr {self.lr * 256 / batch_size:g}"
    if batch_size != 256:
      rate += f" ({self.lr:g} used: batch {batch_size})"
    return f"{rate}, weight decay {self.weight_decay:g}"


@dataclasses.dataclass(frozen=True)
class Phase:
  """Runs that train together on the same examples.

  Attributes:
    name: what it is for.
    runs: trained side by side.
    source: the examples.
    epochs: how often each is seen.
    warmup_epochs: of `epochs`.
    per_step: the schedule counts steps rather than epochs.
    least: runs whose loss must stay finite; others that diverge are out.
    held: what of each run does not train, see `step.Settings`.
    kept: the features of each run, see `step.Settings`.
  """

  name: str
  runs: tuple[Run, ...]
  source: batches.Resident | batches.Stored | batches.Streamed
  epochs: int
  warmup_epochs: int
  per_step: bool
  least: int
  held: dict[str, Any] = dataclasses.field(default_factory=dict)
  kept: np.ndarray | None = None

  @property
  def settings(self) -> step_lib.Settings:
    """Of all runs, as the compiled step takes them."""
    of = lambda name: np.array([getattr(run, name) for run in self.runs])
    return step_lib.Settings(
      lr=of("lr").astype(np.float32),
      weight_decay=of("weight_decay").astype(np.float32),
      query_dropout=of("query_dropout").astype(np.float32),
      normalize=of("normalize"),
      held=self.held,
      kept=self.kept,
    )

  @functools.cached_property
  def _curve(self) -> np.ndarray:
    """Factors of the peak rate, one an epoch or one a step.

    All at once: to compute one on the devices is to wait for the steps that
    are queued there.
    """
    each = self.source.steps if self.per_step else 1
    curve = optim.schedule(self.epochs * each, self.warmup_epochs * each)
    # An epoch more, for what is left over in a call late in the last one.
    steps = np.arange((self.epochs + 1) * each)
    return np.asarray(curve(steps), np.float32)

  def factors(self, epoch: int, start: int, steps: int) -> np.ndarray:
    """Factors of the peak rate for some steps of an epoch, (steps,) float32."""
    if not self.per_step:
      return np.full(steps, self._curve[epoch])
    first = epoch * self.source.steps + start
    return self._curve[first : first + steps]


@dataclasses.dataclass
class Progress:
  """Where a phase stands, json-able; saved with every checkpoint.

  Attributes:
    epoch: epochs done.
    step: steps done in the next epoch.
    sums: of that epoch so far, per run: loss sum and number right.
    history: per finished epoch {"loss": per run, "accuracy": per run}.
    seconds: of training so far.
    diverged: run -> epoch in which its loss stopped being finite.
    epoch_seconds: of every epoch but the first of each start, which compiles.
    step_bytes: that the compiled step takes; None if unknown.
    peak_bytes: of memory, in the run so far; None if unknown.
  """

  epoch: int = 0
  step: int = 0
  sums: list[list[float]] = dataclasses.field(default_factory=list)
  history: list[dict[str, list[float]]] = dataclasses.field(
    default_factory=list
  )
  seconds: float = 0.0
  diverged: dict[str, int] = dataclasses.field(default_factory=dict)
  epoch_seconds: list[float] = dataclasses.field(default_factory=list)
  step_bytes: int | None = None
  peak_bytes: int | None = None


def train_phase(
  phase: Phase,
  tuner: tuner_lib.Tuner,
  recipe: step_lib.Recipe,
  frozen: Any,
  state: step_lib.State,
  progress: Progress,
  *,
  save,
  due,
  stop,
  report,
  timed,
) -> step_lib.State:
  """Trains all runs of a phase to the end.

  Args:
    phase: what to train.
    tuner: the method.
    recipe: its compiled part.
    frozen: frozen leaves, on the devices.
    state: of `phase.runs`, at `progress`; donated.
    progress: moves with the training.
    save: (state) -> None; starts a checkpoint of it and of `progress`.
    due: () -> bool; whether it is time for one, as this process sees it.
    stop: its `received` becomes true when this process is asked to stop.
    report: (epoch, loss per run, accuracy per run, images per second) -> None;
      the speed is the mean since the first epoch, which compiles: a single one
      is over on the devices before it is looked at, or after.
    timed: (steps, seconds) -> None; hears of every call that is over. The first
      one also compiles.

  Raises:
    UserError: the loss is not finite any more.
    Stopped: asked to stop; saved before.
  """
  settings = phase.settings
  measured = False
  pending = []  # Sums on the devices: read late, so that steps queue up.
  clock, first = time.monotonic(), progress.epoch
  booked = clock  # Until when `progress.seconds` counts.
  compiled = clock  # When the first epoch was over, from which speed counts.
  pace = Pace()

  def ask():
    """Whether to stop, to save, and what pace not to exceed."""
    return processes.ask(lambda: [stop.received, due(), -pace.wish])

  def settle():
    """Waits for the queued steps; books finished epochs."""
    nonlocal clock, booked, compiled
    for epoch, losses, right, count, last in pending:
      losses, right = (x[:count] for x in processes.to_host((losses, right)))
      seconds = pace.measure(count)
      _check(phase, progress, epoch, losses)
      total = np.array(progress.sums or np.zeros((2, len(phase.runs))))
      for step in zip(losses, right):  # In turn: calls differ in length.
        total += step
      progress.sums = total.tolist()
      progress.step += len(losses)
      if last:
        loss, accuracy = total / phase.source.num_examples
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
        seen = phase.source.num_examples * len(phase.runs)
        report(epoch, loss, accuracy, seen * epochs_per_second)
      timed(count, seconds)
    pending.clear()
    now = time.monotonic()
    progress.seconds += now - booked
    booked = now

  asked = ask()
  while progress.epoch + len([p for p in pending if p[-1]]) < phase.epochs:
    epoch = progress.epoch + len([p for p in pending if p[-1]])
    start = progress.step if epoch == progress.epoch else 0
    for call, count in _calls(phase, epoch, start, pace):
      state, losses, right = step_lib.train_steps(
        tuner, recipe, state, frozen, settings, *call
      )
      if not measured:
        measured = True
        progress.step_bytes = step_lib.step_bytes(
          tuner, recipe, state, frozen, settings, *call
        )
      start += count
      last = start == phase.source.steps
      if pending:  # Everything but the call just started.
        settle()
      pending.append((epoch, losses, right, count, last))
      # What was asked a call ago: for the answer of now several processes would
      # have to wait until the steps just started are over.
      asked, before = ask(), asked
      stopping, saving, minus_steps = before()
      pace.steps = int(-minus_steps)
      if stopping or saving:
        settle()
        save(state)
      if stopping:
        raise preemption.Stopped
      if saving:
        asked = ask()  # What was asked before might ask for another save.
  settle()
  return state


class Pace:
  """How many steps a compiled call may take, so that none takes long.

  In a call nobody asks for signals. The first calls, of which one also
  compiles, are short.

  Attributes:
    steps: that the next call takes at most; the same on all processes.
    wish: what it should be, as this process has measured.
  """

  def __init__(self):
    self.steps = self.wish = 1
    self._clock = time.monotonic()

  def measure(self, steps: int) -> float:
    """Hears that a call of so many steps has just ended; returns its time."""
    now = time.monotonic()
    seconds = max(now - self._clock, 1e-9)
    each = seconds / steps
    most = max(self.wish, GROWTH * steps)
    self.wish = max(1, min(int(CALL_SECONDS / each), most))
    self._clock = now
    return seconds


def _calls(
  phase: Phase, epoch: int, start: int, pace: Pace
) -> Iterator[tuple[tuple[Any, ...], int]]:
  """The rest of an epoch: `train_steps`' last arguments, and steps taken."""
  for data, order, mask in phase.source.epoch(epoch, start):
    if len(order) == 1:
      yield (data, order, mask, phase.factors(epoch, start, 1)), 1
      start += 1
      continue
    while start < phase.source.steps:
      factor = phase.factors(epoch, start, len(order))
      count = min(pace.steps, phase.source.steps - start)
      yield (data, order, mask, factor, np.int32(count)), count
      order, mask = np.roll(order, -count, 0), np.roll(mask, -count, 0)
      start += count


def _check(phase, progress, epoch, losses):
  """Books runs whose loss (S, R) is not finite; stops if too few are left."""
  for run in np.flatnonzero(~np.isfinite(losses).all(axis=0)):
    if str(run) in progress.diverged:
      continue
    progress.diverged[str(run)] = epoch
    bad = int(np.argmin(np.isfinite(losses[:, run])))
    left = len(phase.runs) - len(progress.diverged)
    if left < phase.least:
      raise errors.UserError(
        f"The loss became {losses[bad, run]} in epoch {epoch + 1}, step"
        f" {progress.step + bad + 1} of {phase.source.steps}"
        f" ({phase.runs[run].told(phase.source.batch_size)}, seed"
        f" {phase.runs[run].seed}, phase {phase.name}). Lower config.lr in a"
        " new workdir, or look at the value range of the inputs."
      )


def choose(
  runs: tuple[Run, ...], accuracy: list[float], diverged: set[int]
) -> int:
  """The run that val picks: best accuracy after the last epoch.

  On a tie the smaller learning rate wins, then the smaller weight decay; a run
  that diverged never does.
  """
  able = [i for i in range(len(runs)) if i not in diverged]
  return min(
    able, key=lambda i: (-accuracy[i], runs[i].lr, runs[i].weight_decay)
  )
