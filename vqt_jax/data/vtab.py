"""The 19 tasks of VTAB-1k, as tables.

VTAB (https://arxiv.org/abs/1910.04867) trains on 1,000 examples of each of 19
datasets: the first 800 of its train split and the first 200 of its validation
split, in the order in which TFDS stores them, and tests on the whole test
split. Where a dataset has no split of its own for one of the three, VTAB cuts
it out of another one (first 90 % of train, 60/20/20 %, ...), which gives the
odd slices below.
"""

from vqt_jax.data import labels
from vqt_jax.data.task import TfdsTask

_TRAIN = "train[:800]"
_VAL = "validation[:200]"
_DSPRITES = ("train[589824:590024]", "train[663552:]")
_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300"

# Group -> tasks: name, dataset, classes, slices for val and test.
_TASKS = {
  "natural": (
    ("caltech101", "caltech101", 102, "train[2754:2954]", "test"),
    ("cifar100", "cifar100", 100, "train[45000:45200]", "test"),
    ("dtd", "dtd", 47, _VAL, "test"),  # The first of its ten folds.
    ("flowers102", "oxford_flowers102", 102, _VAL, "test"),
    ("pets", "oxford_iiit_pet", 37, "train[2944:3144]", "test"),
    ("svhn", "svhn_cropped", 10, "train[65931:66131]", "test"),
    ("sun397", "sun397/tfds", 397, _VAL, "test"),
  ),
  "specialized": (
    ("patch_camelyon", "patch_camelyon", 2, _VAL, "test"),
    ("eurosat", "eurosat/rgb", 10, "train[16200:16400]", "train[21600:]"),
    ("resisc45", "resisc45", 45, "train[18900:19100]", "train[25200:]"),
    ("retinopathy", _RETINOPATHY, 5, _VAL, "test"),
  ),
  "structured": (
    # CLEVR's own test split has no objects.
    ("clevr_count", "clevr", 8, "train[63000:63200]", "validation"),
    ("clevr_distance", "clevr", 6, "train[63000:63200]", "validation"),
    ("dmlab", "dmlab", 6, _VAL, "test"),
    ("kitti", "kitti", 4, _VAL, "test"),
    ("dsprites_location", "dsprites", 16, *_DSPRITES),
    ("dsprites_orientation", "dsprites", 16, *_DSPRITES),
    ("smallnorb_azimuth", "smallnorb", 18, "test[:200]", "test[50%:]"),
    ("smallnorb_elevation", "smallnorb", 9, "test[:200]", "test[50%:]"),
  ),
}

# Dataset -> examples in its splits.
_SIZES = {
  "caltech101": {"train": 3060, "test": 6084},
  "cifar100": {"train": 50000, "test": 10000},
  "dtd": {"train": 1880, "validation": 1880, "test": 1880},
  "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
  "oxford_iiit_pet": {"train": 3680, "test": 3669},
  "svhn_cropped": {"train": 73257, "test": 26032, "extra": 531131},
  "sun397/tfds": {"train": 76128, "validation": 10875, "test": 21750},
  "patch_camelyon": {"train": 262144, "validation": 32768, "test": 32768},
  "eurosat/rgb": {"train": 27000},
  "resisc45": {"train": 31500},
  _RETINOPATHY: {
    "sample": 10,
    "train": 35126,
    "validation": 10906,
    "test": 42670,
  },
  "clevr": {"train": 70000, "validation": 15000, "test": 15000},
  "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
  "kitti": {"train": 6347, "validation": 423, "test": 711},
  "dsprites": {"train": 737280},
  "smallnorb": {"train": 24300, "test": 24300},
}

# Tasks whose label is not the feature "label".
_LABELS = {
  "clevr_count": labels.clevr_count,
  "clevr_distance": labels.clevr_distance,
  "kitti": labels.kitti_vehicle,
  "dsprites_location": labels.dsprites_x,
  "dsprites_orientation": labels.dsprites_o,
  # TFDS has halved the azimuth already.
  "smallnorb_azimuth": labels.feature("label_azimuth"),
  "smallnorb_elevation": labels.feature("label_elevation"),
}

VTAB: dict[str, TfdsTask] = {
  name: TfdsTask(
    name=name,
    group=group,
    builder=f"{dataset}:*.*.*",
    num_classes=num_classes,
    sizes=_SIZES[dataset],
    splits={
      "train": _TRAIN,
      "val": val,
      "trainval": f"{_TRAIN}+{val}",
      "test": test,
    },
    label=_LABELS.get(name, labels.feature("label")),
    pixel_scale=255 if dataset == "dsprites" else 1,  # It stores 0 and 1.
  )
  for group, tasks in _TASKS.items()
  for name, dataset, num_classes, val, test in tasks
}
GROUPS = tuple(_TASKS)
ALL = "all"  # In place of a name: every task of the table.

# Queries per block where the authors of VQT use more than one (their demo).
NUM_QUERIES = {
  "svhn": 20,
  "clevr_distance": 10,
  "dmlab": 20,
  "kitti": 20,
  "dsprites_location": 20,
  "smallnorb_azimuth": 20,
  "smallnorb_elevation": 10,
}

# Names in task_adaptation that differ; the authors of VQT prefix "vtab-".
OFFICIAL_NAMES: dict[str, str] = {
  "cifar(num_classes=100)": "cifar100",
  "oxford_flowers102": "flowers102",
  "oxford_iiit_pet": "pets",
  'diabetic_retinopathy(config="btgraham-300")': "retinopathy",
  'clevr(task="count_all")': "clevr_count",
  'clevr(task="closest_object_distance")': "clevr_distance",
  'kitti(task="closest_vehicle_distance")': "kitti",
  'dsprites(predicted_attribute="label_x_position",num_classes=16)': (
    "dsprites_location"
  ),
  'dsprites(predicted_attribute="label_orientation",num_classes=16)': (
    "dsprites_orientation"
  ),
  'smallnorb(predicted_attribute="label_azimuth")': "smallnorb_azimuth",
  'smallnorb(predicted_attribute="label_elevation")': "smallnorb_elevation",
}


def find_task(name: str) -> TfdsTask | None:
  """Return the task with a short or an official name, or None."""
  name = "".join(name.split()).removeprefix("vtab-").replace("'", '"')
  return VTAB.get(OFFICIAL_NAMES.get(name, name))
