"""Published test accuracies of other methods on the 19 tasks of VTAB-1k.

The table of visual query tuning itself is not among them. A method's numbers
differ by points between programs (see linear probing in both sources), so they
give an idea of the range and cannot be ranked against ours.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
  """A publication, and how its numbers were obtained."""

  name: str
  address: str
  backbone: str
  protocol: str


@dataclasses.dataclass(frozen=True)
class Row:
  """A method in a source.

  Attributes:
    method: its name there.
    parameters: number of trained parameters, without the head.
    accuracy: task -> test accuracy, 0..1.
    source: of the numbers.
  """

  method: str
  parameters: float
  accuracy: Mapping[str, float]
  source: Source


_BACKBONE = "ViT-B/16, ImageNet-21k"

BENCH = Source(
  name="V-PETL Bench",
  address=(
    "github.com/synbol/Parameter-Efficient-Transfer-Learning-Benchmark,"
    " README at c188fad"
  ),
  backbone=_BACKBONE,
  protocol=(
    "1,000 training images; several rows look taken over from the methods'"
    " own papers, so they may differ in search and preprocessing"
  ),
)
STUDY = Source(
  name="OSU unifying study",
  address=(
    "github.com/OSU-MLB/ViT_PEFT_Vision, tune_output/default_vtab at cea7e21"
  ),
  backbone=_BACKBONE,
  protocol=(
    "1,000 training images; one program, every method tuned alike: AdamW,"
    " batch 64, drop path 0.1, bicubic resize"
  ),
)

# The sources' order of tasks, which differs from VTAB's table.
ORDER = (
  "cifar100",
  "caltech101",
  "dtd",
  "flowers102",
  "pets",
  "svhn",
  "sun397",
  "patch_camelyon",
  "eurosat",
  "resisc45",
  "retinopathy",
  "clevr_count",
  "clevr_distance",
  "dmlab",
  "kitti",
  "dsprites_location",
  "dsprites_orientation",
  "smallnorb_azimuth",
  "smallnorb_elevation",
)

# Method, trained parameters, accuracies in per cent as printed there.

_BENCH = """
full fine-tuning | 85.8e6 | 68.9 87.7 64.3 97.2 86.9 87.4 38.8 / 79.7 95.7 84.2 73.9 / 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1
linear probing   |      0 | 63.4 85.0 63.2 97.0 86.3 36.6 51.0 / 78.5 87.5 68.6 74.0 / 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2
BitFit           | 0.10e6 | 72.8 87.0 59.2 97.5 85.3 59.9 51.4 / 78.7 91.6 72.9 69.8 / 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1
VPT-shallow      | 0.08e6 | 77.7 86.9 62.6 97.5 87.3 74.5 51.2 / 78.2 92.0 75.6 72.9 / 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1
VPT-deep         | 0.56e6 | 78.8 90.8 65.8 98.0 88.3 78.1 49.6 / 81.8 96.1 83.4 68.4 / 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8
Adapter          | 0.16e6 | 69.2 90.1 68.0 98.8 89.9 82.8 54.3 / 84.0 94.9 81.9 75.5 / 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6
LoRA             | 0.29e6 | 67.1 91.4 69.4 98.8 90.4 85.3 54.0 / 84.9 95.3 84.4 73.6 / 82.9 69.2 49.8 78.5 75.7 47.1 31.0 44.0
AdaptFormer      | 0.16e6 | 70.8 91.2 70.5 99.1 90.9 86.6 54.8 / 83.0 95.8 84.4 76.3 / 81.9 64.3 49.3 80.3 76.3 45.7 31.7 41.1
SSF              | 0.21e6 | 69.0 92.6 75.1 99.4 91.8 90.2 52.9 / 87.4 95.9 87.4 75.5 / 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9
FacT             | 0.07e6 | 70.6 90.6 70.8 99.1 90.7 88.6 54.1 / 84.8 96.2 84.5 75.7 / 82.6 68.2 49.8 80.7 80.8 47.4 33.2 43.0
NOAH             | 0.43e6 | 69.6 92.7 70.2 99.1 90.4 86.1 53.7 / 84.4 95.4 83.9 75.8 / 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2
RepAdapter       | 0.22e6 | 72.4 91.6 71.0 99.2 91.4 90.7 55.1 / 85.3 95.9 84.6 75.9 / 82.3 68.0 50.4 79.9 80.4 49.2 38.6 41.0
GPS              | 0.22e6 | 81.1 94.2 75.8 99.4 91.7 91.6 52.4 / 87.9 96.2 86.5 76.5 / 79.9 62.6 55.0 82.4 84.0 55.4 29.7 46.1
LST              | 2.38e6 | 59.5 91.5 69.0 99.2 89.9 79.5 54.6 / 86.9 95.9 85.3 74.1 / 81.8 61.8 52.2 81.0 71.7 49.5 33.7 45.2
LAST             | 0.66e6 | 66.7 93.4 76.1 99.6 89.8 86.1 54.3 / 86.2 96.3 86.8 75.4 / 81.9 65.9 49.4 82.6 87.9 46.7 32.3 51.5
DTL              | 0.04e6 | 69.6 94.8 71.3 99.3 91.3 83.3 56.2 / 87.1 96.2 86.1 75.0 / 82.8 64.2 48.8 81.9 93.9 53.9 34.2 47.1
HST              | 0.78e6 | 76.7 94.1 74.8 99.6 91.1 91.2 52.3 / 87.1 96.3 88.6 76.5 / 85.4 63.7 52.9 81.7 87.2 56.8 35.8 52.1
"""  # noqa: E501

_STUDY = """
full fine-tuning | 85.8e6 | 37.86 77.15 48.24 77.05 58.63 88.81 30.14 / 80.85 88.04 70.97 73.6 / 35.92 59.25 44.72 71.17 68.42 45.25 30.6 24.64
linear probing   |      0 | 48.69 86.52 65.69 98.83 88.88 41.05 52.89 / 82.94 89.96 74.83 74.42 / 37.29 35.03 35.81 62.45 16.18 29.27 17.09 23.47
"""  # noqa: E501


def _rows(source: Source, text: str) -> list[Row]:
  rows = []
  for line in text.strip().splitlines():
    method, parameters, numbers = (part.strip() for part in line.split("|"))
    values = [float(x) / 100 for x in numbers.replace("/", " ").split()]
    accuracy = dict(zip(ORDER, values, strict=True))
    rows.append(Row(method, float(parameters), accuracy, source))
  return rows


ROWS = (*_rows(BENCH, _BENCH), *_rows(STUDY, _STUDY))

# Methods of V-PETL Bench to name beside ours, and the best one there (by the
# mean over all tasks).
FAMILIAR = ("full fine-tuning", "linear probing", "VPT-deep", "HST")


def familiar() -> list[Row]:
  """Return well-known rows of V-PETL Bench and, last, its best one."""
  rows = {row.method: row for row in ROWS if row.source is BENCH}
  return [rows[method] for method in FAMILIAR]
