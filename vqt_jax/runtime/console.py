"""Output of a run for people: header, progress lines, tables.

On a terminal a progress line is live and ends as a plain line; on a pipe or in
CI there are plain lines without control codes:

  search   20 settings  ======  epoch  43/100  loss 0.412  accuracy 61.5 %  ...
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
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
# Between two plain lines of a progress line: at least, and at most.
MIN_SECONDS, MAX_SECONDS = 5, 60


class Console:
  """Prints lines, progress and tables to the screen or another stream."""

  def __init__(self, stream: TextIO | None = None):
    stream = logfile.LossyStream(stream or logfile.screen())
    self.live = (
      stream.isatty()
      and os.environ.get("TERM") != "dumb"
      and os.environ.get("CI", "").lower() in ("", "0", "false")
    )
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
    """Print lines of which the first one stands out."""
    for i, line in enumerate(lines):
      self.out.print(line, style="bold" if i == 0 else None, soft_wrap=True)

  def note(self, text: str, label: str = "") -> None:
    """Print one line, behind a label as wide as those of progress lines."""
    self.out.print(_labelled(label, text), soft_wrap=True)

  @contextlib.contextmanager
  def progress(
    self, name: str, total: int, unit: str = "epoch", detail: str = ""
  ) -> Iterator["ProgressLine"]:
    """Show a progress line while the block runs.

    Args:
      name: label of the line, e.g. "search".
      total: number of `unit`s until the work is done.
      unit: what is counted, e.g. "epoch" or "image".
      detail: what the work is, e.g. "20 settings x 100 epochs".

    Yields:
      The line, to be updated. Its last state is printed at the end, unless the
      block raises.
    """
    line = ProgressLine(self, name, total, unit, detail)
    live = rich.live.Live(
      get_renderable=lambda: line,
      console=self.out,
      refresh_per_second=5,
      transient=True,
      redirect_stdout=False,
      redirect_stderr=False,
    )
    with live if self.live else contextlib.nullcontext():
      yield line
    self.out.print(line.last_line(), soft_wrap=True)

  def table(
    self, columns: Sequence[str], rows: Sequence[Sequence[Any]]
  ) -> None:
    """Print a table; all columns but the first are aligned to the right."""
    table = rich.table.Table(
      header_style="dim", box=None, pad_edge=False, padding=(0, 3, 0, 0)
    )
    for i, column in enumerate(columns):
      table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
      table.add_row(*map(str, row))
    self.out.print(table)


@dataclasses.dataclass
class ProgressLine:
  """The progress of some work, and the line that shows it.

  Unlike that of `rich.progress` the line keeps the time left in view on narrow
  terminals, and there are plain lines for pipes.

  Attributes:
    summary: shown on the last line in place of the last loss and accuracy.
  """

  _console: Console
  _name: str
  _total: int
  _unit: str
  _detail: str
  summary: str = ""

  def __post_init__(self):
    self._start = time.monotonic()
    self._first: tuple[int, float] | None = None
    self._printed = (0, self._start)
    self._done = 0
    self._shown: list[str] = []

  def update(
    self,
    done: int,
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    images_per_second: float | None = None,
  ) -> None:
    """Set the number of units that are done, earlier starts included."""
    now = time.monotonic()
    # The first step compiles; time left is judged by what follows it.
    self._first = self._first or (done, now)
    self._done = done
    self._shown = [
      *([] if loss is None else [f"loss {loss:.3f}"]),
      *([] if accuracy is None else [f"accuracy {100 * accuracy:.1f} %"]),
      *([f"{images_per_second:,.0f} images/s"] if images_per_second else []),
    ]
    if not self._console.live and done < self._total:
      self._print_plain(now)

  def start_and_pace(self) -> tuple[float, float] | None:
    """Seconds until the first update, and of each unit after it.

    After a single update the start is taken to be 0 s. None before any.
    """
    if not self._first:
      return None
    done, when = self._first
    start = when - self._start
    if self._done == done:
      return 0.0, start / max(done, 1)
    return start, (time.monotonic() - when) / (self._done - done)

  def last_line(self) -> str:
    """The line that stays when the work is done."""
    shown = [self.summary] if self.summary else self._shown
    elapsed = units.format_seconds(time.monotonic() - self._start)
    parts = [self._detail or self._count(), *shown, elapsed]
    return _labelled(self._name, _joined(parts))

  def __rich_console__(
    self,
    console: rich.console.Console,
    options: rich.console.ConsoleOptions,
  ) -> Iterator[Any]:
    """Render the live line; what is least important goes where it is narrow."""
    room = options.max_width - LABEL_WIDTH - 2
    parts = [self._count(), *self._shown, self._time_left()]
    while len(parts) > 2 and len(_joined(parts)) > room:
      del parts[-2]
    numbers, detail = _joined(parts), self._detail and self._detail + GAP
    room -= len(numbers) + len(GAP)
    if len(detail) + MIN_BAR > room:
      detail = ""
    cells = [f"{self._name:<{LABEL_WIDTH}} {detail}"]
    if (width := min(MAX_BAR, room - len(detail))) >= MIN_BAR:
      bar = rich.progress_bar.ProgressBar(self._total, self._done, width)
      bar.complete_style = bar.finished_style = "green"
      cells += [bar, GAP]
    line = rich.table.Table.grid()
    line.add_row(*cells, rich.text.Text(numbers, no_wrap=True))
    yield line

  def _print_plain(self, now: float) -> None:
    """Print a line if 10 % or a minute have passed since the last one.

    The first one is printed as soon as the time left is known.
    """
    done, when = self._printed
    far = self._done - done >= self._total / 10
    far |= not done and self._has_pace()
    seconds = now - when
    if (far and seconds >= MIN_SECONDS) or seconds >= MAX_SECONDS:
      self._printed = (self._done, now)
      left = self._time_left() if self._has_pace() else ""
      text = _joined([self._count(), *self._shown, left])
      self._console.note(text, self._name)

  def _count(self) -> str:
    total = f"{self._total:,}"
    return f"{self._unit} {self._done:>{len(total)},}/{total}"

  def _has_pace(self) -> bool:
    return self._first is not None and self._done > self._first[0]

  def _time_left(self) -> str:
    """Time left; as long as that is unknown, the time since the start."""
    if not self._has_pace():
      return units.format_seconds(time.monotonic() - self._start)
    _, pace = self.start_and_pace()
    left = units.format_seconds(pace * (self._total - self._done))
    return f"{left.removeprefix('0:')} left"


def for_process() -> Console:
  """A console on the screen for the first process, on nothing for others."""
  return Console(None if processes.is_first() else io.StringIO())


def _joined(parts: Sequence[str]) -> str:
  return GAP.join(filter(None, parts))


def _labelled(label: str, text: str) -> str:
  return f"{label:<{LABEL_WIDTH}} {text}".rstrip() if label else text
