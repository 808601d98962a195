"""The 19 tasks of VTAB-1k, as one table.

VTAB (https://arxiv.org/abs/1910.04867) trains on 1,000 examples of each of 19
datasets: the first 800 of its train split and the first 200 of its validation
split, in the order in which TFDS stores them, and tests on the whole test
split. Where a dataset has no split of its own for one of the three, VTAB cuts
it out of another one (first 90 % of train, 60/20/20 %, ...), which gives the
odd slices below.
"""

from vqt_jax.data import labels
from vqt_jax.data.task import Task

_TRAIN = "train[:800]"
_LABEL = labels.feature("label")


def _task(
  name: str,
  group: str,
  dataset: str,
  num_classes: int,
  sizes: dict[str, int],
  val: str,
  test: str = "test",
  label: labels.LabelRule = _LABEL,
  pixel_scale: int = 1,
) -> Task:
  return Task(
    name=name,
    group=group,
    builder=f"{dataset}:*.*.*",
    num_classes=num_classes,
    sizes=sizes,
    splits={
      "train": _TRAIN,
      "val": val,
      "trainval": f"{_TRAIN}+{val}",
      "test": test,
    },
    label=label,
    pixel_scale=pixel_scale,
  )


_CLEVR = {"train": 70000, "validation": 15000, "test": 15000}
_DSPRITES = {"train": 737280}
_SMALLNORB = {"train": 24300, "test": 24300}


_ROWS = (
  _task(
    "caltech101",
    "natural",
    "caltech101",
    102,
    {"train": 3060, "test": 6084},
    val="train[2754:2954]",
  ),
  _task(
    "cifar100",
    "natural",
    "cifar100",
    100,
    {"train": 50000, "test": 10000},
    val="train[45000:45200]",
  ),
  _task(
    "dtd",
    "natural",
    "dtd",
    47,  # The first of its ten folds.
    {"train": 1880, "validation": 1880, "test": 1880},
    val="validation[:200]",
  ),
  _task(
    "flowers102",
    "natural",
    "oxford_flowers102",
    102,
    {"train": 1020, "validation": 1020, "test": 6149},
    val="validation[:200]",
  ),
  _task(
    "pets",
    "natural",
    "oxford_iiit_pet",
    37,
    {"train": 3680, "test": 3669},
    val="train[2944:3144]",
  ),
  _task(
    "svhn",
    "natural",
    "svhn_cropped",
    10,
    {"train": 73257, "test": 26032, "extra": 531131},
    val="train[65931:66131]",
  ),
  _task(
    "sun397",
    "natural",
    "sun397/tfds",
    397,
    {"train": 76128, "validation": 10875, "test": 21750},
    val="validation[:200]",
  ),
  _task(
    "patch_camelyon",
    "specialized",
    "patch_camelyon",
    2,
    {"train": 262144, "validation": 32768, "test": 32768},
    val="validation[:200]",
  ),
  _task(
    "eurosat",
    "specialized",
    "eurosat/rgb",
    10,
    {"train": 27000},
    val="train[16200:16400]",
    test="train[21600:]",
  ),
  _task(
    "resisc45",
    "specialized",
    "resisc45",
    45,
    {"train": 31500},
    val="train[18900:19100]",
    test="train[25200:]",
  ),
  _task(
    "retinopathy",
    "specialized",
    "diabetic_retinopathy_detection/btgraham-300",
    5,
    {"sample": 10, "train": 35126, "validation": 10906, "test": 42670},
    val="validation[:200]",
  ),
  # CLEVR's own test split has no objects.
  _task(
    "clevr_count",
    "structured",
    "clevr",
    8,
    _CLEVR,
    val="train[63000:63200]",
    test="validation",
    label=labels.clevr_count,
  ),
  _task(
    "clevr_distance",
    "structured",
    "clevr",
    6,
    _CLEVR,
    val="train[63000:63200]",
    test="validation",
    label=labels.clevr_distance,
  ),
  _task(
    "dmlab",
    "structured",
    "dmlab",
    6,
    {"train": 65550, "validation": 22628, "test": 22735},
    val="validation[:200]",
  ),
  _task(
    "kitti",
    "structured",
    "kitti",
    4,
    {"train": 6347, "validation": 423, "test": 711},
    val="validation[:200]",
    label=labels.kitti_vehicle,
  ),
  # dSprites stores pixels 0 and 1.
  _task(
    "dsprites_location",
    "structured",
    "dsprites",
    16,
    _DSPRITES,
    val="train[589824:590024]",
    test="train[663552:]",
    label=labels.dsprites_x,
    pixel_scale=255,
  ),
  _task(
    "dsprites_orientation",
    "structured",
    "dsprites",
    16,
    _DSPRITES,
    val="train[589824:590024]",
    test="train[663552:]",
    label=labels.dsprites_o,
    pixel_scale=255,
  ),
  # TFDS has halved the azimuth already.
  _task(
    "smallnorb_azimuth",
    "structured",
    "smallnorb",
    18,
    _SMALLNORB,
    val="test[:200]",
    test="test[50%:]",
    label=labels.feature("label_azimuth"),
  ),
  _task(
    "smallnorb_elevation",
    "structured",
    "smallnorb",
    9,
    _SMALLNORB,
    val="test[:200]",
    test="test[50%:]",
    label=labels.feature("label_elevation"),
  ),
)


VTAB: dict[str, Task] = {task.name: task for task in _ROWS}
GROUPS = ("natural", "specialized", "structured")
ALL = "all"  # Instead of a name: every task of the table.

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

# Names in task_adaptation; the authors of VQT put "vtab-" in front.
OFFICIAL_NAMES: dict[str, str] = {
  "caltech101": "caltech101",
  "cifar(num_classes=100)": "cifar100",
  "dtd": "dtd",
  "oxford_flowers102": "flowers102",
  "oxford_iiit_pet": "pets",
  "svhn": "svhn",
  "sun397": "sun397",
  "patch_camelyon": "patch_camelyon",
  "eurosat": "eurosat",
  "resisc45": "resisc45",
  'diabetic_retinopathy(config="btgraham-300")': "retinopathy",
  'clevr(task="count_all")': "clevr_count",
  'clevr(task="closest_object_distance")': "clevr_distance",
  "dmlab": "dmlab",
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


def find_task(name: str) -> Task | None:
  """The task of that short or official name, or None."""
  name = "".join(name.split()).removeprefix("vtab-").replace("'", '"')
  return VTAB.get(OFFICIAL_NAMES.get(name, name))
