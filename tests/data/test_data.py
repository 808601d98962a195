"""Reading TFDS datasets: order, batches, preprocessing, and bad input."""

import dataclasses
import hashlib
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from sklearn.utils import class_weight
import tensorflow as tf
import tensorflow_datasets as tfds

from tests import helpers
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import preprocess
from vqt_jax.data import tasks
from vqt_jax.data import tfds_source

ROOT = helpers.ROOT
GOLDENS = helpers.GOLDENS / "vqt"
SIZES = {"train": 23, "test": 11}
READ = {"image_size": (2, 3), "value_range": "0..1"}

with tfds.core.registered.skip_registration():

  class Numbered(tfds.core.GeneratorBasedBuilder):
    """Grey images of constant value: that of their key; label key % 7."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "picture": tfds.features.Image(shape=(4, 4, 1)),
            "kind": tfds.features.ClassLabel(num_classes=7),
            "key": np.int64,
          }
        ),
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
  return tasks.make_task("numbered", data_dir=data_dir, splits=splits)


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
  found = data.dataset_identity(task)
  assert found["dataset"].startswith("numbered/") and found["num_classes"] == 7
  assert found["splits"]["val"] == {"slices": "train[:5]", "images": 5}
  assert list(found["splits"]) == list(data.SPLITS)
  copy = tmp_path / "copy"
  shutil.copytree(data_dir, copy, copy_function=shutil.copy)  # Of now.
  again = dataclasses.replace(task, data_dir=str(copy))
  assert data.dataset_identity(again) == found
  (info,) = copy.rglob("dataset_info.json")
  text = info.read_text()
  assert '"numBytes": "' in text
  info.write_text(text.replace('"numBytes": "', '"numBytes": "1', 1))
  assert data.dataset_identity(again) == found | {
    "sha256": data.dataset_identity(again)["sha256"]
  }
  assert data.dataset_identity(again)["sha256"] != found["sha256"]


def test_picked_examples_are_those_at_their_positions(task):
  """Of several files, slices and splits."""
  splits = task.splits | {"test": "train[20:]+test+train[3:6]"}
  task = dataclasses.replace(task, splits=splits)
  whole = keys_of(data.load_arrays(task, "test", **READ))
  assert data.example_names(task, "test") == [*map(str, range(17))]
  positions = [16, 0, 12, 2, 3, 13]
  some = data.load_arrays(data.pick(task, "test", positions), "test", **READ)
  assert keys_of(some) == [whole[i] for i in positions]


def test_balanced_weights_are_those_of_scikit_learn():
  labels = np.array([0, 0, 0, 1, 1, 4], np.int32)
  weights = data.balanced_weights(labels, 5)
  assert weights.dtype == np.float32 and weights[labels].mean() == 1
  there = np.unique(labels)
  expected = class_weight.compute_class_weight(
    "balanced", classes=there, y=labels
  )
  np.testing.assert_allclose(weights[there], expected, rtol=1e-6)
  assert not weights[[2, 3]].any()


# Tasks by name.


def test_any_dataset_in_the_data_folder_is_a_task(data_dir):
  task = tasks.make_task("numbered", data_dir=data_dir)
  assert (task.image_key, task.num_classes) == ("picture", 7)
  assert task.builder == "numbered:*.*.*"
  assert dict(task.splits) == {
    "train": "train[:800]",
    "val": "train[800:1000]",
    "trainval": "train[:800]+train[800:1000]",
    "test": "test",
  }


def test_features_and_splits_from_the_config(data_dir):
  task = tasks.make_task(
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
  task = tasks.make_task("cifar10", data_dir=str(tmp_path))
  assert (task.image_key, task.num_classes) == ("image", 10)
  pets = tasks.make_task("oxford_iiit_pet:*.*.*", data_dir=str(tmp_path))
  assert pets.num_classes == 37  # Two classes, one image: supervised keys.


@pytest.mark.parametrize(
  "name,settings,message",
  [
    ("cifar", {}, "Unknown task or dataset 'cifar'.*Nearest.*'cifar100'"),
    ("numberd", {}, "Nearest names: 'numbered'"),
    ("cifar10/big", {}, "'cifar10' has no config 'big'.*none"),
    ("eurosat/grey", {}, "no config 'grey'.*rgb, all"),
    ("cifar10:9.9.9", {}, "no version '9.9.9'.*TFDS can prepare: 3.0.2"),
    ("cifar10:3", {}, "no version '3'.*: none; TFDS can prepare: 3.0.2"),
    ("cifar10:latest", {}, "no version 'latest'"),
    ("cifar10:", {}, "no version ''"),
    ("numbered:01.2.0", {}, "no version '01.2.0'. In .*: 1.2.0. Without"),
    ("numbered:2.*.*", {}, r"no version '2.\*.\*'. In .*: 1.2.0. Without"),
    ("numbered:latest", {}, "no version 'latest'. In .*: 1.2.0. Without"),
    ("nosuch:latest", {}, "Unknown task or dataset 'nosuch'"),
    ("/a/photos/1.0.0", {}, "data_dir to '/a' and task to 'photos'"),
    ("numbered/big", {}, r"expected numbered/\[config/\]version/"),
    ("a b", {}, "Unknown task or dataset 'a b'"),
    ("a/b/c", {}, "expected name"),
    ("huggingface:mnist", {}, "another hub.*TFDS has 'mnist'"),
    ("hf://datasets/mnist", {}, "another hub"),
    ("https://host/x.zip", {}, "another hub or site"),
    ("/a/photos", {}, "There is no folder or table /a/photos"),
    ("./photos", {}, "There is no folder or table photos"),
    ("gs://bucket/photos", {}, "is the path of .*data_dir to 'gs://bucket'"),
    ("clevr", {}, "is the label.*clevr_count, clevr_distance"),
    ("dsprites", {}, "is the label.*label_scale.*label_key"),
    ("imdb_reviews", {}, "No feature .* can be the image.*label: Class"),
    ("numbered", {"image_key": "image"}, "'image'.*not exist.*: picture"),
    ("numbered", {"label_key": "picture"}, "the label: key, kind"),
    ("numbered", {"label_key": "key"}, "Set num_classes"),
    ("numbered", {"splits": {"valid": "x"}}, "'valid'.*train, val"),
  ],
)
def test_unusable_names_and_settings(data_dir, name, settings, message):
  with pytest.raises(errors.UserError, match=message):
    tasks.make_task(name, data_dir=data_dir, **settings)


# What is on disk.


def test_unprepared_dataset_names_the_command(tmp_path):
  task = tasks.make_task("cifar100", data_dir=str(tmp_path))
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
    ("train[:x]", r": Error parsing split 'train\[:x\]'. Splits there"),
  ],
)
def test_splits_that_are_not_there(task, slices, message):
  task = dataclasses.replace(task, splits={**task.splits, "val": slices})
  with pytest.raises(errors.UserError, match=message):
    data.check_prepared(task)
  data.num_examples(task, "train")
  with pytest.raises(errors.UserError, match=message):
    data.batches(task, "val", batch_size=2, **READ)


@pytest.mark.parametrize(
  "name", ["Mk0", "my-data", "v1.2", "My Photos", "2024", "größe", "a+b/c d"]
)
def test_folders_may_have_any_name(data_dir, tmp_path, name):
  for version in ("1.10.0", "1.9.0"):
    shutil.copytree(f"{data_dir}/numbered/1.2.0", tmp_path / name / version)
  for request, version in ((name, "1.10.0"), (f"{name}:1.9.*", "1.9.0")):
    task = tasks.make_task(request, data_dir=str(tmp_path))
    assert task.dataset == name
    assert builders.open_builder(task).data_path.name == version
  name, _, config = name.partition("/")
  with pytest.raises(errors.UserError, match=f"There: .*{config}|no version"):
    tasks.make_task(f"{name}:7.0.0", data_dir=str(tmp_path))


def test_a_path_is_of_images_or_what_tfds_wrote(data_dir, tmp_path):
  for name, colour in (("dark", 10), ("light", 200)):
    for i in range(3):
      place = tmp_path / "photos" / name / f"{i}.webp"
      place.parent.mkdir(parents=True, exist_ok=True)
      PIL.Image.new("L", (3, 2), colour + i).save(place, lossless=True)
  message = r"holds images \(dark/0.webp, .*give their path as the task: (.*)"
  with pytest.raises(errors.UserError, match=message) as caught:
    tasks.make_task("photos", data_dir=str(tmp_path))
  path = re.search(message, str(caught.value))[1]
  task = tasks.make_task(path)
  assert task.class_names == ("dark", "light")
  for settings in ({"num_classes": 3}, {"splits": {"test": "test"}}):
    with pytest.raises(errors.UserError, match="for a folder|a folder or"):
      tasks.make_task(path, **settings)
  for place in ("numbered", "numbered/1.2.0"):
    with pytest.raises(errors.UserError, match="task to 'numbered'"):
      tasks.make_task(f"{data_dir}/{place}")
  for settings in ({"fit": "crop"}, {"split_key": "part"}):
    with pytest.raises(errors.UserError, match="folder of that name: ./numb"):
      tasks.make_task("numbered", data_dir=data_dir, **settings)


def test_folder_without_metadata(tmp_path):
  (tmp_path / "mine").mkdir()
  with pytest.raises(errors.UserError, match="mine/.*dataset_info.json"):
    tasks.make_task("mine", data_dir=str(tmp_path))


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
def test_splits_that_are_parts_of_another(data_dir, train, val, trainval, same):
  splits = {"train": train, "val": val, "trainval": trainval}
  task = tasks.make_task("numbered", data_dir=str(data_dir), splits=splits)
  assert data.is_concatenation(task, ("train", "val"), "trainval") == same


def test_formats_that_tensorflow_does_not_read(data_dir, tmp_path):
  shutil.copytree(data_dir, tmp_path / "data")
  info = next((tmp_path / "data").rglob("dataset_info.json"))
  text = info.read_text()
  assert '"tfrecord"' in text
  info.write_text(text.replace('"tfrecord"', '"array_record"'))
  name = info.parent.parent.name
  task = tasks.make_task(name, data_dir=str(tmp_path / "data"))
  with pytest.raises(errors.UserError, match="is stored as ArrayRecord"):
    builders.check_prepared(task)


def test_damaged_files(tmp_path):
  tfds.disable_progress_bar()
  Numbered(data_dir=str(tmp_path)).download_and_prepare()
  task = tasks.make_task("numbered", data_dir=str(tmp_path))
  (file,) = tmp_path.glob("numbered/1.2.0/*test.tfrecord*")
  message = (
    r"Record {} of test \(split 'test', counted from 0\).*: {}.*"
    r"\. Write the dataset again, or restore its files from a copy\.$"
  )
  file.write_bytes(file.read_bytes()[:-20])
  cut = message.format(10, "truncated record")
  with pytest.raises(errors.UserError, match=cut):
    data.load_arrays(task, "test", **READ)
  file.unlink()
  with pytest.raises(errors.UserError, match=message.format(0, ".*No such")):
    data.load_arrays(task, "test", **READ)


@pytest.fixture(scope="module")
def cut_image(tmp_path_factory):
  """A task whose image number 13 in train is cut."""
  folder = str(tmp_path_factory.mktemp("cut"))
  noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
  images_ = [coded(PIL.Image.fromarray(pixels), "JPEG") for pixels in noise]
  images_[13] = images_[13][:-300]
  tfds.dataset_builders.store_as_tfds_dataset(
    name="cut",
    version="1.0.0",
    data_dir=folder,
    features=tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(num_classes=2),
        "image/file": tfds.features.Text(),
        "files": tfds.features.Sequence(tfds.features.Text()),
      }
    ),
    split_datasets={
      "train": [
        (
          i,
          {
            "image": image,
            "label": i % 2,
            "image/file": f"{i}.jpg",
            "files": ["a", "b"],
          },
        )
        for i, image in enumerate(images_)
      ]
    },
    disable_shuffling=True,
  )
  splits = {"train": "train", "val": "train[10:]", "test": "train"}
  return tasks.make_task("cut", data_dir=folder, splits=splits)


@pytest.mark.parametrize(
  "read, split, number, settings",
  [
    (data.load_arrays, "train", 13, {}),
    (data.load_arrays, "val", 3, {}),
    (data.batches, "train", 13, {"batch_size": 4, "start": 3}),
    (
      data.batches,
      "train",
      13,
      {"batch_size": 8, "process_index": 1, "process_count": 2},
    ),
    (
      data.train_batches,
      "train",
      13,
      {"batch_size": 4, "epoch": 1, "seed": 2, "start_step": 1},
    ),
  ],
)
def test_an_image_that_is_cut_is_named(
  cut_image, read, split, number, settings
):
  slices = re.escape(cut_image.splits[split])
  message = (
    rf"^Cannot decode image {number} of {split} \(split '{slices}', counted"
    r" from 0; image/file '13.jpg'\) of dataset 'cut' in .*/cut/1.0.0"
    r" \(.*Invalid JPEG data.*; [\d,]+ bytes\)\. Replace or remove that image"
    r" and write the dataset again\.$"
  )
  with pytest.raises(errors.UserError, match=message):
    list(read(cut_image, split, **READ, **settings))


@pytest.mark.parametrize("read", [data.load_arrays, data.train_batches])
def test_labels_outside_the_classes(task, read):
  task = dataclasses.replace(task, num_classes=6)
  settings = dict(READ)
  if read is data.train_batches:
    settings |= {"batch_size": 4, "epoch": 0, "seed": 0}
  with pytest.raises(errors.UserError, match="Label 6 in 'numbered'.*0..5"):
    list(read(task, "train", **settings))


# Classes.


@pytest.mark.parametrize(
  "labels, message",
  [
    ({"train": "aab", "val": "bab", "trainval": "aabbab"}, None),
    (
      {"train": "ab", "val": "cac", "trainval": "abcac"},
      r"^2 of the 3 images of val are .* train lacks \(cat\).*shuffled",
    ),
    ({"trainval": "bb"}, "All 2 images of trainval .* one class, bee,"),
    ({"train": "a"}, "All 1 images of train .* one class, ant,"),
    ({}, None),
    (
      {"train": "ab", "val": "ab", "trainval": "abab"},
      "^trainval has no image of 1 of 3 classes: cat.$",
    ),
  ],
)
def test_classes_that_are_not_trained_on(task, labels, message):
  names = ("ant", "bee", "cat")
  task = dataclasses.replace(task, num_classes=3, class_names=names)
  if labels == {"train": "aab", "val": "bab", "trainval": "aabbab"}:
    task = dataclasses.replace(task, num_classes=2)
  found = {
    split: np.array(["abc".index(x) for x in text])
    for split, text in labels.items()
  }
  if message and message.startswith("All"):
    with pytest.raises(errors.UserError, match=message):
      data.check_classes(task, found)
  else:
    note = data.check_classes(task, found)
    assert re.search(message, note) if message else note is None


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
  monkeypatch.setattr(tfds_source, "SHUFFLE_BYTES", shuffle_bytes)
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
  builder = builders.open_builder(task)
  assert tfds_source._shuffle_buffer(builder, 23) == 23
  average = sum(s.num_bytes for s in builder.info.splits.values()) // 34
  monkeypatch.setattr(tfds_source, "SHUFFLE_BYTES", 5 * average)
  assert tfds_source._shuffle_buffer(builder, 23) == 5


# Preprocessing.


@pytest.mark.parametrize("case", range(6))
def test_legacy_preprocessing_is_the_authors(case):
  with np.load(GOLDENS / "preprocess.npz", allow_pickle=False) as golden:
    raw, unit, normalised = (
      golden[f"case{case}/{key}"] for key in ("raw", "unit", "normalised")
    )
  for value_range, expected in (("0..1", unit), ("imagenet", normalised)):
    fn = preprocess.make_preprocess(unit.shape[0], value_range, "legacy")
    np.testing.assert_allclose(fn(raw), expected, rtol=0, atol=2e-6)


def coded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def pictures():
  """Kind -> file, and the picture that is in it, unless that loses some."""
  noise = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
  rgba = PIL.Image.fromarray(noise)
  rgb, grey = rgba.convert("RGB"), rgba.convert("L")
  few, two = rgb.quantize(16), rgb.convert("1")
  deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 17)
  moving = {"save_all": True, "append_images": [rgb.rotate(180)]}
  return {
    "JPEG": (coded(rgb, "JPEG"), None),
    "grey JPEG": (coded(grey, "JPEG"), None),
    "CMYK JPEG": (coded(rgb.convert("CMYK"), "JPEG"), None),
    "PNG": (coded(rgb, "PNG"), rgb),
    "PNG with alpha": (coded(rgba, "PNG"), rgb),
    "grey PNG with alpha": (coded(rgba.convert("LA"), "PNG"), grey),
    "PNG with palette": (coded(few, "PNG", transparency=3), few),
    "PNG of 1 bit": (coded(two, "PNG"), two),
    "PNG of 16 bits": (coded(deep, "PNG"), grey),
    "moving PNG": (coded(rgb, "PNG", **moving), rgb),
    "GIF": (coded(few, "GIF", transparency=3), few),
    "moving GIF": (coded(few, "GIF", **moving), few),
    "WebP": (coded(rgb, "WEBP", lossless=True), rgb),
    "WebP with alpha": (coded(rgba, "WEBP", lossless=True, exact=True), rgb),
    "moving WebP": (coded(rgb, "WEBP", lossless=True, **moving), rgb),
    "BMP": (coded(rgb, "BMP"), rgb),
    "BMP with palette": (coded(few, "BMP"), few),
    "BMP of 1 bit": (coded(two, "BMP"), two),
    "TIFF": (coded(rgb, "TIFF", compression="tiff_lzw"), rgb),
    "TIFF of 16 bits": (coded(deep, "TIFF"), grey),
    "CMYK TIFF": (coded(rgb.convert("CMYK"), "TIFF"), rgb),
    "JPEG 2000": (coded(rgb, "JPEG2000"), rgb),
  }


def test_all_kinds_of_images():
  files = [content for content, _ in pictures().values()]
  found = tf.data.Dataset.from_tensor_slices(files).map(
    lambda content: preprocess.decode(content, 3)
  )
  for (kind, (content, picture)), rgb in zip(
    pictures().items(), found.as_numpy_iterator(), strict=True
  ):
    if re.search("JPEG$|PNG", kind):  # As VTAB's program does.
      expected = tfds.features.Image().decode_example(content)
      np.testing.assert_array_equal(rgb, expected, kind)
    if picture:
      expected = np.asarray(picture.convert("RGB"))
      np.testing.assert_allclose(rgb, expected, atol=1, err_msg=kind)
      grey = preprocess.decode(content, 1)[..., 0]
      expected = np.asarray(picture.convert("L"))
      np.testing.assert_allclose(grey, expected, atol=1, err_msg=kind)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not a kind of image"),
    (b"<html>404</html>", "not a kind of image"),
    (coded(PIL.Image.new("F", (2, 2)), "TIFF"), "TIFF with 32 bits per"),
    (coded(PIL.Image.new("RGB", (9, 9)), "WEBP")[:-9], "decode"),
  ],
)
def test_no_images(content, message):
  with pytest.raises((ValueError, OSError), match=message):
    preprocess.decode(content, 3)


@pytest.mark.parametrize(
  "resize,row", [("bilinear", [0, 0.25, 0.75, 1]), ("legacy", [0, 0.5, 1, 1])]
)
def test_resizes_differ_in_where_pixels_lie(resize, row):
  image = np.array([[[0], [255]]], np.uint8)
  found = preprocess.make_preprocess((1, 4), "0..1", resize)(image)
  np.testing.assert_allclose(found[0, :, 0], row, atol=1e-6)


def test_shapes_channels_and_ranges():
  grey = np.full((5, 7, 1), 51, np.uint8)
  found = preprocess.make_preprocess((6, 3), "-1..1")(grey)
  assert found.shape == (6, 3, 3) and found.dtype == tf.float32
  np.testing.assert_allclose(found, -0.6, atol=1e-6)
  alpha = np.stack([grey[..., 0]] * 3 + [grey[..., 0] * 0], -1)
  np.testing.assert_allclose(
    preprocess.make_preprocess((6, 3), "-1..1")(alpha), found
  )
  binary = preprocess.make_preprocess(2, "0..1", pixel_scale=255)
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
    preprocess.make_preprocess(*settings)
