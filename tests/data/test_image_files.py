"""Tasks on folders and tables: division, reading, faults, fingerprints."""

import collections
import os
import shutil

import numpy as np
import PIL.Image
import pytest

from vqt_jax import data
from vqt_jax import errors
from vqt_jax.data import decoding
from vqt_jax.data import division
from vqt_jax.data import image_files

READ = {"image_size": (4, 6), "value_range": "0..1"}
SHARES = image_files.SHARES


def write(path, shade: int, size=(12, 8)) -> None:
  """Write a grey image, of which no two shades have the same bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new("L", size, shade).save(path)


@pytest.fixture
def photos(tmp_path):
  """Ten images of each of two classes; the shade is the class and number."""
  for i in range(10):
    write(tmp_path / "photos" / "a" / f"{i}.png", i)
    write(tmp_path / "photos" / "b" / f"{i}.png", 100 + i)
  return tmp_path / "photos"


def shades(batch) -> list[int]:
  """Shades of the images of a batch, padding left out."""
  pixels = np.rint(batch["image"] * 255).astype(int)
  assert (pixels == pixels[:, :1, :1, :1]).all()
  real = batch.get("mask", np.ones(len(pixels))) > 0
  found = pixels[real, 0, 0, 0]
  assert (batch["label"][real] == found // 100).all()
  return found.tolist()


def names(task, split):
  return [image.name for image in task.of(split)]


# Division.


@pytest.mark.parametrize(
  "count, shares, expected",
  [
    (100, SHARES, (60, 20, 20)),
    (10, SHARES, (6, 2, 2)),
    (5, SHARES, (3, 1, 1)),
    (4, SHARES, (2, 1, 1)),
    (3, SHARES, (1, 1, 1)),
    (4, {"train": 0.1, "val": 0.8, "test": 0.1}, (1, 2, 1)),
    (8, {"train": 0.75, "val": 0.25}, (6, 2)),
  ],
)
def test_every_class_is_divided_by_the_shares(count, shares, expected):
  labels = [0] * count + [1] * (2 * count)
  keys = division.random_keys(list(map(str, range(3 * count))), 0)
  found = division.divide(labels, keys, range(3 * count), shares, "ab")
  sizes = collections.Counter(zip(labels, found))
  assert tuple(sizes[0, split] for split in shares) == expected
  assert sum(sizes[1, split] for split in shares) == 2 * count
  assert all(sizes[1, split] for split in shares)


def test_a_division_depends_on_names_and_seed_only():
  files = [f"{i}.jpg" for i in range(30)]

  def divided(order, seed):
    keys = division.random_keys(order, seed)
    found = division.divide([0] * len(order), keys, range(30), SHARES, "a")
    return dict(zip(order, found))

  first = divided(files, 0)
  assert divided(files[::-1], 0) == first
  assert divided(files, 1) != first
  fewer = divided(files[1:], 0)
  assert sum(fewer[x] != first[x] for x in fewer) <= 3
  assert files != sorted(files, key=lambda x: division.random_keys([x], 0))


@pytest.mark.parametrize("sizes", [(4, 4, 2), (8, 1, 1), (3, 3, 4), (2,) * 5])
def test_images_with_the_same_bytes_stay_together(sizes):
  groups = [i for i, size in enumerate(sizes) for _ in range(size)]
  for seed in range(10):
    keys = division.random_keys([str(i) for i in range(10)], seed)
    found = division.divide([0] * 10, keys, groups, SHARES, "a")
    assert set(found) == set(SHARES)
    by_group = {(group, split) for group, split in zip(groups, found)}
    assert len(by_group) == len(sizes)


def test_too_few_images_are_told_with_their_numbers():
  labels, groups = [0, 0, 1, 2, 2, 2], [0, 1, 2, 3, 3, 4]
  with pytest.raises(
    errors.UserError,
    match="in 3 of 3 classes: each needs 3 different ones or more, to be"
    " divided into train, val, test, but a has 2, b has 1, c has 2. Add",
  ):
    division.divide(labels, list("abcdef"), groups, SHARES, "abc")
  # All of b are copies of images of a: each class alone would have enough.
  labels, groups = [0] * 3 + [1] * 3, [0, 1, 2] * 2
  keys = division.random_keys(list("abcdef"), 0)
  found = division.divide(labels, keys, groups, SHARES, "ab")
  assert found[:3] == found[3:] and set(found) == set(SHARES)


# Tasks.


def test_a_folder_is_a_task(photos):
  task = data.make_task(str(photos))
  assert (task.name, task.num_classes) == ("photos", 2)
  assert task.class_names == ("a", "b") and task.group == ""
  sizes = {split: data.num_examples(task, split) for split in data.SPLITS}
  assert sizes == {"train": 12, "val": 4, "trainval": 16, "test": 4}
  assert {k: v.tolist() for k, v in task.counts().items()} == {
    "train": [6, 6],
    "val": [2, 2],
    "test": [2, 2],
  }
  assert data.is_concatenation(task, ("train", "val"), "trainval")
  assert not data.is_concatenation(task, ("val", "train"), "trainval")
  together = names(task, "trainval") + names(task, "test")
  assert len(set(together)) == 20
  assert names(task, "trainval") == names(task, "train") + names(task, "val")
  data.check_prepared(task)
  assert not data.notes(task)
  # Folds of cross-validation are blocks of rows, so classes must be mixed.
  labels = data.load_labels(task, "train")
  assert labels.tolist() not in (sorted(labels), sorted(labels)[::-1])


def test_shares_and_seed_of_the_division(photos):
  task = data.make_task(str(photos), splits={"test": "50%", "val": "10 %"})
  counts = {split: sum(x) for split, x in task.counts().items()}
  assert counts == {"train": 8, "val": 2, "test": 10}
  again = data.make_task(str(photos), split_seed=1)
  first = data.make_task(str(photos))
  assert set(names(again, "test")) != set(names(first, "test"))
  for splits in ({"test": "0%"}, {"val": "80%"}, {"train": "5%"}):
    with pytest.raises(errors.UserError, match="are not all above 0 and 100 %"):
      data.make_task(str(photos), splits=splits)


def test_only_splits_that_are_not_given_are_divided(photos):
  (photos / "test" / "a").mkdir(parents=True)
  for i in range(2):
    shutil.move(photos / "a" / f"{i}.png", photos / "test" / "a")
  for name in "ab":
    shutil.move(photos / name, photos / "train" / name)
  task = data.make_task(str(photos))
  assert set(names(task, "test")) == {"test/a/0.png", "test/a/1.png"}
  assert [x.tolist() for x in task.counts().values()] == [
    [6, 8],
    [2, 2],
    [2, 0],
  ]
  assert task.divided == ("val",)
  shutil.move(photos / "train", photos / "val")
  with pytest.raises(errors.UserError, match="test and val, but none to train"):
    data.make_task(str(photos))


def test_a_class_may_be_too_small(photos):
  write(photos / "rare" / "1.png", 200)
  with pytest.raises(errors.UserError, match="1 of 3 classes: .*rare has 1"):
    data.make_task(str(photos))
  shutil.rmtree(photos / "rare")
  shutil.rmtree(photos / "b")
  with pytest.raises(errors.UserError, match="of one class, 'a': there is not"):
    data.make_task(str(photos))


def test_numbers_are_names_of_classes_in_their_order(tmp_path):
  for label in (10, 9, 2):
    for i in range(3):
      write(tmp_path / "photos" / str(label) / f"{i}.png", 10 * label + i)
  assert data.make_task(str(tmp_path / "photos")).class_names == (
    *("2", "9", "10"),
  )


def test_copies_are_on_one_side_and_told(photos):
  for i in range(5):
    shutil.copy(photos / "a" / "3.png", photos / "a" / f"copy {i}.png")
  shutil.copy(photos / "a" / "4.png", photos / "b" / "wrong.png")
  task = data.make_task(str(photos))
  splits = {x.name: s for s in task.images for x in task.of(s)}
  assert len({splits[f"a/copy {i}.png"] for i in range(5)}) == 1
  assert splits["a/copy 0.png"] == splits["a/3.png"]
  assert splits["b/wrong.png"] == splits["a/4.png"]
  (note,) = data.notes(task)
  assert note.startswith("6 of 26 images are copies of others (a/")
  assert "1 are in more than one class (a/4.png = b/wrong.png)" in note
  assert "split" not in note


def test_copies_in_given_splits_are_told(tmp_path):
  for split in ("train", "val", "test"):
    for name, shade in (("a", 1), ("b", 2)):
      write(tmp_path / "photos" / split / name / "1.png", shade)
  (note,) = data.notes(data.make_task(str(tmp_path / "photos")))
  assert "2 are in more than one split" in note


# Reading.


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_rows_of_every_batch(photos, processes):
  task = data.make_task(str(photos))
  expected = [int(x[2]) + 100 * (x[0] == "b") for x in names(task, "trainval")]
  parts = [
    list(
      data.batches(
        task,
        "trainval",
        batch_size=8,
        start=3,
        process_index=i,
        process_count=processes,
        **READ,
      )
    )
    for i in range(processes)
  ]
  assert all(len(part) == 2 for part in parts)
  found = [x for batch in zip(*parts) for part in batch for x in shades(part)]
  assert found == expected[3:]
  batch = parts[0][0]
  assert batch["image"].shape == (8 // processes, 4, 6, 3)
  assert batch["image"].dtype == np.float32
  whole = data.load_arrays(task, "trainval", **READ)
  assert shades(whole) == expected
  assert (data.load_labels(task, "trainval") == whole["label"]).all()


def test_picked_images_are_those_at_their_positions(photos):
  task = data.make_task(str(photos))
  some = data.pick(task, "test", [3, 0])
  every = [
    (data.example_names(each, "test"), data.load_arrays(each, "test", **READ))
    for each in (task, some)
  ]
  (names, whole), (picked, images) = every
  assert picked == [names[3], names[0]]
  assert shades(images) == [shades(whole)[i] for i in (3, 0)]


def test_training_order_depends_on_seed_and_epoch_only(photos):
  task = data.make_task(str(photos))

  def epoch(**changes):
    settings = dict(batch_size=4, epoch=0, seed=0) | changes
    batches = data.train_batches(task, "train", **settings, **READ)
    return [shades(batch) for batch in batches]

  first = epoch()
  assert sorted(sum(first, [])) == sorted(
    shades(data.load_arrays(task, "train", **READ))
  )
  assert epoch() == first and epoch(start_step=1) == first[1:]
  halves = [epoch(process_index=i, process_count=2) for i in range(2)]
  assert [a + b for a, b in zip(*halves)] == first
  assert epoch(epoch=1) != first and epoch(seed=1) != first


def test_images_are_read_as_prediction_reads_them(photos):
  rng = np.random.default_rng(0)
  for name in "ab":
    for i in range(3):
      noise = rng.integers(0, 256, (40, 80, 3), np.uint8)
      PIL.Image.fromarray(noise).save(photos / name / f"new{i}.jpg")
  for fit in decoding.FITS:
    task = data.make_task(str(photos), fit=fit)
    batch = data.load_arrays(task, "test", image_size=8, value_range="imagenet")
    expected = [
      decoding.scale(decoding.read(x.file, (8, 8), fit), "imagenet")
      for x in task.of("test")
    ]
    np.testing.assert_array_equal(batch["image"], expected)
  with pytest.raises(errors.UserError, match="Unknown fit 'stretch'"):
    data.make_task(str(photos), fit="stretch")
  with pytest.raises(
    errors.UserError, match="resize=legacy is for datasets of"
  ):
    data.batches(task, "test", batch_size=2, resize="legacy", **READ)


def test_a_reader_may_stop_early(photos):
  task = data.make_task(str(photos))
  batches = data.batches(task, "train", batch_size=2, **READ)
  assert len(shades(next(batches))) == 2
  batches.close()


# Faults.


def test_all_faults_are_found_at_once(photos):
  (photos / "a" / "1.png").write_bytes(b"")
  (photos / "a" / "2.png").write_bytes(b"no image")
  os.unlink(photos / "b" / "3.png")
  os.mkfifo(photos / "b" / "3.png")
  task, seen = data.make_task(str(photos)), []
  faults = data.find_faults(task, lambda *done: seen.append(done))
  assert list(faults) == ["a/1.png", "a/2.png", "b/3.png"]
  assert "empty" in faults["a/1.png"] and "pipe" in faults["b/3.png"]
  assert seen[-1] == (20, 20)
  with pytest.raises(errors.UserError, match="a/1.png|a/2.png|b/3.png"):
    for split in data.SPLITS:
      data.load_arrays(task, split, **READ)
  without = data.leave_out(task, faults)
  assert sum(map(sum, without.counts().values())) == 17
  for split in ("train", "val", "test"):
    kept = [name for name in names(task, split) if name not in faults]
    assert names(without, split) == kept
    data.load_arrays(without, split, **READ)
  everything = {x.name: "gone" for s in task.images for x in task.of(s)}
  with pytest.raises(
    errors.UserError, match="None of the 20 images .* a/0.png"
  ):
    data.leave_out(task, everything)
  with pytest.raises(errors.UserError, match="No image in .* is for test"):
    data.leave_out(task, dict.fromkeys(names(task, "test"), "gone"))
  write(photos / "a" / "1.png", 1)  # Mended.
  assert list(data.find_faults(task)) == ["a/2.png", "b/3.png"]


def test_a_table_with_a_missing_file_is_read_without_it(photos):
  table = photos.parent / "table.csv"
  rows = [f"photos/{x}/{i}.png,{x}" for x in "ab" for i in range(11)]
  table.write_text("\n".join(["path,label", *rows]))
  task = data.make_task(str(table))
  assert task.name == "table"
  assert data.find_faults(task) == dict.fromkeys(
    ["photos/a/10.png", "photos/b/10.png"], "there is no such file"
  )


# Fingerprints.


def test_an_identity_is_that_of_every_copy(photos, tmp_path):
  found = data.dataset_identity(data.make_task(str(photos)))
  assert found["dataset"] == "photos" and found["num_classes"] == 2
  assert found["splits"]["trainval"] == {"slices": "train+val", "images": 16}
  copy = shutil.copytree(photos, tmp_path / "copy" / "photos")
  assert data.dataset_identity(data.make_task(str(copy))) == found
  os.rename(copy / "a" / "1.png", copy / "b" / "new.png")
  moved = data.dataset_identity(data.make_task(str(copy)))
  assert moved["sha256"] != found["sha256"]
  other = data.dataset_identity(data.make_task(str(photos), split_seed=1))
  assert other["sha256"] != found["sha256"]


def test_a_fingerprint_is_that_of_images_not_labels(photos):
  task = data.make_task(str(photos))
  found = data.images_fingerprint(task, "train")
  assert data.images_fingerprint(task, "train") == found
  assert data.images_fingerprint(task, "val") != found
  fitted = data.make_task(str(photos), fit="crop")
  assert data.images_fingerprint(fitted, "train") != found
  os.utime(task.of("train")[0].file, (1, 1))
  assert data.images_fingerprint(task, "train") != found
