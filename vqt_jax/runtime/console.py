"""What a person sees of a run.

On a terminal a phase is one live line that ends as a plain one; on a pipe or
in CI, plain lines without control codes. The layout:

  sweep    20 settings  ======  epoch  43/100  loss 0.412  accuracy 61.5 %  ...
"""

from collections.abc import Iterator, Sequence
import contextlib
import io
import os
import time
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from vqt_jax.runtime import logfile
from vqt_jax.runtime import processes
from vqt_jax.runtime import units

LABEL_WIDTH = 8
GAP = "  "
MIN_BAR, MAX_BAR = 8, 24  # characters


class Console:
  """Prints a run's header, phases and results."""

  def __init__(self, stream: TextIO | None = None, interval: float = 5.0):
    """Starts without printing.

    Args:
      stream: where to; None is the screen (standard error).
      interval: least number of seconds between two plain lines of a phase.
    """
    stream = _Patient(stream or logfile.screen())
    self.live = (
      stream.isatty()
      and os.environ.get("TERM") != "dumb"
      and os.environ.get("CI", "").lower() in ("", "0", "false")
    )
    self.interval = interval
    self.out = rich.console.Console(
      file=stream,
      force_terminal=self.live,
      color_system="auto" if self.live else None,
      highlight=False,
      markup=False,
      emoji=False,
      width=None if self.live else 200,
    )

  def header(self, lines: Sequence[str]) -> None:
    """The resolved setting; its first line stands out."""
    for i, line in enumerate(lines):
      self.out.print(line, style="bold" if i == 0 else None, soft_wrap=True)

  def note(self, text: str, label: str = "") -> None:
    """One line, behind a label as wide as those of phases."""
    self.out.print(_labelled(label, text), soft_wrap=True)

  @contextlib.contextmanager
  def phase(
    self, name: str, total: int, unit: str = "epoch", detail: str = ""
  ) -> Iterator["Phase"]:
    """A stretch of work with a progress line.

    Args:
      name: e.g. "sweep".
      total: number of `unit`s until it is done.
      unit: what is counted, e.g. "epoch" or "image".
      detail: what is being done, e.g. "20 settings x 100 epochs".

    Yields:
      The phase, to be updated. Its last line is printed on a normal exit.
    """
    phase = Phase(self, name, total, unit, detail)
    if self.live:
      with rich.live.Live(
        get_renderable=lambda: phase,
        console=self.out,
        refresh_per_second=5,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
      ):
        yield phase
    else:
      yield phase
    self.out.print(phase.last_line(), soft_wrap=True)

  def table(
    self,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
  ) -> None:
    """A small table; numbers should come formatted."""
    table = rich.table.Table(
      title=title,
      title_justify="left",
      title_style="bold",
      header_style="dim",
      box=None,
      pad_edge=False,
      padding=(0, 3, 0, 0),
    )
    for i, column in enumerate(columns):
      table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
      table.add_row(*map(str, row))
    self.out.print(table)

  def result(self, lines: Sequence[str]) -> None:
    """What came out; the first line stands out."""
    self.header(lines)


class Phase:
  """Progress of one stretch of work; made by `Console.phase`."""

  def __init__(
    self, console: Console, name: str, total: int, unit: str, detail: str
  ):
    self._console = console
    self._name = name
    self._total = total
    self._unit = unit
    self._detail = detail
    self._start = time.monotonic()
    self._first: tuple[int, float] | None = None
    self._printed = (0, self._start)
    self.done = 0
    self.shown: list[str] = []
    self.summary = ""  # On the last line instead of the last loss and accuracy.

  def update(
    self,
    done: int,
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    images_per_second: float | None = None,
  ) -> None:
    """Says how far it is.

    Args:
      done: number of units that are finished, of all (also when resumed).
      loss: of the last epoch.
      accuracy: of the last epoch, 0..1.
      images_per_second: speed.
    """
    now = time.monotonic()
    # The first step compiles; time left is judged by what follows it.
    self._first = self._first or (done, now)
    self.done = done
    shown = []
    if loss is not None:
      shown.append(f"loss {loss:.3f}")
    if accuracy is not None:
      shown.append(f"accuracy {100 * accuracy:.1f} %")
    if images_per_second is not None:
      shown.append(f"{images_per_second:,.0f} images/s")
    self.shown = shown
    if not self._console.live and done < self._total:
      self._plain(now)

  def measured(self) -> tuple[float, float] | None:
    """Seconds until the first update, and of each unit that came after it.

    With one update alone its units are all that is known. None without any.
    """
    if not self._first:
      return None
    done, when = self._first
    start = when - self._start
    if self.done == done:
      return 0.0, start / max(done, 1)
    return start, (time.monotonic() - when) / (self.done - done)

  def last_line(self) -> str:
    """The line that stays."""
    shown = [self.summary] if self.summary else self.shown
    parts = [self._detail or self._progress(), *shown, self._elapsed()]
    return _labelled(self._name, GAP.join(filter(None, parts)))

  def __rich_console__(
    self,
    console: rich.console.Console,
    options: rich.console.ConsoleOptions,
  ) -> Iterator[Any]:
    """The live line: what fits of it, the least important left out first."""
    room = options.max_width - LABEL_WIDTH - 2 + len(GAP)
    shown = self.shown  # Another thread may replace it meanwhile.
    numbers = [self._progress(), *shown, self._left() or self._elapsed()]
    size = lambda parts: sum(len(part) + len(GAP) for part in parts)
    detail = self._detail and self._detail + GAP
    if len(detail) + MIN_BAR + len(GAP) + size(numbers) > room:
      detail = ""
    for part in reversed(shown):
      if size(numbers) > room:
        numbers.remove(part)
    bar = min(MAX_BAR, room - len(detail) - len(GAP) - size(numbers))
    cells = [f"{self._name:<{LABEL_WIDTH}} {detail}", GAP.join(numbers)]
    cells = [rich.text.Text(x, no_wrap=True, end="") for x in cells]
    if bar >= MIN_BAR:
      cells[1:1] = [
        rich.progress_bar.ProgressBar(
          self._total,
          self.done,
          width=bar,
          complete_style="green",
          finished_style="green",
        ),
        rich.text.Text(GAP),
      ]
    line = rich.table.Table.grid()
    line.add_row(*cells)
    yield line

  def _plain(self, now: float) -> None:
    """A line now and then: after 10 % and `interval`, or after a minute.

    The first comes as soon as there is a speed, that is, also the time left.
    """
    done, when = self._printed
    quiet = now - when
    far = self.done - done >= self._total / 10
    far |= not done and bool(self._left())
    if (far and quiet >= self._console.interval) or quiet >= 60:
      self._printed = (self.done, now)
      parts = [self._progress(), *self.shown, self._left()]
      text = _labelled(self._name, GAP.join(filter(None, parts)))
      self._console.out.print(text, soft_wrap=True)

  def _progress(self) -> str:
    total = f"{self._total:,}"
    return f"{self._unit} {self.done:>{len(total)},}/{total}"

  def _elapsed(self) -> str:
    return units.format_seconds(time.monotonic() - self._start)

  def _left(self) -> str:
    """Time left, judged by the speed since the first update; "" if unknown."""
    if not self._first or self.done <= self._first[0]:
      return ""
    _, pace = self.measured()
    left = units.format_seconds(pace * (self._total - self.done))
    return f"{left.removeprefix('0:')} left"


def of_process() -> Console:
  """The screen on the first process; the others say nothing."""
  return Console(None if processes.is_first() else io.StringIO())


def _labelled(label: str, text: str) -> str:
  return f"{label:<{LABEL_WIDTH}} {text}".rstrip() if label else text


class _Patient:
  """A stream that outlives its reader.

  A run goes on when its terminal or pipe is closed, and a character that the
  stream's encoding lacks is replaced.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream
    self.encoding = getattr(stream, "encoding", None) or "utf-8"

  def isatty(self) -> bool:
    return self._stream.isatty()

  def fileno(self) -> int:
    return self._stream.fileno()

  def write(self, text: str) -> None:
    text = text.encode(self.encoding, "replace").decode(self.encoding)
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()
