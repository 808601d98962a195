"""What a person sees, on a pipe and on a terminal; where noise goes."""

import io
import logging
import os
import re
import sys
import warnings

import pytest

from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import logfile


class Terminal(io.StringIO):
  """A terminal of a given width that keeps what was written."""

  encoding = "utf-8"

  def isatty(self):
    return True

  def lines(self):
    """What was on the screen, line by line, without control codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.fixture
def terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.delenv("CI", raising=False)
  monkeypatch.delenv("NO_COLOR", raising=False)

  def make(width):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    return stream, console_lib.Console(stream)

  return make


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(console_lib.time, "monotonic", clock)
  return clock


def train(console, clock, seconds, epochs=100):
  """A phase that takes `seconds` per epoch."""
  with console.progress("sweep", epochs, detail="20 settings") as line:
    for epoch in range(1, epochs + 1):
      clock.now += seconds
      line.update(epoch, loss=0.5, accuracy=0.615, images_per_second=3120.4)
    line.summary = "best val 61.5 %"


def test_a_pipe_gets_plain_lines_now_and_then(clock):
  stream = io.StringIO()
  train(console_lib.Console(stream), clock, seconds=1.0)
  assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
  lines = stream.getvalue().splitlines()
  assert lines[0] == (  # As soon as anything is known.
    "sweep    epoch   5/100  loss 0.500  accuracy 61.5 %  3,120 images/s"
    "  01:35 left"
  )
  assert len(lines) == 11  # At 5, 15, ..., 95 %, and the last.
  assert lines[-1] == "sweep    20 settings  best val 61.5 %  0:01:40"


def test_a_quick_phase_on_a_pipe_is_one_line(clock):
  stream = io.StringIO()
  train(console_lib.Console(stream), clock, seconds=0.01)
  assert len(stream.getvalue().splitlines()) == 1


def test_a_slow_phase_on_a_pipe_shows_life_every_minute(clock):
  stream = io.StringIO()
  train(console_lib.Console(stream), clock, seconds=30.0)
  assert len(stream.getvalue().splitlines()) == 50


def test_a_phase_of_many_units_says_soon_how_long_it_will_take(clock):
  stream = io.StringIO()
  train(console_lib.Console(stream), clock, seconds=4.0, epochs=1000)
  first, second, *_ = stream.getvalue().splitlines()
  assert "epoch     2/1,000" in first and first.endswith("1:06:32 left")
  assert "epoch    17/1,000" in second  # A minute later.


def test_the_speed_of_a_phase_is_that_after_its_first_update(clock):
  progress = console_lib.Console(io.StringIO()).progress(
    "extract", 100, "image"
  )
  with progress as line:
    assert line.start_and_pace() is None
    clock.now += 9  # Compiles.
    line.update(10)
    assert line.start_and_pace() == (0.0, 0.9)
    clock.now += 4
    line.update(30)
    assert line.start_and_pace() == (9.0, 0.2)


def test_nothing_is_said_of_a_phase_that_fails(clock):
  stream = io.StringIO()
  with pytest.raises(KeyError):
    with console_lib.Console(stream).progress("sweep", 3):
      raise KeyError
  assert stream.getvalue() == ""


def test_a_terminal_gets_one_live_line_that_ends_as_a_plain_one(
  terminal, clock
):
  stream, console = terminal(100)
  with console.progress("seeds", 100) as line:
    clock.now += 5
    line.update(1, loss=0.5, accuracy=0.615, images_per_second=3120.4)
    clock.now += 49
    line.update(50, loss=0.5, accuracy=0.615, images_per_second=3120.4)
    console.note("said meanwhile")
  lines = stream.lines()
  assert "\n" not in stream.getvalue().split("said meanwhile")[0]
  live = [line for line in lines if "50/100" in line and "━" in line]
  assert live and all(
    part in live[-1]
    for part in ("seeds", "loss 0.500", "61.5 %", "images/s", "00:50 left")
  )
  assert lines[-1].startswith("seeds    epoch  50/100  loss 0.500")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_the_live_line_fits(terminal, clock, width):
  stream, console = terminal(width)
  with console.progress(
    "sweep", 100, detail="20 settings x 100 epochs"
  ) as line:
    line.update(1)
    clock.now += 1
    line.update(99, loss=0.5, accuracy=0.615, images_per_second=3120.4)
  *live, _ = stream.lines()
  assert live and max(map(len, live)) <= width
  if width >= 80:
    assert "3,120 images/s" in live[-1] and live[-1].endswith(" left")


@pytest.mark.parametrize("name, value", [("CI", "true"), ("TERM", "dumb")])
def test_ci_and_dumb_terminals_get_plain_lines(
  monkeypatch, terminal, name, value
):
  monkeypatch.setenv(name, value)
  del terminal
  stream = Terminal()
  console = console_lib.Console(stream)
  console.header(["vqt on cifar100", "frozen 85.8 M"])
  console.note("1,000 images", "store")
  assert stream.getvalue() == (
    "vqt on cifar100\nfrozen 85.8 M\nstore    1,000 images\n"
  )


def test_long_lines_are_not_broken_on_a_pipe():
  stream = io.StringIO()
  console_lib.Console(stream).note("x" * 500)
  assert stream.getvalue() == "x" * 500 + "\n"


def test_tables_align_numbers():
  stream = io.StringIO()
  console_lib.Console(stream).table(
    ["method", "accuracy"], [["vqt", "60.9"], ["linear", 5]]
  )
  lines = [line.rstrip() for line in stream.getvalue().splitlines()]
  assert lines == [
    "method   accuracy",
    "vqt          60.9",
    "linear          5",
  ]


def test_letters_that_the_stream_lacks_are_replaced():
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding="ascii")
  console_lib.Console(stream).note("60.9 \u00b1 0.4")
  stream.flush()
  assert raw.getvalue() == b"60.9 ? 0.4\n"


def test_a_closed_pipe_does_not_stop_a_run():
  reading, writing = os.pipe()
  os.close(reading)
  with os.fdopen(writing, "w") as stream:
    console = console_lib.Console(stream)
    console.note("nobody reads this")
    console.note("nor this")
    os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # To close in peace.


def test_a_full_disk_or_a_closed_stream_does_not_stop_a_run(
  monkeypatch, tmp_path
):
  saved, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
  os.dup2(full, 2)
  try:
    with logfile.redirect_output(tmp_path / "log.txt") as screen:
      print("nobody reads this", file=screen)
      console_lib.Console().note("nor this")
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(full)
  monkeypatch.setattr(sys, "stderr", None)
  console_lib.Console().note("nor this")


def test_noise_goes_to_the_log_and_the_console_to_the_screen(tmp_path, capfd):
  log = tmp_path / "log.txt"
  before = logging.root.handlers
  with warnings.catch_warnings(action="always"), logfile.redirect_output(log):
    print("printed")
    print("to stderr", file=sys.stderr)
    os.write(1, b"C++ to stdout\n")
    os.write(2, b"C++ to stderr\n")
    logging.getLogger("orbax").warning("logged")
    warnings.warn("warned", stacklevel=1)
    console_lib.Console().note("seen")
  console_lib.Console().note("seen after")
  out, err = capfd.readouterr()
  assert out == ""
  assert err == "seen\nseen after\n"
  for text in (
    "printed",
    "to stderr",
    "C++ to stdout",
    "C++ to stderr",
    "logged",
    "warned",
  ):
    assert text in log.read_text()
  assert logging.root.handlers is before
