"""Features on the host and in files: found again, refused, mended, resumed."""

import dataclasses
import fcntl
import functools
import io
import itertools
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax import checkpoints
from vqt_jax import cli
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.features import batches as batches_lib
from vqt_jax.features import disk
from vqt_jax.features import examples as examples_lib
from vqt_jax.features import storage
from vqt_jax.features import store
from vqt_jax.models import readers
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import setup

COUNT, BATCH = 21, 8
RECORDS = "vqt_jax.features.store:host_rows"
MADE_FROM = {"weights": "abc"}
ONE = {"epochs": 2, "lr": 0.1, "seeds": 7}  # A run of one trial.


class Case:
  """The features of a few images, on four devices."""

  def __init__(self, dtype="float32", tokens=True, data=4, model=1):
    backbone = helpers.tiny_backbone()
    mesh = mesh_lib.make_mesh(data, model)
    self.layout = store.Layout(backbone.config, tokens, dtype, mesh)
    self.params = sharding_lib.place_backbone(backbone.params, mesh, "float32")
    images = helpers.tiny_examples(backbone, COUNT, 5)["image"]
    self.images = np.pad(images, [(0, 3)] + 3 * [(0, 0)])
    self.started = []

  def stream(self, start=0, stop=24):
    self.started.append(start)
    batches = (
      {"image": self.images[i : i + BATCH]} for i in range(start, stop, BATCH)
    )
    yield from store.extract(self.layout, self.params, batches)
    if stop < 24:
      raise KeyboardInterrupt

  def file(self, folder, **changes):
    return disk.FeatureFile(
      folder, "x", MADE_FROM | changes, self.layout, COUNT
    )


def assert_same(a, b):
  np.testing.assert_array_equal(a.final, b.final)
  if a.layout.tokens:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.tokens.dtype == b.tokens.dtype == a.layout.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("data, model", [(4, 1), (2, 2), (1, 4)])
def test_file_host_and_devices_hold_the_same(tmp_path, dtype, data, model):
  case = Case(dtype, data=data, model=model)
  file = case.file(tmp_path)
  assert file.open() is None
  file.write(case.stream, BATCH)
  kept = file.open()
  assert_same(kept, store.store_on_host(case.layout, case.stream(), COUNT))
  label = np.arange(COUNT, dtype=np.int32)
  held = store.store_on_devices(case.layout, case.stream(), label)
  rows = np.array([20, 3, 3, 0, 7, 8, 19, 1])
  sent = kept.send(rows)
  for name, axis in (("tokens", 1), ("final", 0)):
    np.testing.assert_array_equal(sent[name], jnp.take(held[name], rows, axis))
  row = (10, 16) if data == 1 else (data, 128)
  assert sent["tokens"].shape == (3, 8, *row)
  assert sent["tokens"].addressable_shards[0].data.shape[2] == row[0] // data
  np.testing.assert_array_equal(held["label"][:COUNT], label)


def test_tokens_that_do_not_divide_evenly_are_padded():
  case = Case(data=1, model=4)
  kept = store.store_on_host(case.layout, case.stream(), COUNT)
  three = mesh_lib.make_mesh(devices=jax.devices()[:3])
  layout = dataclasses.replace(case.layout, mesh=three)
  sent = dataclasses.replace(kept, layout=layout).send(np.arange(9))["tokens"]
  assert sent.shape == (3, 9, 3, 128)
  assert layout.bytes_per_image == 4 * (3 * 160 + 16)
  assert layout.bytes_in(2)["device"] == 2 * 4 * (3 * 3 * 128 + 16)
  with jax.set_mesh(three):
    flat = readers.flatten(sent, 160, np.arange(9))
  wanted = np.moveaxis(kept.tokens[:9], 0, 1).reshape(3, 9, 160)
  np.testing.assert_array_equal(flat, wanted)


def test_an_interrupted_extraction_goes_on(tmp_path):
  case = Case()
  whole, file = case.file(tmp_path / "whole"), case.file(tmp_path)
  whole.write(case.stream, BATCH)
  with pytest.raises(KeyboardInterrupt):
    file.write(lambda start: case.stream(start, 16), BATCH)
  assert file.open() is None
  case.started = []
  file.write(case.stream, BATCH)
  assert case.started == [16]
  assert file.path.read_bytes() == whole.path.read_bytes()
  assert list(tmp_path.glob("*.npy*")) == [file.path]


@pytest.mark.parametrize("what", ["other", "short"])
def test_a_part_that_cannot_be_gone_on_with(tmp_path, what):
  case = Case(tokens=False)
  whole, file = case.file(tmp_path / "whole"), case.file(tmp_path)
  whole.write(case.stream, BATCH)
  content = b"x" * 5000 if what == "other" else b"\x93NUMPY"
  part = file.path.with_name(file.path.name + ".part")
  part.write_bytes(content)
  file.write(case.stream, BATCH)
  assert file.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("what", ["cut", "foreign", "empty", "other shape"])
def test_a_damaged_file_is_told(tmp_path, what):
  case = Case(tokens=False)
  file = case.file(tmp_path)
  file.write(case.stream, BATCH)
  content = file.path.read_bytes()
  if what == "cut":
    file.path.write_bytes(content[:-1])
  elif what == "empty":
    file.path.write_bytes(b"")
  else:
    other = case.file(tmp_path, weights="abd")
    if what == "other shape":
      other = disk.FeatureFile(tmp_path, "x", MADE_FROM, case.layout, COUNT - 1)
    other.write(case.stream, BATCH)
    shutil.copy(other.path, file.path)
  with pytest.raises(disk.DamagedFile):
    file.open()


def test_what_does_not_fit_on_the_disk(tmp_path, monkeypatch):
  case = Case(tokens=False)
  file = case.file(tmp_path)

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.UserError, match="Cannot write .*Free some space"):
    file.write(case.stream, BATCH)
  assert not list(tmp_path.iterdir())


def test_other_parts_of_the_tokens_are_another_file(tmp_path, monkeypatch):
  """A process with half of the devices keeps half of the numbers, or all."""
  case = Case()
  paths = set()
  for row in ((2, 40), (2, 5, 16)):
    monkeypatch.setattr(store.Layout, "host_row", row)
    paths.add(case.file(tmp_path).path)
  assert len(paths) == 2


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
  case = Case(tokens=False)
  file = case.file(tmp_path)
  file.write(case.stream, BATCH)

  def refused(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(np, "load", refused)
  with pytest.raises(errors.UserError, match="Cannot read .*store_dir"):
    file.open()
  assert file.path.exists()


@pytest.mark.parametrize("end", ["done", "given up", "given up, and a third"])
def test_two_runs_that_extract_the_same(tmp_path, monkeypatch, end):
  """One waits until the other is done, or takes over; nothing stays behind."""
  case = Case(tokens=False)
  file, waits = case.file(tmp_path), []
  part = file.path.with_name(file.path.name + ".part")
  case.file(tmp_path / "other").write(case.stream, BATCH)
  with open(part, "ab") as other:
    fcntl.flock(other, fcntl.LOCK_EX)

    def sleep(seconds):
      waits.append(seconds)
      if end == "done":
        part.rename(file.path)
        shutil.copy(tmp_path / "other" / file.path.name, file.path)
      else:
        part.unlink()
      if "third" in end:
        part.write_bytes(b"half")
      fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr(disk.time, "sleep", sleep)
    case.started = []
    file.write(case.stream, BATCH)
  assert len(waits) == 1
  assert case.started == ([] if end == "done" else [0])
  assert file.open() and not part.exists()
  file.write(case.stream, BATCH)
  assert len(case.started) < 2


def test_images_that_cannot_be_read_cost_nothing(tmp_path):
  """What was extracted before stays; only what cannot be written goes."""
  case = Case(tokens=False)
  file = case.file(tmp_path)

  def broken(start):
    yield from itertools.islice(case.stream(start), 2)
    raise errors.UserError("The bucket is gone.")

  with pytest.raises(errors.UserError, match="bucket"):
    file.write(broken, BATCH)
  file.write(case.stream, BATCH)
  assert case.started == [0, 16] and file.open()


def test_a_file_that_is_there_needs_no_more_room(material, tmp_path):
  """Else the next run, or this one resumed, would find the disk too full."""
  config = cli.parse(
    runs.command(
      material, tmp_path, store_dir=tmp_path / "store", batch_size=16
    )
  ).config
  backbone = checkpoints.load_backbone(config.init, image_size=(8, 8))
  task = data.make_task(
    "squares", data_dir=config.data_dir, splits=config.splits
  )
  mesh = mesh_lib.make_mesh(4, 1)
  params = sharding_lib.place_backbone(backbone.params, mesh, "float32")

  def examples(method, room):
    made = examples_lib.Examples(
      config,
      console_lib.Console(io.StringIO()),
      task,
      backbone,
      vqt_jax.make_tuner(method, backbone.config, 3),
      params,
      mesh,
    )
    made._available = {"device": 0, "host": 0, "disk": room}
    return made

  first = examples("vqt", 10**6)
  assert isinstance(first.training_batches("train"), batches_lib.HostBatches)
  (path,) = (tmp_path / "store").iterdir()
  assert isinstance(
    examples("vqt", 0).training_batches("train"), batches_lib.HostBatches
  )
  linear = examples("linear", 0).training_batches("train")
  assert linear.features.tokens is None  # Not read either.
  path.unlink()
  assert isinstance(
    examples("vqt", 0).training_batches("train"), batches_lib.StreamedBatches
  )


def test_keys_and_values_where_a_cpu_has_room(material, tmp_path):
  """Of features from a file, too; with room for tokens alone, those."""
  argv = runs.command(
    material,
    tmp_path,
    store_dir=tmp_path / "store",
    batch_size=16,
    features="device",
  )
  config = cli.parse(argv).config
  backbone = checkpoints.load_backbone(config.init, image_size=(8, 8))
  task = data.make_task(
    "squares", data_dir=config.data_dir, splits=config.splits
  )

  def held(room, devices=1, method="vqt", **changes):
    mesh = mesh_lib.make_mesh(devices, 1, jax.devices()[:devices])
    said = io.StringIO()
    mine = config.copy_and_resolve_references()
    mine.update(changes)
    made = examples_lib.Examples(
      mine,
      console_lib.Console(said),
      task,
      backbone,
      vqt_jax.make_tuner(method, backbone.config, 3),
      sharding_lib.place_backbone(backbone.params, mesh, "float32"),
      mesh,
    )
    made._available = {"device": room, "host": 0, "disk": 10**9}
    tokens = made.training_batches("train").data.get("tokens")
    projected = tokens is not None and tokens.ndim == 6
    assert projected == ("as keys and values" in said.getvalue())
    return projected, said.getvalue()

  size = 48 * 4 * (2 * 3 * 5 * 16 + 16)
  assert held(size)[0]
  found, said = held(size)
  assert "48 images x 1.9 KiB = 93.0 KiB in float32 as keys" in said
  assert found and "found in" in said
  assert held(size, store_dir="")[0]
  for changes in (
    {"room": size - 1},
    {"devices": 4},
    {"feature_dtype": "bfloat16"},
    {"method": "head2toe"},
    {"method": "linear"},
  ):
    found, said = held(**{"room": size} | changes)
    assert not found, changes
    # What a reader without weights reads, on one device.
    assert ("as features of the" in said) == ("head2toe" in changes.values())


@pytest.fixture(scope="module")
def run(material, tmp_path_factory):
  """Runs the command; returns the workdir and what it said."""

  def run(capfd, folder, **changes):
    workdir = tmp_path_factory.mktemp("run")
    changes["store_dir"] = folder
    assert main.main(runs.command(material, workdir, **changes)) == 0
    return workdir, capfd.readouterr().err

  return run


def test_runs_share_features_and_mend_them(run, tmp_path, capfd):
  run = functools.partial(run, **ONE)
  first, said = run(capfd, tmp_path, features="disk")
  (path,) = tmp_path.iterdir()
  assert "48 images x 1.0 KiB = 48.0 KiB in float32, kept in a file" in said
  for changes in ({}, {"method": "linear"}, {"features": "host"}):
    workdir, said = run(capfd, tmp_path, **changes)
    assert f"found in {path}" in said, changes
    if "method" not in changes:
      ours, theirs = runs.results(workdir), runs.results(first)
      assert ours["test_accuracy"] == theirs["test_accuracy"]
  path.write_bytes(path.read_bytes()[:-500])
  workdir, said = run(capfd, tmp_path, features="disk")
  assert f"{path} is damaged" in said and "it is made again" in said
  assert runs.bits(workdir) == runs.bits(first)
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["", "device", "stream"])
def test_classes_are_compared(material, tmp_path, monkeypatch, where):
  argv = runs.command(material, tmp_path, data=where, batch_size=16)
  config, said = cli.parse(argv).config, io.StringIO()
  job = setup.prepare(
    resolve.resolve(config), tmp_path, console_lib.Console(io.StringIO())
  )

  def check():
    examples_lib.Examples(
      config,
      console_lib.Console(said),
      job.task,
      job.backbone,
      job.tuner,
      job.params,
      job.mesh,
    ).check_classes()

  check()
  assert said.getvalue() == ""
  by_class = {"trainval": np.arange(48) // 20}
  monkeypatch.setattr(data, "load_labels", lambda task, base: by_class[base])
  check()
  assert "classes  8 of the 8 images of val are of" in said.getvalue()
  assert "train lacks (2)" in said.getvalue()
  # Of much that is read anew every epoch the labels are not read.
  monkeypatch.setattr(examples_lib, "LABEL_BYTES", 0)
  if where == "stream":
    monkeypatch.delattr(data, "load_labels")
  check()


def test_other_inputs_have_other_features(material, tmp_path):
  record = next((material / "squares" / "1.0.0").glob("*train*"))
  before = record.stat().st_mtime
  quiet = console_lib.Console(io.StringIO())

  def path(**changes):
    argv = runs.command(material, tmp_path, store_dir=tmp_path, **changes)
    config = resolve.resolve(cli.parse(argv).config)
    job = setup.prepare(config, tmp_path / "run", quiet)
    examples = examples_lib.Examples(
      config, quiet, job.task, job.backbone, job.tuner, job.params, job.mesh
    )
    return examples._files("train")[0].path

  paths = [
    path(**changes)
    for changes in (
      {},
      {"value_range": "0..1"},
      {"resize": "legacy"},
      {"image_width": 12},
      {"gelu": "exact"},
      {"feature_dtype": "bfloat16"},
      {"splits__train": "train[1:33]"},
      {"method": "linear"},
    )
  ]
  os.utime(record, (before + 10, before + 10))
  try:
    paths.append(path())
  finally:
    os.utime(record, (before, before))
  assert len(set(paths)) == 9
  assert path() == path(epochs=2) == paths[0]


def test_weights_decide_too():
  a, b = helpers.tiny_backbone(), helpers.tiny_backbone()
  bias = b.params["Transformer"]["encoder_norm"]["bias"]
  bias[0] = np.nextafter(bias[0], np.float32(1))
  assert a.digest == helpers.tiny_backbone().digest != b.digest


@pytest.mark.parametrize(
  "call, error",
  [
    ("exists", PermissionError(13, "Permission denied")),
    ("expanduser", RuntimeError("Could not determine home directory.")),
  ],
)
def test_a_folder_that_is_not_for_us_has_no_room(
  monkeypatch, tmp_path, call, error
):
  """It is the default one, say, and features are to stay in memory."""

  def refused(path):
    raise error

  mesh = mesh_lib.make_mesh()
  assert storage.available_bytes(f"{tmp_path}/not/there", mesh)["disk"] > 0
  monkeypatch.delenv("VQT_JAX_CACHE", raising=False)
  monkeypatch.setattr(disk.pathlib.Path, call, refused)
  room = storage.available_bytes("", mesh)
  assert room["disk"] == 0 and room["device"] > 0
  if call == "expanduser":
    with pytest.raises(errors.UserError, match="no home.* Set VQT_JAX_CACHE"):
      disk.folder("")


def test_killed_while_extracting(run, material, tmp_path, capfd, monkeypatch):
  """What was extracted before is not done again, and a full disk is told."""
  changes = {"features": "disk", "store_dir": tmp_path / "store"} | ONE
  argv = runs.command(material, tmp_path / "run", **changes)
  signals = {RECORDS: (3, signal.SIGKILL)}
  killed = runs.Process(argv, signals=signals, devices=4)
  assert killed.wait() == -signal.SIGKILL
  (part,) = (tmp_path / "store").iterdir()
  assert part.name.endswith(".part") and part.stat().st_size > 16 * 1000
  with monkeypatch.context() as patch:
    # Only one batch of three is left, so there is no second one to stop at.
    runs.signal_on_call(patch.setattr, RECORDS, 2, signal.SIGTERM)
    assert main.main(argv) == 0
  (path,) = (tmp_path / "store").iterdir()
  again = tmp_path / "again"
  argv = runs.command(
    material, tmp_path / "full", **changes | {"store_dir": again}
  )
  full = runs.Process(argv, largest_file=20000, devices=4)
  assert full.wait() == 2
  last = full.said().splitlines()[-1]
  assert last.startswith(f"error: Cannot write {again}")
  assert not list(again.iterdir())
  other, _ = run(capfd, again, features="disk", **ONE)
  (whole,) = again.iterdir()
  assert path.read_bytes() == whole.read_bytes()
  assert runs.bits(tmp_path / "run") == runs.bits(other)


ROOM = {"device": 100, "host": 1000, "disk": 10_000}


@pytest.mark.parametrize(
  "changes, stored, backend, place, why",
  [
    ({}, 100, "cpu", "device", "has room for 0.1 KiB"),
    ({}, 101, "cpu", "disk", "has room for 9.8 KiB"),
    ({}, 101, "tpu", "host", "has room for 1.0 KiB"),
    ({}, 1001, "tpu", "images", "since features would take 1.0 KiB"),
    ({}, 10_001, "cpu", "images", "since features would take 9.8 KiB"),
    ({"features": "host"}, 9**9, "cpu", "host", "as features=host says"),
    ({"features": "live"}, 1, "gpu", "images", "as features=live says"),
    ({"data": "stream"}, 1, "cpu", "stream", "as data=stream says"),
    ({"embedding_dropout": 0.1}, 1, "cpu", "images", "embedding_dropout"),
  ],
)
def test_the_place_is_chosen_by_size(changes, stored, backend, place, why):
  config = config_dict.default_config()
  config.update(changes)
  tuner = vqt_jax.make_tuner("vqt", helpers.tiny_config(), 3)
  sizes = dict.fromkeys(ROOM, stored)
  choose = functools.partial(storage.choose, config, tuner, sizes)
  chosen, said = choose(100, ROOM, backend)
  assert chosen == place and why in said
  if chosen == "images":
    chosen, _ = choose(101, ROOM, backend)
    assert chosen == "stream"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flipped_bits_of_features_are_told(tmp_path, dtype):
  case = Case(dtype)
  file = case.file(tmp_path)
  file.write(case.stream, BATCH)
  content = file.path.read_bytes()
  assert file.open().in_memory().sums is None
  record = file._record
  start = len(file._header) + 5 * record.itemsize
  for field, error in (
    ("final", disk.DamagedFile),
    ("tokens", errors.UserError),
  ):
    flipped = bytearray(content)
    flipped[start + record.fields[field][1]] ^= 1
    file.path.write_bytes(flipped)
    with pytest.raises(error):
      file.open().in_memory()
    with pytest.raises(error):
      file.open().send(np.array([4, 5]))
  assert "image 5 " in str(
    pytest.raises(errors.UserError, file.open().in_memory).value
  )
  file.open().send(np.array([4, 6]))


def test_files_without_checksums_are_read(tmp_path):
  case = Case()
  file = case.file(tmp_path)
  file.write(case.stream, BATCH)
  expected, content = file.open(), file.path.read_bytes()
  records = len(file._header) + COUNT * file._record.itemsize
  file.path.write_bytes(content[:records] + file._footer)
  assert_same(file.open().in_memory(), expected)
  file.path.write_bytes(content[: records + 4] + file._footer)
  with pytest.raises(disk.DamagedFile):
    file.open()


def test_a_planted_link_is_not_written_through(tmp_path):
  case = Case(tokens=False)
  file = case.file(tmp_path / "store")
  file.path.parent.mkdir()
  (tmp_path / "theirs").write_text("kept")
  part = file.path.with_name(file.path.name + ".part")
  part.symlink_to(tmp_path / "theirs")
  with pytest.raises(errors.UserError, match="is a link"):
    file.write(case.stream, BATCH)
  assert (tmp_path / "theirs").read_text() == "kept"
