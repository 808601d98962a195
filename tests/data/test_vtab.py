"""The 19 VTAB-1k tasks: the table, the label rules, the true TFDS builders."""

import dataclasses
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.data import labels
from vqt_jax.data import tasks
from vqt_jax.data import vtab

# name, group, builder, classes, full sizes, val, test, test size; facts of
# VTAB's definition (task_adaptation) and of the TFDS catalogue.

FACTS = [
  (
    "caltech101",
    "natural",
    "caltech101",
    102,
    {"train": 3060, "test": 6084},
    "train[2754:2954]",
    "test",
    6084,
  ),
  (
    "cifar100",
    "natural",
    "cifar100",
    100,
    {"train": 50000, "test": 10000},
    "train[45000:45200]",
    "test",
    10000,
  ),
  (
    "dtd",
    "natural",
    "dtd",
    47,
    {"train": 1880, "validation": 1880, "test": 1880},
    "validation[:200]",
    "test",
    1880,
  ),
  (
    "flowers102",
    "natural",
    "oxford_flowers102",
    102,
    {"train": 1020, "validation": 1020, "test": 6149},
    "validation[:200]",
    "test",
    6149,
  ),
  (
    "pets",
    "natural",
    "oxford_iiit_pet",
    37,
    {"train": 3680, "test": 3669},
    "train[2944:3144]",
    "test",
    3669,
  ),
  (
    "svhn",
    "natural",
    "svhn_cropped",
    10,
    {"train": 73257, "test": 26032, "extra": 531131},
    "train[65931:66131]",
    "test",
    26032,
  ),
  (
    "sun397",
    "natural",
    "sun397/tfds",
    397,
    {"train": 76128, "validation": 10875, "test": 21750},
    "validation[:200]",
    "test",
    21750,
  ),
  (
    "patch_camelyon",
    "specialized",
    "patch_camelyon",
    2,
    {"train": 262144, "validation": 32768, "test": 32768},
    "validation[:200]",
    "test",
    32768,
  ),
  (
    "eurosat",
    "specialized",
    "eurosat/rgb",
    10,
    {"train": 27000},
    "train[16200:16400]",
    "train[21600:]",
    5400,
  ),
  (
    "resisc45",
    "specialized",
    "resisc45",
    45,
    {"train": 31500},
    "train[18900:19100]",
    "train[25200:]",
    6300,
  ),
  (
    "retinopathy",
    "specialized",
    "diabetic_retinopathy_detection/btgraham-300",
    5,
    {"sample": 10, "train": 35126, "validation": 10906, "test": 42670},
    "validation[:200]",
    "test",
    42670,
  ),
  (
    "clevr_count",
    "structured",
    "clevr",
    8,
    {"train": 70000, "validation": 15000, "test": 15000},
    "train[63000:63200]",
    "validation",
    15000,
  ),
  (
    "clevr_distance",
    "structured",
    "clevr",
    6,
    {"train": 70000, "validation": 15000, "test": 15000},
    "train[63000:63200]",
    "validation",
    15000,
  ),
  (
    "dmlab",
    "structured",
    "dmlab",
    6,
    {"train": 65550, "validation": 22628, "test": 22735},
    "validation[:200]",
    "test",
    22735,
  ),
  (
    "kitti",
    "structured",
    "kitti",
    4,
    {"train": 6347, "validation": 423, "test": 711},
    "validation[:200]",
    "test",
    711,
  ),
  (
    "dsprites_location",
    "structured",
    "dsprites",
    16,
    {"train": 737280},
    "train[589824:590024]",
    "train[663552:]",
    73728,
  ),
  (
    "dsprites_orientation",
    "structured",
    "dsprites",
    16,
    {"train": 737280},
    "train[589824:590024]",
    "train[663552:]",
    73728,
  ),
  (
    "smallnorb_azimuth",
    "structured",
    "smallnorb",
    18,
    {"train": 24300, "test": 24300},
    "test[:200]",
    "test[50%:]",
    12150,
  ),
  (
    "smallnorb_elevation",
    "structured",
    "smallnorb",
    9,
    {"train": 24300, "test": 24300},
    "test[:200]",
    "test[50%:]",
    12150,
  ),
]

NAMES = [row[0] for row in FACTS]


def test_table_has_the_19_tasks():
  assert list(vtab.VTAB) == NAMES
  groups = [task.group for task in vtab.VTAB.values()]
  assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8


@pytest.mark.parametrize("row", FACTS, ids=NAMES)
def test_row(row):
  name, group, builder, classes, sizes, val, test, _ = row
  task = vtab.VTAB[name]
  assert (task.name, task.group, task.num_classes) == (name, group, classes)
  assert task.builder == f"{builder}:*.*.*"
  assert task.sizes == sizes
  assert task.image_key == "image"
  assert task.pixel_scale == (255 if builder == "dsprites" else 1)
  assert dict(task.splits) == {
    "train": "train[:800]",
    "val": val,
    "trainval": f"train[:800]+{val}",
    "test": test,
  }


@pytest.mark.parametrize("row", FACTS, ids=NAMES)
def test_slices_have_their_sizes_in_the_full_dataset(row):
  name, _, _, _, sizes, _, _, test_size = row
  assert vtab.VTAB[name].sizes == sizes
  found = {
    split: data.expected_examples(vtab.VTAB[name], split)
    for split in data.SPLITS
  }
  expected = {"train": 800, "val": 200, "trainval": 1000, "test": test_size}
  assert found == expected


def test_official_names_are_aliases():
  official_names = dict(zip(NAMES, NAMES))
  for official, short in vtab.OFFICIAL_NAMES.items():
    official_names.pop(short)
    official_names[official] = short
  assert sorted(official_names.values()) == sorted(NAMES)
  for official, short in official_names.items():
    for name in (official, f"vtab-{official}", official.replace('"', "'")):
      assert tasks.make_task(name) == vtab.VTAB[short]


@pytest.mark.parametrize("name", NAMES)
def test_builders_exist_with_these_classes(name, tmp_path):
  task = vtab.VTAB[name]
  builder = tfds.builder(task.builder, data_dir=tmp_path)
  assert task.image_key in builder.info.features
  if "label" in builder.info.features:
    assert builder.info.features["label"].num_classes == task.num_classes


# Label rules: eager and inside tf.data.


def _label(rule, example):
  example = tf.nest.map_structure(tf.constant, example)
  eager = int(rule(example))
  mapped = tf.data.Dataset.from_tensors(example).map(rule)
  assert int(mapped.get_single_element()) == eager
  return eager


@pytest.mark.parametrize("objects,expected", [(3, 0), (7, 4), (10, 7)])
def test_clevr_count(objects, expected):
  example = {"objects": {"size": np.zeros(objects, np.int64)}}
  assert _label(labels.clevr_count, example) == expected


@pytest.mark.parametrize(
  "depths,expected",
  [
    ([9.9, 0.5, 30.0], 0),
    ([8.0], 0),  # A bound belongs to the class below it.
    ([8.0001, 12.0], 1),
    ([8.5], 1),
    ([8.6], 2),
    ([9.0], 2),
    ([9.5], 3),
    ([9.75], 4),
    ([10.0], 4),
    ([10.01, 14.0], 5),
  ],
)
def test_clevr_distance(depths, expected):
  coords = np.zeros((len(depths), 3), np.float32)
  coords[:, :2] = 1.0  # Pixels, which must not matter.
  coords[:, 2] = depths
  example = {"objects": {"pixel_coords": coords}}
  assert _label(labels.clevr_distance, example) == expected


@pytest.mark.parametrize(
  "types,metres,expected",
  [
    ([0, 1, 2], [30.0, 7.9, 50.0], 0),
    ([0], [8.0], 0),
    ([2], [8.01], 1),
    ([1], [20.0], 1),
    ([0], [20.5], 2),
    ([0, 3], [25.0, 1.0], 2),  # A pedestrian is no vehicle.
    ([3, 4, 5, 6, 7], [1.0, 2.0, 3.0, 4.0, 5.0], 3),
    ([], [], 3),
  ],
)
def test_kitti_vehicle(types, metres, expected):
  location = np.zeros((len(types), 3), np.float32)
  location[:, 2] = metres
  example = {
    "objects": {"type": np.array(types, np.int64), "location": location}
  }
  assert _label(labels.kitti_vehicle, example) == expected


def test_dsprites_x():
  found = [
    _label(labels.dsprites_x, {"label_x_position": np.int64(i)})
    for i in (0, 1, 2, 3, 30, 31)
  ]
  assert found == [0, 0, 1, 1, 15, 15]


def test_dsprites_o():
  found = [
    _label(labels.dsprites_o, {"label_orientation": np.int64(i)})
    for i in range(40)
  ]
  assert found == [int(np.floor(i / 2.5)) for i in range(40)]
  assert found[:9] == [0, 0, 0, 1, 1, 2, 2, 2, 3]
  assert found[-1] == 15


def test_feature_rule():
  assert _label(labels.feature("label"), {"label": np.int64(4)}) == 4


# Small copies, written by the true builders.


def _fake(feature, i):
  """A value of that TFDS feature, for example number i."""
  if isinstance(feature, tfds.features.FeaturesDict):
    return {key: _fake(value, i) for key, value in feature.items()}
  if isinstance(feature, tfds.features.Sequence):
    return [_fake(feature.feature, i) for _ in range(3 + i % 8)]
  if isinstance(feature, tfds.features.Image):
    shape = [side or 12 + i for side in feature.shape]
    return np.full(shape, i % 2, np.uint8)
  if isinstance(feature, tfds.features.BBoxFeature):
    return tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=1.0)
  if isinstance(feature, tfds.features.ClassLabel):
    return i % feature.num_classes
  if isinstance(feature, tfds.features.Text):
    return f"{i}"
  return np.full(feature.shape, 8.2, feature.np_dtype)


def _prepare(request, data_dir, keys):
  """Writes a small dataset; `keys`: split -> keys of its examples."""
  builder = tfds.builder(request, data_dir=data_dir)
  features = builder.info.features

  def examples(keys):
    for i, key in enumerate(keys):
      yield key, _fake(features, i)

  def split_generators(dl_manager):
    del dl_manager
    return {split: examples(value) for split, value in keys.items()}

  builder._split_generators = split_generators
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=2)
  )
  return builder


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
  """Folder with copies of the 16 datasets, four examples in each split."""
  folder = str(tmp_path_factory.mktemp("tfds"))
  tfds.disable_progress_bar()
  for request, sizes in {
    task.builder: task.sizes for task in vtab.VTAB.values()
  }.items():
    _prepare(request, folder, {split: range(4) for split in sizes})
  tfds.enable_progress_bar()
  return folder


@pytest.mark.parametrize("name", NAMES)
def test_task_reads_its_dataset(name, copies):
  task = tasks.make_task(name, data_dir=copies)
  last = task.splits["test"].partition("[")[0]
  task = dataclasses.replace(
    task, splits={"train": "train[:3]", "test": f"{last}[1:]"}
  )
  for split in task.splits:
    arrays = data.load_arrays(
      task, split, image_size=6, value_range="0..1", resize="legacy"
    )
    assert arrays["image"].shape == (3, 6, 6, 3)
    assert arrays["image"].dtype == np.float32
    assert arrays["label"].dtype == np.int32
    assert arrays["label"].shape == (3,)
    # Stored pixels are 0 or 1: of 255, but of 1 in dSprites.
    top = 1.0 if name.startswith("dsprites") else 1 / 255
    assert set(arrays["image"].ravel()) <= {0.0, np.float32(top)}
  warning = data.size_warning(task)
  assert "train has 4 examples" in warning and task.dataset in warning


def test_cifar100_order_is_the_published_one(tmp_path):
  """TFDS orders by a hash of the keys: these are train800's first five."""
  first = [16399, 1680, 47917, 17307, 27051]
  keys = sorted({*first, *range(50)})
  tfds.disable_progress_bar()
  _prepare("cifar100", tmp_path, {"train": keys})  # Labels: places in `keys`.
  task = dataclasses.replace(
    tasks.make_task("cifar100", data_dir=str(tmp_path)),
    splits={"train": "train[:5]"},
  )
  arrays = data.load_arrays(task, "train", image_size=4, value_range="0..1")
  assert [keys[label] for label in arrays["label"]] == first


def test_size_warning_is_silent_for_the_right_sizes(copies):
  task = tasks.make_task("dtd", data_dir=copies)
  right = {"train": 4, "validation": 4, "test": 4}
  assert data.size_warning(dataclasses.replace(task, sizes=right)) is None


def test_an_older_prepared_copy_is_used(copies, tmp_path):
  """TFDS's code knows pets 4.0.0 only; VTAB's 3.2.0 may lie on disk."""
  old = tmp_path / "oxford_iiit_pet" / "3.2.0"
  shutil.copytree(f"{copies}/oxford_iiit_pet/4.0.0", old)
  info = old / "dataset_info.json"
  info.write_text(info.read_text().replace("4.0.0", "3.2.0"))
  task = tasks.make_task("pets", data_dir=str(tmp_path))
  task = dataclasses.replace(task, splits={"test": "test"})
  assert data.num_examples(task, "test") == 4


def test_what_can_be_prepared_again_is_moved_away(copies, tmp_path):
  shutil.copytree(f"{copies}/dtd", tmp_path / "dtd")
  (info,) = tmp_path.glob("dtd/*/dataset_info.json")
  task = tasks.make_task("dtd", data_dir=str(tmp_path))
  task = dataclasses.replace(task, splits={"test": "test"})
  command = f"python -m vqt_jax.data.prepare dtd --data_dir {tmp_path}$"
  for record in info.parent.glob("*-test*"):
    record.write_bytes(record.read_bytes()[:-9])
  message = f"Move {info.parent} away, and prepare it again with: {command}"
  with pytest.raises(errors.UserError, match=message):
    data.load_arrays(task, "test", image_size=4, value_range="0..1")
  info.write_text("")
  message = f"Move {tmp_path}/dtd away, and prepare it again with: {command}"
  with pytest.raises(errors.UserError, match=message):
    data.check_prepared(task)


def test_slices_beyond_the_end_are_refused(copies):
  task = tasks.make_task("dtd", data_dir=copies)
  with pytest.raises(errors.UserError, match=r"train\[:800\].*train \(4\)"):
    data.check_prepared(task)


def test_settings_for_a_vtab_task_are_refused():
  with pytest.raises(errors.UserError, match=r"fixed.*'cifar100:\*\.\*\.\*'"):
    tasks.make_task("cifar100", splits={"train": "train"})
