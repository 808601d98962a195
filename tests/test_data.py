"""Reading TFDS datasets: order, batches, preprocessing, and bad input."""

import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.data import images
from vqt_jax.data import lookup
from vqt_jax.data import pipeline
from vqt_jax.data import prepared

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "vqt"
SIZES = {"train": 23, "test": 11}
READ = {"image_size": (2, 3), "value_range": "0..1"}

with tfds.core.registered.skip_registration():

  class Numbered(tfds.core.GeneratorBasedBuilder):
    """Grey images of constant value: that of their key; label key % 7."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
      return tfds.core.DatasetInfo(
          builder=self,
          features=tfds.features.FeaturesDict({
              "picture": tfds.features.Image(shape=(4, 4, 1)),
              "kind": tfds.features.ClassLabel(num_classes=7),
              "key": np.int64,
          }),
      )

    def _split_generators(self, dl_manager):
      return {
          split: self._generate_examples(range(size))
          for split, size in SIZES.items()
      }

    def _generate_examples(self, keys):
      for key in keys:
        picture = np.full((4, 4, 1), key, np.uint8)
        yield key, {"picture": picture, "kind": key % 7, "key": key}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A TFDS folder with `numbered`, which no registered builder knows."""
  folder = str(tmp_path_factory.mktemp("tfds"))
  tfds.disable_progress_bar()
  Numbered(data_dir=folder).download_and_prepare(
      download_config=tfds.download.DownloadConfig(num_shards=3)
  )
  return folder


@pytest.fixture
def task(data_dir):
  splits = {"train": "train", "val": "train[:5]", "test": "test"}
  return lookup.make_task("numbered", data_dir=data_dir, splits=splits)


def keys_of(batch):
  """Which examples a batch holds, by their grey values; padding left out."""
  pixels = np.rint(batch["image"] * 255).astype(int)
  assert (pixels == pixels[:, :1, :1, :1]).all()
  real = batch.get("mask", np.ones(len(pixels))) > 0
  assert (batch["label"][real] == pixels[real, 0, 0, 0] % 7).all()
  return pixels[real, 0, 0, 0].tolist()


def stored_order(split):
  """TFDS's order: ascending md5 of split name and key."""
  return sorted(
      range(SIZES[split]),
      key=lambda key: hashlib.md5(f"{split}{key}".encode()).hexdigest(),
  )


def test_importing_the_package_does_not_import_tensorflow():
  check = (
      "import sys, vqt_jax.data; vqt_jax.data.make_task('kitti');"
      " assert 'tensorflow' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_tensorflow_sees_no_accelerator(task):
  data.num_examples(task, "train")
  assert {d.device_type for d in tf.config.get_visible_devices()} == {"CPU"}


def test_an_identity_is_that_of_every_copy(task, data_dir, tmp_path):
  found = data.identity(task)
  assert found["dataset"].startswith("numbered/") and found["num_classes"] == 7
  assert found["splits"]["val"] == {"slices": "train[:5]", "images": 5}
  assert list(found["splits"]) == list(data.SPLITS)
  copy = tmp_path / "copy"
  shutil.copytree(data_dir, copy, copy_function=shutil.copy)  # Of now.
  again = dataclasses.replace(task, data_dir=str(copy))
  assert data.identity(again) == found
  (info,) = copy.rglob("dataset_info.json")
  text = info.read_text()
  assert '"numBytes": "' in text
  info.write_text(text.replace('"numBytes": "', '"numBytes": "1', 1))
  assert data.identity(again) == found | {
      "sha256": data.identity(again)["sha256"]
  }
  assert data.identity(again)["sha256"] != found["sha256"]


# Tasks by name.


def test_any_dataset_in_the_data_folder_is_a_task(data_dir):
  task = lookup.make_task("numbered", data_dir=data_dir)
  assert (task.image_key, task.num_classes) == ("picture", 7)
  assert task.builder == "numbered:*.*.*"
  assert dict(task.splits) == {
      "train": "train[:800]",
      "val": "train[800:1000]",
      "trainval": "train[:800]+train[800:1000]",
      "test": "test",
  }


def test_features_and_splits_from_the_config(data_dir):
  task = lookup.make_task(
      "numbered:1.2.0",
      data_dir=data_dir,
      splits={"train": "train[:10]", "val": "test[:2]", "trainval": ""},
      image_key="picture",
      label_key="key",
      num_classes=30,
  )
  assert data.num_examples(task, "trainval") == 12
  assert task.num_classes == 30


def test_registered_datasets_are_known_without_files(tmp_path):
  task = lookup.make_task("cifar10", data_dir=str(tmp_path))
  assert (task.image_key, task.num_classes) == ("image", 10)
  pets = lookup.make_task("oxford_iiit_pet:*.*.*", data_dir=str(tmp_path))
  assert pets.num_classes == 37  # Two classes, one image: supervised keys.


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("cifar", {}, "Unknown task or dataset 'cifar'.*Nearest.*'cifar100'"),
        ("numberd", {}, "Nearest names: 'numbered'"),
        ("cifar10/big", {}, "'cifar10' has no config 'big'.*none"),
        ("eurosat/grey", {}, "no config 'grey'.*rgb, all"),
        ("cifar10:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("a b", {}, "expected name"),
        ("clevr", {}, "is the label.*clevr_count, clevr_distance"),
        ("dsprites", {}, "is the label.*label_scale.*label_key"),
        ("imdb_reviews", {}, "is the image"),
        ("numbered", {"image_key": "image"}, "'image'.*not exist.*: picture"),
        ("numbered", {"label_key": "picture"}, "the label: key, kind"),
        ("numbered", {"label_key": "key"}, "Set num_classes"),
        ("numbered", {"splits": {"valid": "x"}}, "'valid'.*train, val"),
    ],
)
def test_unusable_names_and_settings(data_dir, name, settings, message):
  with pytest.raises(errors.UserError, match=message):
    lookup.make_task(name, data_dir=data_dir, **settings)


# What is on disk.


def test_unprepared_dataset_names_the_command(tmp_path):
  task = lookup.make_task("cifar100", data_dir=str(tmp_path))
  command = (
      r"not prepared in .*: python -m vqt_jax\.data\.prepare cifar100"
      rf" --data_dir {tmp_path}$"
  )
  with pytest.raises(errors.UserError, match=command):
    data.check_prepared(task)
  with pytest.raises(errors.UserError, match=command):
    data.load_arrays(task, "train", image_size=8, value_range="0..1")


@pytest.mark.parametrize(
    "slices,message",
    [
        ("validation", r"Unknown split 'validation'.*train \(23\), test"),
        ("train[:800]", r"\[:800\].*23 examples"),
        ("train[:0]", "is empty"),
        ("train[5:3]", "is empty"),
        ("train[:x]", "Unrecognized split format"),
    ],
)
def test_splits_that_are_not_there(task, slices, message):
  task = dataclasses.replace(task, splits={**task.splits, "val": slices})
  with pytest.raises(errors.UserError, match=message):
    data.check_prepared(task)
  data.check_prepared(task, ["train", "test"])
  with pytest.raises(errors.UserError, match=message):
    data.batches(task, "val", batch_size=2, **READ)


def test_folder_without_metadata(tmp_path):
  (tmp_path / "mine").mkdir()
  with pytest.raises(errors.UserError, match="mine/.*dataset_info.json"):
    lookup.make_task("mine", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "train, val, trainval, same",
    [
        ("train[:9]", "train[9:]", "train", True),
        ("train[:9]", "train[9:12]", "train[:12]", True),
        ("train[9:]", "train[:9]", "train", False),  # Another order.
        ("train[:9]", "train[10:]", "train", False),
        ("train", "test", "train+test", True),
        ("train[:9]+test", "train[9:]", "train+test", False),
    ],
)
def test_splits_that_are_parts_of_another(
    data_dir, train, val, trainval, same
):
  splits = {"train": train, "val": val, "trainval": trainval}
  task = lookup.make_task("numbered", data_dir=str(data_dir), splits=splits)
  assert data.are_rows_of(task, ("train", "val"), "trainval") == same


def test_formats_that_tensorflow_does_not_read(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path / "data")
  info = next((tmp_path / "data").rglob("dataset_info.json"))
  text = info.read_text()
  assert '"tfrecord"' in text
  info.write_text(text.replace('"tfrecord"', '"array_record"'))
  name = info.parent.parent.name
  task = lookup.make_task(name, data_dir=str(tmp_path / "data"))
  with pytest.raises(errors.UserError, match="lies there as ArrayRecord"):
    prepared.check_prepared(task)


def test_damaged_files(tmp_path):
  tfds.disable_progress_bar()
  Numbered(data_dir=str(tmp_path)).download_and_prepare()
  task = lookup.make_task("numbered", data_dir=str(tmp_path))
  (file,) = tmp_path.glob("numbered/1.2.0/*test.tfrecord*")
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(errors.UserError, match="damaged.*prepare numbered"):
    data.load_arrays(task, "test", **READ)
  file.unlink()
  with pytest.raises(errors.UserError, match="damaged.*prepare numbered"):
    data.load_arrays(task, "test", **READ)


@pytest.mark.parametrize("read", [data.load_arrays, data.train_batches])
def test_labels_outside_the_classes(task, read):
  task = dataclasses.replace(task, num_classes=6)
  settings = dict(READ)
  if read is data.train_batches:
    settings |= {"batch_size": 4, "epoch": 0, "seed": 0}
  with pytest.raises(errors.UserError, match="Label 6 in 'numbered'.*0..5"):
    list(read(task, "train", **settings))


# Arrays and batches.


def test_arrays_come_in_stored_order(task):
  for split in ("train", "test"):
    arrays = data.load_arrays(task, split, **READ)
    assert arrays["image"].shape == (SIZES[split], 2, 3, 3)
    assert arrays["image"].dtype == np.float32
    assert arrays["label"].dtype == np.int32
    assert keys_of(arrays) == stored_order(split)
  val = data.load_arrays(task, "val", **READ)
  assert keys_of(val) == stored_order("train")[:5]
  both = data.load_arrays(task, "trainval", **READ)
  assert keys_of(both) == stored_order("train") + stored_order("train")[:5]


@pytest.mark.parametrize(
    "batch_size,processes", [(1, 1), (4, 1), (11, 1), (50, 1), (4, 2), (8, 8)]
)
def test_every_example_exactly_once(task, batch_size, processes):
  parts = [
      list(
          data.batches(
              task,
              "test",
              batch_size=batch_size,
              process_index=p,
              process_count=processes,
              **READ,
          )
      )
      for p in range(processes)
  ]
  steps = -(-SIZES["test"] // batch_size)
  assert [len(part) for part in parts] == [steps] * processes
  for batch in (batch for part in parts for batch in part):
    rows = batch_size // processes
    assert batch["image"].shape == (rows, 2, 3, 3)
    assert batch["label"].shape == batch["mask"].shape == (rows,)
    assert batch["mask"].dtype == np.float32
    assert not batch["image"][batch["mask"] == 0].any()
  steps = zip(*parts, strict=True)
  found = [key for step in steps for batch in step for key in keys_of(batch)]
  assert found == stored_order("test")


def test_more_processes_than_examples(task):
  """All processes take part; those without an example get padding."""
  task = dataclasses.replace(task, splits={"test": "test[:3]"})
  masks = []
  for p in range(8):
    (batch,) = data.batches(
        task, "test", batch_size=8, process_index=p, process_count=8, **READ
    )
    masks += batch["mask"].tolist()
  assert masks == [1.0] * 3 + [0.0] * 5
  with pytest.raises(errors.UserError, match="3 examples.*8 processes"):
    data.train_batches(
        task, "test", batch_size=8, epoch=0, seed=0, process_count=8, **READ
    )


def test_batch_size_must_be_shared_evenly(task):
  with pytest.raises(errors.UserError, match="6 must be.*4"):
    data.batches(task, "test", batch_size=6, process_count=4, **READ)


# Training batches.


def epoch_of(task, epoch=0, seed=0, **settings):
  settings |= READ | {"batch_size": 4, "epoch": epoch, "seed": seed}
  return list(data.train_batches(task, "train", **settings))


def order_of(batches):
  return [keys_of(batch) for batch in batches]


def test_training_order_depends_on_seed_and_epoch_only(task):
  first = order_of(epoch_of(task, epoch=3, seed=5))
  assert sorted(sum(first, [])) == list(range(23))
  assert [len(batch) for batch in first] == [4] * 5 + [3]
  assert order_of(epoch_of(task, epoch=3, seed=5)) == first
  assert order_of(epoch_of(task, epoch=4, seed=5)) != first
  assert order_of(epoch_of(task, epoch=3, seed=6)) != first
  assert order_of(epoch_of(task, epoch=5, seed=3)) != first


@pytest.mark.parametrize("shuffle_bytes", [2**30, 500])
def test_training_resumes_in_the_middle(task, monkeypatch, shuffle_bytes):
  monkeypatch.setattr(pipeline, "SHUFFLE_BYTES", shuffle_bytes)
  whole = epoch_of(task)
  assert sorted(sum(order_of(whole), [])) == list(range(23))
  for start in (1, 5, 6):
    rest = epoch_of(task, start_step=start)
    assert order_of(rest) == order_of(whole[start:])


def test_training_batches_are_the_same_on_two_processes(task):
  whole = epoch_of(task)
  parts = [epoch_of(task, process_index=p, process_count=2) for p in (0, 1)]
  for batch, *halves in zip(whole, *parts, strict=True):
    for key, value in batch.items():
      np.testing.assert_array_equal(
          np.concatenate([half[key] for half in halves]), value
      )


def test_shuffle_buffer_is_the_split_or_what_fits(task, monkeypatch):
  builder = prepared.open_builder(task)
  assert pipeline._shuffle_buffer(builder, 23) == 23
  average = sum(s.num_bytes for s in builder.info.splits.values()) // 34
  monkeypatch.setattr(pipeline, "SHUFFLE_BYTES", 5 * average)
  assert pipeline._shuffle_buffer(builder, 23) == 5


# Preprocessing.


@pytest.mark.parametrize("case", range(6))
def test_legacy_preprocessing_is_the_authors(case):
  with np.load(GOLDENS / "preprocess.npz", allow_pickle=False) as golden:
    raw, unit, normalised = (
        golden[f"case{case}/{key}"] for key in ("raw", "unit", "normalised")
    )
  for value_range, expected in (("0..1", unit), ("imagenet", normalised)):
    fn = images.make_preprocess(unit.shape[0], value_range, "legacy")
    np.testing.assert_allclose(fn(raw), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "resize,row", [("bilinear", [0, 0.25, 0.75, 1]), ("legacy", [0, 0.5, 1, 1])]
)
def test_resizes_differ_in_where_pixels_lie(resize, row):
  image = np.array([[[0], [255]]], np.uint8)
  found = images.make_preprocess((1, 4), "0..1", resize)(image)
  np.testing.assert_allclose(found[0, :, 0], row, atol=1e-6)


def test_shapes_channels_and_ranges():
  grey = np.full((5, 7, 1), 51, np.uint8)
  found = images.make_preprocess((6, 3), "-1..1")(grey)
  assert found.shape == (6, 3, 3) and found.dtype == tf.float32
  np.testing.assert_allclose(found, -0.6, atol=1e-6)
  alpha = np.stack([grey[..., 0]] * 3 + [grey[..., 0] * 0], -1)
  np.testing.assert_allclose(
      images.make_preprocess((6, 3), "-1..1")(alpha), found
  )
  binary = images.make_preprocess(2, "0..1", pixel_scale=255)
  np.testing.assert_allclose(binary(np.ones((4, 4, 1), np.uint8)), 1.0)


@pytest.mark.parametrize(
    "settings,message",
    [
        ((8, "0..255"), "value_range '0..255'.*-1..1, 0..1, imagenet"),
        ((8, "0..1", "nearest"), "resize 'nearest'.*bilinear, legacy"),
        ((0, "0..1"), "image_size 0"),
        (((8, 8, 3), "0..1"), "image_size"),
    ],
)
def test_preprocessing_refuses(settings, message):
  with pytest.raises(errors.UserError, match=message):
    images.make_preprocess(*settings)
