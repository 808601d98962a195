"""Bad input: one or two sentences, status 2, and nothing is touched or lost."""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

import main
from tests import runs

ROOT = pathlib.Path(main.__file__).resolve().parent
BEGUN = dict(
  method="linear", lr=0.1, epochs=2, seeds=7, checkpoint_seconds=0
)  # The run whose workdir is spoilt.
SAVE = "run/checkpoints/*/"
DATA = "material/squares/1.0.0/"
VTAB = "--config=configs/vtab_cifar.py"


@dataclasses.dataclass(frozen=True)
class Case:
  """A command in a folder with `material/` and `run/`, and what it must say.

  Attributes:
    words: in the message.
    changes: of the config; None: no such command, `flags` are all of it.
    flags: further ones.
    spoil: what is done to a file first.
    path: that file, a pattern in the folder; the last one that fits.
    begun: whether `run` was begun: trained, but killed before its results.
  """

  words: str
  changes: dict | None = None
  flags: tuple[str, ...] = ()
  spoil: Callable[[pathlib.Path], None] | None = None
  path: str = ""
  begun: bool = False

  def __str__(self):
    how = f"{self.spoil.__name__} {self.path}" if self.spoil else ""
    return f"{how}{self.flags or ''}{self.changes or ''}"[:60]


def command(words, *flags):
  return Case(words, None, flags)


def setting(words, *flags, **changes):
  return Case(words, changes, flags)


def file(words, spoil, path, **changes):
  return Case(words, changes, (), spoil, path)


def begun(words, spoil, path, **changes):
  return Case(words, {**BEGUN, **changes}, (), spoil, path, begun=True)


def truncated(path):
  path.write_bytes(path.read_bytes()[:-500])


def halved(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_end(path):
  path.write_bytes(path.read_bytes()[:1500])


def flipped(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 255
  path.write_bytes(content)


def empty(path):
  path.write_bytes(b"")


def gone(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path):
  gone(path)
  path.mkdir()


def a_file(path):
  gone(path)
  path.write_text("?")


def pickled(path):
  np.savez(path, weights=np.array([{"a": 1}], dtype=object))


def a_pickle(path):
  path.write_bytes(b"\x80\x04]\x94.")


def an_array(path):
  with path.open("wb") as out:
    np.save(out, np.ones(3))


def not_a_vit(path):
  np.savez(path, **{"conv1/kernel": np.ones((3, 3, 3, 8), np.float32)})


def of_integers(path):
  with np.load(path) as old:
    np.savez(path, **{name: old[name].astype(int) for name in old.files})


def without_a_leaf(path):
  with np.load(path) as old:
    np.savez(path, **{name: old[name] for name in old.files[1:]})


def with_a_nan(path):
  with np.load(path) as old:
    leaves = {name: old[name] for name in old.files}
  leaves["embedding/bias"][0] = np.nan
  np.savez(path, **leaves)


def of_a_wide_grid(path):
  with np.load(path) as old:
    leaves = {name: old[name] for name in old.files}
  positions = np.ones((1, 10, 16), np.float32)
  np.savez(path, **leaves | {"pos_embedding": positions})


def html(path):
  path.write_text("<html>404</html>")


def other_json(path):
  path.write_text('{"a": 1}')


def a_list(path):
  path.write_text("[1]")


def other_weights(path):
  with safetensors.safe_open(path, "numpy") as old:
    metadata = old.metadata()
  arrays = {"head/kernel": np.ones((1, 2), np.float32)}
  safetensors.numpy.save_file(arrays, path, metadata)


def no_outcome(path):
  safetensors.numpy.save_file({"a": np.ones(2)}, path)


def program(text):
  def written(path):
    path.write_text(text)

  return written


NO_OTHERS = ("--coordinator=host:1", "--num_processes=2")
MISTAKES = (
  command("--config is missing. Usage"),
  command("--workdir is missing. Usage", VTAB),
  command(
    "Did you mean num_queries or num_heads?", VTAB, "--config.num_querys=3"
  ),
  command("Did you mean splits.train", VTAB, "--config.splits.trian=a"),
  command("is a group of fields", VTAB, "--config.splits=a"),
  command("Did you mean num_queries", VTAB, "--config.num_queries.x=3"),
  command("Missing value for flag --config.epochs", VTAB, "--config.epochs"),
  command("Did you mean --workdir?", VTAB, "--wrokdir=a"),
  command("'--lr'. Did you mean --config.lr?", VTAB, "--lr", "0.1"),
  command("Did you mean --config.lr?", VTAB, "-lr=0.1", "--plan=here"),
  command("Did you mean --config.epochs?", VTAB, "--epoch=5"),
  command("Did you mean --config.batch_size?", "--batch-size", VTAB),
  command("Did you mean --config.splits.train?", VTAB, "--train=a"),
  command("Unexpected argument 'more'. Usage", VTAB, "more"),
  command("Unknown config file ''. Known: configs/", "--config"),
  command(
    "Unknown config file 'configs/vtab_cifer.py'. Did you mean"
    " configs/vtab_cifar.py",
    "--config=configs/vtab_cifer.py",
  ),
  command("Known: configs/compare.py", "--config=digit"),
  command(
    "Unknown config argument 'queries'. Did you mean num_queries?",
    "--config=configs/digits.py:queries=3",
  ),
  command(
    "--num_processes=x: expected a whole number.",
    VTAB,
    "--num_processes=x",
  ),
  setting("--coordinator is missing", "--num_processes=2"),
  setting("Did you mean --coordinator", "--cordinator=host:1"),
  setting("expected HOST:PORT", "--coordinator=host", "--process_id=0"),
  setting("num_processes=None, process_id=None", "--coordinator=host:1"),
  setting("process_id=2: expected both", *NO_OTHERS, "--process_id=2"),
  setting("process_id=-1: expected both", *NO_OTHERS, "--process_id=-1"),
  setting(
    "num_processes=0, process_id=0",
    "--coordinator=host:1",
    "--num_processes=0",
    "--process_id=0",
  ),
  file("SyntaxError: invalid syntax", program("def x(:"), "config.py"),
  file("NameError: name 'no'", program("no"), "config.py"),
  file("No module named 'nope'", program("import nope"), "config.py"),
  file(
    "expected get_config() to return a ConfigDict",
    program("def get_config():\n  return {}"),
    "config.py",
  ),
  # Values.
  setting("--config.epochs=ten: expected a whole number.", epochs="ten"),
  setting("expected at least 0, found -1", epochs=-1),
  setting("warmup_epochs=3 must be smaller", warmup_epochs=3),
  setting("expected at least 1, found 0", batch_size=0),
  setting("expected at least 1, found -1", eval_batch_size=-1),
  setting("dropout=x: expected a number.", query_dropout="x"),
  setting("expected 0 to 0.99, found 1.0", query_dropout=1),
  setting("expected 0 to 0.99, found nan", embedding_dropout="nan"),
  setting("normalize=maybe: expected true or false.", normalize="maybe"),
  setting("expected numbers separated by commas", lr="fast"),
  setting("expected at least 0, found -1", lr=-1),
  setting("0 stands for the published rates", lr="0,1"),
  setting("expected at least 0, found -0.1", weight_decay=-0.1),
  setting("expected whole numbers separated by commas", seeds=1.5),
  setting("holds the same value twice", seeds="1,1"),
  setting("expected 0 to 4294967295", seed=2**32),
  setting("expected 0 to 1, found 2", keep_fraction=2),
  setting("expected at least 0, found nan", checkpoint_seconds="nan"),
  setting("Unknown config.method 'vpt'", method="vpt"),
  setting("Unknown editor of config.method ''", method="vqt+"),
  setting("Unknown reader of config.method 'lora'", method="lora+lora"),
  setting("so it cannot be stored", method="lora", features="disk"),
  setting("so it cannot be stored", embedding_dropout=0.1, features="host"),
  setting("expected last_blocks of at most 3", method="partial", last_blocks=9),
  setting("expected at least 1, found 0", method="lora", rank=0),
  setting("Did you mean adam", optimizer="adma"),
  setting("Unknown config.schedule 'day'", schedule="day"),
  setting("Did you mean full", protocol="ful"),
  setting(
    "at most one fold per training example, found 48",
    protocol="best",
    best__folds=100,
  ),
  setting("Did you mean authors", preset="author"),
  setting("Unknown config.dtype 'float64'", dtype="float64"),
  setting("Unknown config.features 'gpu'", features="gpu"),
  setting(
    "expected a folder, since its files are mapped",
    store_dir="gs://bucket/store",
  ),
  setting("Cannot write /proc/x/", store_dir="/proc/x"),
  # What does not fit the devices.
  setting("expected at least 1, found 0", mesh__model=0),
  setting("model=3 does not fit 4 device(s)", mesh__model=3),
  setting("model=16 does not fit 4 device(s)", mesh__model=16),
  setting(
    "cannot share the 2 attention heads of this backbone: expected one of 1, 2",
    mesh__model=4,
  ),
  setting(
    "batch_size=14 cannot be shared by 4 devices", data="stream", batch_size=14
  ),
  setting(
    "is read anew every epoch", data="stream", protocol="best", batch_size=16
  ),
  setting("has more than 131,072 4x4 patches", image_size=4_000_000),
  # Data.
  setting("config.task is empty", task=""),
  setting("Nearest names: 'squares'", task="sqares"),
  setting("has no version '9.9.9'. In ", task="squares:9.9.9"),
  setting("is not a dataset request", task="squares//"),
  setting("is a dataset of another hub", task="huggingface:mnist"),
  setting("takes VTAB's tasks as they are", task="all"),
  setting("is a VTAB-1k task", task="dtd"),
  setting("Unknown task or dataset 'squares'", data_dir="nowhere"),
  setting("image_key 'label' of dataset", image_key="label"),
  setting(
    "label_key 'lable' of dataset 'squares' does not exist", label_key="lable"
  ),
  setting("Label 2 in 'squares' is outside its 2 classes", num_classes=2),
  setting("Unknown split 'tset'", splits__test="tset"),
  setting("Error parsing split", splits__train="train[:"),
  setting("is empty", splits__val="train[48:]"),
  setting("are of one class, ", splits__train="train[:1]", batch_size=8),
  file("DataLossError: truncated record", truncated, DATA + "*train*"),
  file("DataLossError: corrupted record", flipped, DATA + "*train*"),
  file("only 0 elements", empty, DATA + "*train*"),
  file("NotFoundError", gone, DATA + "*train*"),
  file("'squares' in", halved, DATA + "dataset_info.json"),
  file("Write the dataset again", gone, DATA + "dataset_info.json"),
  file("Write the dataset again", other_json, DATA + "dataset_info.json"),
  file("Write the dataset again", empty, DATA + "features.json"),
  file("No dataset 'squares", gone, DATA + "features.json"),
  file("Unknown task or dataset 'squares'", a_file, DATA[:-7]),
  # Backbones.
  file("vit.npz is truncated", truncated, "material/vit.npz"),
  file("vit.npz is truncated", without_end, "material/vit.npz"),
  file("vit.npz: ", flipped, "material/vit.npz"),
  file("vit.npz is empty", empty, "material/vit.npz"),
  file("vit.npz holds pickled Python objects", pickled, "material/vit.npz"),
  file("vit.npz is a Python pickle", a_pickle, "material/vit.npz"),
  file("vit.npz is a single NumPy array", an_array, "material/vit.npz"),
  file("vit.npz is not a ViT checkpoint", not_a_vit, "material/vit.npz"),
  file("no floating-point numbers", of_integers, "material/vit.npz"),
  file("missing: ", without_a_leaf, "material/vit.npz"),
  file(
    "vit.npz holds NaN or infinity in embedding/bias (1 of 16",
    with_a_nan,
    "material/vit.npz",
  ),
  file("--config.trained_size=HEIGHT", of_a_wide_grid, "material/vit.npz"),
  setting("trained_size have 2x3 patches", trained_size=8, trained_width=12),
  setting("trained_width=8 is a width alone", trained_width=8),
  file("vit.npz is a web page", html, "material/vit.npz"),
  file("vit.npz is neither a file or", gone, "material/vit.npz"),
  file("vit.npz holds no Big Vision arrays", a_folder, "material/vit.npz"),
  setting("Did you mean howto-i21k-B/16", init="howto-i21k-B/17"),
  setting("expected a path, a public name, or", init="ftp://host/vit.npz"),
  setting("is not the variant B/16", variant="B/16"),
  setting("Unknown ViT variant 'Z/3'", variant="Z/3"),
  setting("not a multiple of the backbone's 4x4 patch", image_size=10),
  # Workdirs.
  setting("expected a folder, or gs://BUCKET/", "--workdir=s3://bucket/run"),
  setting("expected a folder, or gs://BUCKET/", "--workdir=gs:/bucket/run"),
  setting("expected a name in UTF-8", "--workdir=runs/\udcfc"),
  setting("Cannot write material/vit.npz", "--workdir=material/vit.npz"),
  setting("Not a directory", "--workdir=material/vit.npz/below"),
  setting("Cannot write /proc/run/config.json", "--workdir=/proc/run"),
  begun("epochs was 2, is now 3", program("?"), "run/log.txt", epochs=3),
  begun("log.txt: Is a directory", a_folder, "run/log.txt"),
  begun("be resumed there: choose another", gone, "run/config.json"),
  begun("be resumed there: choose another", halved, "run/config.json"),
  begun("config.json was not written by vqt_jax", a_list, "run/config.json"),
  begun("Is a directory", a_folder, "run/metrics.jsonl"),
  begun("Cannot write run/tensorboard: ", a_file, "run/tensorboard"),
  begun("run/checkpoints: File exists", a_file, "run/checkpoints"),
  begun("the same command repeats this stage", halved, "run/stages/seeds*"),
  begun("the same command repeats this stage", empty, "run/stages/seeds*"),
  begun("the same command repeats this stage", no_outcome, "run/stages/seeds*"),
  begun("expected weights", other_weights, "run/stages/seeds*"),
  *(
    begun("resume from the save before it", spoil, SAVE + path)
    for path in (
      "progress/metadata",
      "state/_METADATA",
      "state/manifest.ocdbt",
      "state/d/*",
    )
    for spoil in (empty, flipped, gone)
    if (path, spoil) != ("state/_METADATA", gone)  # Does no harm.
  ),
  begun(
    "resume from the save before it", other_json, SAVE + "progress/metadata"
  ),
  begun("resume from the save before it", gone, SAVE + "state"),
  begun("Delete it, and the same command", html, "run/results.json"),
  begun("does not hold results of a run", other_json, "run/results.json"),
)


@pytest.fixture(scope="module")
def killed(material, tmp_path_factory):
  """A workdir that has everything but results."""
  workdir = tmp_path_factory.mktemp("killed") / "run"
  argv = runs.command(material, workdir, **BEGUN)
  with mock.patch(
    "vqt_jax.training.results.write", side_effect=KeyboardInterrupt
  ):
    assert main.main(argv) == 130
  return workdir


def prepare(case, material, killed, folder):
  """What the command finds."""
  shutil.copytree(material, folder / "material")
  os.symlink(ROOT / "configs", folder / "configs")
  shutil.copy(material / "config.py", folder / "config.py")
  texts = [folder / "config.py"]
  if case.begun:
    shutil.copytree(killed, folder / "run")
    texts.append(folder / "run" / "config.json")
  for text in texts:
    old, new = str(material), str(folder / "material")
    text.write_text(text.read_text().replace(old, new))
  if case.spoil:
    if "checkpoints/" in case.path:
      shutil.rmtree(folder / "run" / "stages")
    # Of saves the last one counts.
    found = sorted(folder.glob(case.path)) or [folder / case.path]
    case.spoil(found[-1])


def contents(folder):
  """What must stay as it is; logs may grow, and events are made again.

  Python itself keeps a compiled config file beside it, in `__pycache__`.
  """
  return {
    path: content
    for path, content in runs.files(folder).items()
    if not re.search("log.txt|tensorboard|__pycache__", path)
  }


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_bad_input(case, material, killed, tmp_path, monkeypatch, capfd):
  prepare(case, material, killed, tmp_path)
  monkeypatch.chdir(tmp_path)
  argv = ["main.py", *case.flags]
  if case.changes is not None:
    argv = runs.command(tmp_path, "run", **case.changes) + [*case.flags]
  before = contents(tmp_path)
  assert main.main(argv) == 2
  out, said = capfd.readouterr()
  assert out == "" and "Traceback" not in said
  error = said[said.index("error: ") :]
  assert case.words in error
  assert len(re.findall(r"[.?](?: |$)", error)) <= 4, error
  assert len(error) < 900, error
  after = contents(tmp_path)
  assert {path: after.get(path) for path in before} == before
  new = {pathlib.Path(path).name for path in set(after) - set(before)}
  assert new <= {"backbone.json", "config.json", "metrics.jsonl"}


def test_too_little_memory(material, tmp_path, monkeypatch, capfd):
  def full(*args):
    raise MemoryError("Unable to allocate 9 TiB")

  monkeypatch.setattr("vqt_jax.training.setup.prepare", full)
  assert main.main(runs.command(material, tmp_path)) == 2
  told = "error: There is not enough memory: Unable to allocate 9 TiB. Lower"
  assert told in capfd.readouterr().err


def test_there_are_enough_of_them():
  assert len(MISTAKES) >= 60


def test_a_mended_setting_may_begin_anew(material, tmp_path):
  """Nothing was trained, so the workdir is free for the right command."""
  argv = runs.command(material, tmp_path, num_classes=2)
  assert main.main(argv) == 2
  before = json.loads((tmp_path / "config.json").read_text())
  assert before["num_classes"] == 2
  argv = runs.command(material, tmp_path, splits__test="tset")
  assert main.main(argv) == 2
  after = json.loads((tmp_path / "config.json").read_text())
  assert after["num_classes"] == 0
