"""A task: a labelled dataset with four splits and one label."""

from collections.abc import Mapping
import dataclasses
from typing import Protocol

from vqt_jax.data import labels

SPLITS = ("train", "val", "trainval", "test")


class Task(Protocol):
  """Fields of all kinds of classification tasks; see `source` for the rest.

  Attributes:
    name: for people.
    dataset: name of the dataset.
    num_classes: labels are 0..num_classes-1.
    class_names: a name for each class; empty if they have none.
    splits: "train", "val", "trainval", "test" -> what is taken, for people.
    group: "natural", "specialized" or "structured" in VTAB, else "".
  """

  name: str
  dataset: str
  num_classes: int
  class_names: tuple[str, ...]
  splits: Mapping[str, str]
  group: str


@dataclasses.dataclass(frozen=True)
class TfdsTask:
  """A classification task on a TFDS dataset.

  Attributes:
    name: as in the config.
    builder: request to TFDS, `name[/config]:version`. The version `*.*.*` is
      the newest that is prepared, or, if none is, the current one.
    num_classes: labels are 0..num_classes-1.
    splits: "train", "val", "trainval", "test" -> TFDS split strings.
    label: example -> integer scalar.
    group: "natural", "specialized" or "structured" in VTAB, else "".
    image_key: name of the image feature.
    pixel_scale: stored pixels times this are 0..255.
    sizes: numbers of examples in the whole TFDS splits, if known.
    data_dir: TFDS folder; None is TFDS's own (`~/tensorflow_datasets`, or
      `$TFDS_DATA_DIR`).
    class_names: a name for each class; empty if they have none.
  """

  name: str
  builder: str
  num_classes: int
  splits: Mapping[str, str]
  label: labels.LabelRule
  group: str = ""
  image_key: str = "image"
  pixel_scale: int = 1
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  data_dir: str | None = None
  class_names: tuple[str, ...] = ()

  @property
  def dataset(self) -> str:
    """`name[/config]` of the TFDS dataset."""
    return self.builder.partition(":")[0]
