"""`vqt-jax` and `python -m vqt_jax`: its commands, their help and mistakes."""

import importlib
import subprocess
import sys

import pytest

import vqt_jax
from vqt_jax import __main__


def run(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["vqt-jax", *args])
  return __main__.main()


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_names_the_commands(monkeypatch, capsys, args):
  assert run(monkeypatch, *args) == 0
  told = capsys.readouterr().out
  assert all(f"\n{name} " in told for name in __main__.COMMANDS)


def test_version(monkeypatch, capsys):
  assert run(monkeypatch, "--version") == 0
  assert capsys.readouterr().out == f"{vqt_jax.__version__}\n"


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_each_command_has_help_and_refuses_other_flags(
  monkeypatch, capsys, name
):
  module = importlib.import_module(__main__.COMMANDS[name])
  for flag in ("--help", "-h"):
    assert run(monkeypatch, name, flag) == 0
    assert capsys.readouterr().out.startswith(module.__doc__)
  assert run(monkeypatch, name, "--hlep") == 2
  out, said = capsys.readouterr()
  assert out == "" and said.startswith("error: Unknown ") and "help" in said


SLOW = {"jax", "flax", "optax", "orbax", "tensorflow", "matplotlib", "scipy"}
AT_ONCE = f"""
import sys
from vqt_jax import __main__
wrong = ["--config=vtab", "--config.lr=high"], ["--config=vtab:method=none"]
lines = [[name, flag] for name in __main__.COMMANDS for flag in ("-h", "-x")]
for line in [*lines, *(["train", "--workdir=x", *each] for each in wrong)]:
  sys.argv = ["vqt-jax", *line]
  __main__.main()
loaded = {SLOW} & sys.modules.keys()
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def test_help_and_wrong_flags_need_no_jax():
  command = [sys.executable, "-c", AT_ONCE]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "Unknown config.method 'none'" in done.stderr


@pytest.mark.parametrize(
  "args, words",
  [
    (["trian"], "Unknown command 'trian'. Did you mean train?"),
    (["--config=digits"], "Known: prepare, train, compare, predict"),
    (["prepare"], "Name the datasets to prepare"),
    (["compare"], "No runs given. Usage: WORKDIR..."),
    (["train"], "--config is missing. Usage"),
  ],
)
def test_mistakes(monkeypatch, capsys, args, words):
  assert run(monkeypatch, *args) == 2
  assert words in capsys.readouterr().err
