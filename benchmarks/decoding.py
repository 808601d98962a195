"""Images a second from files in folders, against the same JPEGs in TFDS.

  python -m benchmarks.decoding [--images 400] [--sizes 500x375,2000x1500]

Reads both as a run does (`data.batches`: 224 pixels, batches of 64) and prints
the best of three passes each: wall time, and CPU time (user + system), which
is less disturbed by what else the machine does.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from vqt_jax import data

READ = {"batch_size": 64, "image_size": 224, "value_range": "-1..1"}
PASSES = 3


def make_photos(folder: pathlib.Path, count: int, size: tuple[int, int]):
  """Write JPEGs in folders of two classes; about as large as photographs'."""
  rng = np.random.default_rng(0)
  width, height = size
  for number in range(count):
    small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    image = PIL.Image.fromarray(small).resize(
      size, PIL.Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    place = folder / "ab"[number % 2] / f"{number:05d}.jpg"
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(place, quality=90)


def write_tfds(photos: pathlib.Path, data_dir: pathlib.Path) -> None:
  """Write the same files as a TFDS dataset."""
  files = sorted(photos.glob("*/*.jpg"))
  tfds.dataset_builders.store_as_tfds_dataset(
    name="photos",
    version="1.0.0",
    data_dir=data_dir,
    features=tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
      }
    ),
    split_datasets={
      "train": [(x.name, {"image": x, "label": x.parent.name}) for x in files]
    },
  )


def measure(task: data.Task) -> tuple[int, float, float]:
  """Return images, and seconds of wall and of CPU for a pass over trainval."""
  times = []
  for _ in range(PASSES):
    cpu, wall = _cpu_seconds(), time.monotonic()
    count = sum(
      int(batch["mask"].sum())
      for batch in data.batches(task, "trainval", **READ)
    )
    times.append((time.monotonic() - wall, _cpu_seconds() - cpu))
  return count, *(min(x) for x in zip(*times))


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--images", type=int, default=400)
  parser.add_argument("--sizes", default="500x375,2000x1500")
  flags = parser.parse_args()
  tfds.disable_progress_bar()
  for text in flags.sizes.split(","):
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      size = tuple(map(int, text.split("x")))
      make_photos(folder / "photos", flags.images, size)
      write_tfds(folder / "photos", folder / "tfds")
      splits = {"train": "train", "val": "train[:1]", "test": "train[:1]"}
      splits["trainval"] = "train"
      for name, task in (
        (
          "TFDS",
          data.make_task("photos", data_dir=f"{folder}/tfds", splits=splits),
        ),
        ("files", data.make_task(str(folder / "photos"))),
      ):
        count, wall, cpu = measure(task)
        print(
          f"{text} {name:5}: {count / wall:7.0f} images/s, CPU"
          f" {1000 * cpu / count:6.2f} ms an image",
          flush=True,
        )


if __name__ == "__main__":
  main()
