"""What pip installs: built, unpacked, and used away from the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import vqt_jax

ROOT = pathlib.Path(__file__).parent.parent
BUILD = (
  "import sys; from setuptools import build_meta;"
  " build_meta.build_wheel(sys.argv[1])"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with what the wheel holds."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  source.mkdir()
  for path in (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements.txt",
    "requirements-serve.txt",
    "requirements-test.txt",
  ):
    shutil.copy(ROOT / path, source)
  for path in ("vqt_jax", "configs"):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / path, source / path, symlinks=True, ignore=ignore)
  subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, check=True)
  with zipfile.ZipFile(*folder.glob("*.whl")) as wheel:
    wheel.extractall(folder / "lib")
  return folder / "lib"


def test_it_has_what_the_package_has(installed):
  for path in (ROOT / "vqt_jax").rglob("*"):
    if path.is_file() and "__pycache__" not in path.parts:
      assert (installed / path.relative_to(ROOT)).is_file()
  for path in (ROOT / "configs").glob("*.py"):
    assert (installed / "vqt_jax" / "configs" / path.name).is_file()
  assert (installed / "vqt_jax" / "py.typed").is_file()
  assert {path.name for path in installed.iterdir()} == {
    "vqt_jax",
    f"vqt_jax-{vqt_jax.__version__}.dist-info",
  }


def test_it_has_one_command(installed):
  (scripts,) = installed.glob("*.dist-info/entry_points.txt")
  assert scripts.read_text().split() == [
    "[console_scripts]",
    "vqt-jax",
    "=",
    "vqt_jax.__main__:main",
  ]


def test_its_command_finds_the_shipped_configs(installed, tmp_path):
  """One of which needs another."""
  config = "--config=configs/compare.py:task=digits,methods=linear"
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "vqt_jax",
      "train",
      config,
      "--config.epochs=-1",
      "--workdir=run",
    ],
    env={**os.environ, "PYTHONPATH": str(installed)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  said = "error: config.epochs: expected at least 0, found -1.\n"
  assert (done.returncode, done.stderr) == (2, said)
