"""VTAB's rules for the class of an example of a TFDS dataset.

Each rule takes the dictionary of one example and returns an integer scalar
tensor; it works eagerly and inside `tf.data.Dataset.map`. The rules are those
of the VTAB paper (https://arxiv.org/abs/1910.04867, appendix A), as implemented
in its program task_adaptation.
"""

from collections.abc import Callable
from typing import Any

from vqt_jax.data.tensorflow_lazy import tf

Example = dict[str, Any]
LabelRule = Callable[[Example], Any]

# Camera depth; the last bound is beyond every object.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
# Metres ahead of the car; the last class is "no vehicle".
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0
KITTI_NUM_VEHICLE_TYPES = 3  # Car, Van, Truck come first.


def feature(key: str) -> LabelRule:
  """Make the rule that takes the feature `key` as it is stored."""

  def rule(example: Example) -> Any:
    return example[key]

  return rule


def _last_bound_below(bounds: tuple[float, ...], value: Any) -> Any:
  """Return the last i with bounds[i] < value."""
  return tf.reduce_sum(tf.cast(tf.constant(bounds) < value, tf.int32)) - 1


def clevr_count(example: Example) -> Any:
  """Number of objects, 3..10, as 0..7."""
  return tf.size(example["objects"]["size"]) - 3


def clevr_distance(example: Example) -> Any:
  """Depth of the closest object, in six bins."""
  depths = tf.cast(example["objects"]["pixel_coords"][:, 2], tf.float32)
  return _last_bound_below(CLEVR_DISTANCES, tf.reduce_min(depths))


def kitti_vehicle(example: Example) -> Any:
  """Closest car, van or truck: 0 to 8 m, 1 to 20 m, 2 farther, 3 none."""
  objects = example["objects"]
  vehicle = objects["type"] < KITTI_NUM_VEHICLE_TYPES
  metres = tf.boolean_mask(objects["location"][:, 2], vehicle)
  metres = tf.concat([tf.cast(metres, tf.float32), [KITTI_NO_VEHICLE]], 0)
  return _last_bound_below(KITTI_DISTANCES, tf.reduce_min(metres))


def dsprites_x(example: Example) -> Any:
  """32 horizontal positions, in 16 pairs."""
  return example["label_x_position"] // 2


def dsprites_o(example: Example) -> Any:
  """40 orientations in 16 bins of 2.5: three, two, three, two, ..."""
  return 2 * example["label_orientation"] // 5
