"""The command line; its mistakes are in `test_bad_input.py`."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import types

import pytest

import main
from vqt_jax import cli
from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.runtime import console
from vqt_jax.runtime import devices
from vqt_jax.training import preemption

CONFIG = "--config=configs/vtab_cifar.py"
SAID = "It's over; see the log."
ROOT = os.path.dirname(os.path.abspath(main.__file__))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def run(capsys, *args):
  """Exit status and what was said on stderr."""
  status = main.main(["main.py", *args])
  return status, capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(capsys):
  status, said = run(capsys, CONFIG, "--config.epochs=ten", "--debug")
  assert status == 2
  assert "Traceback" in said


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_every_field(capsys, flag):
  assert main.main(["main.py", flag]) == 0
  told = capsys.readouterr().out
  for name in fields.FIELDS:
    assert f"\n--config.{name}=" in told
  argv = re.findall(r"^--config\.[a-z].*", told, re.M)
  config = cli.parse(["main.py", "--config=vtab", *argv]).config
  assert config == config_dict.default_config()


@pytest.mark.parametrize(
  "name, given, counts",
  [
    ("lr", ["=0.1", "=0.5"], (0.5,)),
    ("lr", ["=(1,2)", "=3,4"], (3.0, 4.0)),
    ("seeds", ["=1", " [1,2]", " 3,4"], (3, 4)),
    ("best.num_queries", ["=1", "=2,3"], (2, 3)),
    ("epochs", ["=1", " 2"], 2),
  ],
)
def test_of_a_field_given_twice_the_last_counts(name, given, counts):
  argv = " ".join(f"--config.{name}{value}" for value in given).split(" ")
  config = cli.parse(["main.py", CONFIG, *argv]).config
  assert repr(config[name]) == repr(counts)


def test_of_two_config_files_the_last_counts():
  argv = ["main.py", "--config=vtab", "--config.epochs=3", "--config", "digits"]
  config = cli.parse(argv).config
  assert (config.task, config.epochs) == ("digits", 3)


@pytest.mark.parametrize(
  "name", ["digits", "digits.py", "configs/digits", "configs/digits.py"]
)
def test_shipped_configs_are_found_from_anywhere(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  argv = ["main.py", f"--config={name}:method=linear"]
  config = cli.parse(argv).config
  assert (config.task, config.method) == ("digits", "linear")
  mine = tmp_path / name  # What lies in the folder comes first.
  mine.parent.mkdir(exist_ok=True)
  mine.write_text(
    "from vqt_jax.configs import digits\n"
    "def get_config(arg):\n"
    "  config = digits.get_config(arg)\n"
    "  config.update(epochs=7, lr=0.3)\n"
    "  return config\n"
  )
  config = cli.parse([*argv, "--config.lr=1,2"]).config
  assert (config.method, config.epochs, config.lr) == ("linear", 7, (1.0, 2.0))


@pytest.mark.parametrize(
  "plugin, given, expected",
  [
    ("xla_cuda13", "", devices.GPU_FLAGS),
    # The last one wins.
    ("xla_cuda13", "--a=1", f"{devices.GPU_FLAGS} --a=1"),
    ("xla_cuda13", "flags.txt", "flags.txt"),
    ("other", "--a=1", "--a=1"),
  ],
)
def test_gpus_are_asked_for_the_same_bits_each_time(
  monkeypatch, plugin, given, expected
):
  plugins = [types.SimpleNamespace(name=plugin)]
  monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins)
  monkeypatch.setenv("XLA_FLAGS", given)
  for _ in range(2):
    devices.set_gpu_flags()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
  "name, value, error, found",
  [
    (
      "JAX_PLATFORMS",
      "CPU",
      RuntimeError(
        "Unable to initialize backend 'CPU': Backend 'CPU' is not"
        " in the list of known backends: ['cpu', 'tpu']. (set"
        " JAX_PLATFORMS='' to automatically choose one)"
      ),
      "['cpu', 'tpu']). Unset JAX_PLATFORMS,",
    ),
    ("JAX_PLATFORMS", "cuda", AssertionError(), "(it sees no GPU). Unset"),
    (
      "JAX_PLATFORM_NAME",
      "gpu",
      RuntimeError("Unknown backend: 'gpu'"),
      "(Unknown backend: 'gpu'). Unset JAX_PLATFORM_NAME,",
    ),
    (
      "JAX_PLATFORMS",
      "",
      RuntimeError("Unable to initialize backend 'a'"),
      "JAX finds no devices: Unable to initialize backend 'a'",
    ),
  ],
)
def test_devices_that_are_not_there(
  capsys, tmp_path, monkeypatch, name, value, error, found
):
  def fail():
    raise error

  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv(name, value)
  monkeypatch.setattr("jax.devices", fail)
  for place in (f"--workdir={tmp_path / 'run'}", "--plan=here"):
    status, said = run(capsys, CONFIG, place)
    assert status == 2 and found in said and said.count("\n") == 1
    assert said.startswith(f"error: {name}={value}: JAX" if value else "error")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def train(monkeypatch):
  """Replaces the training by a function that the test sets."""
  module = types.SimpleNamespace(train=None)
  monkeypatch.setattr(cli, "train", module)
  return module


def test_a_run_gets_the_resolved_config_and_its_noise_the_log(
  capfd, tmp_path, train
):
  seen = []

  def fake(config, workdir, console):
    print("library noise")
    seen.append((config, workdir))

  train.train = fake
  workdir = str(tmp_path / "run")
  args = [CONFIG, f"--workdir={workdir}", "--config.preset=authors"]
  assert main.main(["main.py", *args, "--config.gelu=tanh"]) == 0
  ((config, given),) = seen
  assert given == workdir
  assert (config.embedding_dropout, config.gelu) == (0.1, "tanh")
  assert capfd.readouterr() == ("", "")
  assert "library noise" in (tmp_path / "run" / "log.txt").read_text()
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert saved["resize"] == "legacy"


def test_a_workdir_of_another_config_stays_untouched(capsys, tmp_path, train):
  train.train = lambda config, workdir, console: None
  assert run(capsys, CONFIG, f"--workdir={tmp_path}")[0] == 0
  (tmp_path / "results.json").write_text("{}")
  before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  status, said = run(
    capsys, CONFIG, f"--workdir={tmp_path}", "--config.num_queries=10"
  )
  assert status == 2
  assert "holds a run of another config: " in said
  assert "num_queries was 1, is now 10" in said
  assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_an_error_of_the_run_is_said_after_the_log_is_closed(
  capfd, tmp_path, train
):
  def fake(config, workdir, console):
    raise errors.UserError("The data is not prepared.")

  train.train = fake
  assert main.main(["main.py", CONFIG, f"--workdir={tmp_path}"]) == 2
  assert capfd.readouterr().err == "error: The data is not prepared.\n"


def test_a_stopped_run_exits_well(capfd, tmp_path, train):
  def fake(config, workdir, console):
    raise preemption.Stopped

  train.train = fake
  assert main.main(["main.py", CONFIG, f"--workdir={tmp_path}"]) == 75
  assert "resume with the same command" in capfd.readouterr().err


def test_an_interrupted_run_promises_no_save(capfd, tmp_path, train):
  def fake(config, workdir, console):
    raise KeyboardInterrupt

  train.train = fake
  assert main.main(["main.py", CONFIG, f"--workdir={tmp_path}"]) == 130
  said = capfd.readouterr().err
  assert said.startswith("Interrupted; the same command resumes from the last")
  assert "if there is one" in said


@pytest.mark.parametrize(
  "end, words",
  [
    ("", ""),
    ("os.abort()", f"error: {SAID}\n"),
    ("os.kill(os.getpid(), 9)", f"error: {SAID}\n"),
  ],
)
def test_a_killed_process_is_told_of(tmp_path, end, words):
  """Of a process that dies in C++ code, or is killed, another one tells."""
  log = tmp_path / "log.txt"
  program = (
    "import os\n"
    "from vqt_jax.runtime import logfile\n"
    f"path, words = {str(log)!r}, {SAID!r}\n"
    "with logfile.redirect_output(path, if_killed=words):\n"
    f"  {end or 'pass'}\n"
  )
  done = subprocess.run(  # Ends when nobody holds its standard error any more.
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.stdout, done.stderr) == ("", words)
  assert ("Fatal Python error: Abort" in log.read_text()) == ("abort" in end)


def test_closed_streams(tmp_path):
  """What is opened meanwhile does not get what is printed."""
  program = (
    "import os, sys\n"
    "from vqt_jax.runtime import logfile\n"
    "logfile.reopen_closed_streams()\n"
    "file = open(sys.argv[1], 'w')\n"
    "with logfile.redirect_output(sys.argv[2]):\n"
    "  print('printed')\n"
    "  os.write(2, b'written')\n"
    "print('to nobody')\n"
    "print('to nobody', file=sys.stderr)\n"
  )
  names = tmp_path / "file.txt", tmp_path / "log.txt"
  closing = 'exec "$@" 0<&- >&- 2>&-'
  subprocess.run(
    ["sh", "-c", closing, "sh", sys.executable, "-c", program, *names],
    check=True,
  )
  assert [name.read_text() for name in names] == ["", "printed\nwritten"]


def test_without_a_home_folder_none_is_made(monkeypatch):
  """By Keras, in the current folder."""
  monkeypatch.setenv("KERAS_HOME", "")  # To be as it was in the end.
  monkeypatch.delenv("KERAS_HOME")
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  runpy.run_path("vqt_jax/data/tensorflow_lazy.py")
  assert os.path.isabs(os.environ["KERAS_HOME"])


def test_a_variable_that_jax_does_not_take():
  done = subprocess.run(
    [sys.executable, "main.py", CONFIG, "--plan=here"],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_ENABLE_X64": "maybe"},
    check=False,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: JAX rejects a variable of the")
  assert "JAX_ENABLE_X64" in done.stderr and done.stderr.count("\n") == 1


def test_the_command_itself():
  done = subprocess.run(
    [sys.executable, "main.py", CONFIG, "--config.num_querys=3"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "error: Unknown config field 'num_querys'. Did you mean num_queries or"
    " num_heads?\n"
  )


@pytest.mark.parametrize(
  "changes, noted",
  [
    (
      {"method": "linear"},
      ["num_queries is not used by linear", "epochs is not used by linear"],
    ),
    (
      {"method": "linear", "solver": "gradient"},
      ["num_queries is not used by linear"],
    ),
    ({"method": "vqt+lora"}, []),
    ({"method": "", "methods": "linear,vqt"}, []),
    (
      {"method": "", "methods": "linear,lora"},
      ["num_queries is not used by linear, lora"],
    ),
  ],
)
def test_flags_that_no_method_uses_are_noted(changes, noted):
  config = config_dict.default_config()
  config.update(changes)
  screen = io.StringIO()
  given = ("num_queries", "epochs")
  cli.note_unused(console.Console(screen), config, given)
  lines = screen.getvalue().splitlines()
  assert lines == [f"note     {text}" for text in noted]


def test_help_may_be_read_in_part():
  """As by `head`, which closes its end of the pipe."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, "-m", "vqt_jax", "--help"]
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
  os.close(write)
  assert (done.returncode, done.stderr) == (0, b"")
