"""Published test accuracies of other methods on the 19 tasks of VTAB-1k.

The table of visual query tuning itself is not among them. A method's numbers
differ by points between programs (see linear probing in both sources), so they
give an idea of the range and cannot be ranked against ours.
"""

from collections.abc import Iterator, Mapping
import csv
import dataclasses
from importlib import resources


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

_FILE = resources.files("vqt_jax") / "assets" / "vtab_published.csv"


def _read() -> Iterator[Row]:
  """Read the rows; accuracies in the file are in per cent, as printed there."""
  sources = {source.name: source for source in (BENCH, STUDY)}
  for row in csv.DictReader(_FILE.read_text().splitlines()):
    source, method = sources[row.pop("source")], row.pop("method")
    parameters = float(row.pop("parameters"))
    accuracy = {task: float(x) / 100 for task, x in row.items()}
    yield Row(method, parameters, accuracy, source)


ROWS = tuple(_read())

# Methods of V-PETL Bench to name beside ours, and the best one there (by the
# mean over all tasks).
FAMILIAR = ("full fine-tuning", "linear probing", "VPT-deep", "HST")


def familiar() -> list[Row]:
  """Return well-known rows of V-PETL Bench and, last, its best one."""
  rows = {row.method: row for row in ROWS if row.source is BENCH}
  return [rows[method] for method in FAMILIAR]
