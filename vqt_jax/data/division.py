"""Division of labelled images into train, val and test.

Class by class, at random, and such that images with the same bytes stay
together. Nothing depends on the machine, or on the order of the images; an
image that is added or taken away moves few others.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import hashlib

import numpy as np

from vqt_jax import errors

_MOST_NAMED = 10


def random_keys(names: Sequence[str], seed: int) -> list[str]:
  """Return a key for each name; in the order of keys, names are shuffled."""
  return [
    hashlib.sha256(
      f"{seed}/{name}".encode(errors="surrogateescape")
    ).hexdigest()
    for name in names
  ]


def divide(
  labels: Sequence[int],
  keys: Sequence[str],
  groups: Sequence[int],
  shares: Mapping[str, float],
  class_names: Sequence[str],
) -> list[str]:
  """Divide images among splits.

  Args:
    labels: (n,) class of each image.
    keys: (n,) from `random_keys`.
    groups: (n,) equal for images with the same bytes.
    shares: split -> share of every class; the first split takes what is left
      by rounding. Each gets at least one image of every class.
    class_names: for messages.

  Returns:
    The split of each image.

  Raises:
    UserError: a class has fewer different images than there are splits.
  """
  different = collections.Counter(
    label for label, _ in sorted(set(zip(labels, groups)))
  )
  few = {label: n for label, n in different.items() if n < len(shares)}
  if few:
    raise _too_few(few, shares, class_names)
  room = {
    label: _sizes(int(count), shares)
    for label, count in zip(*np.unique(labels, return_counts=True))
  }
  members: dict[int, list[int]] = {}
  for i in sorted(range(len(labels)), key=lambda i: keys[i]):
    members.setdefault(groups[i], []).append(i)
  # Large groups first, while there is room for them anywhere.
  ordered = sorted(members.values(), key=len, reverse=True)
  left = {label: 0 for label in room}  # Groups to come.
  for group in ordered:
    left[labels[group[0]]] += 1
  empty = {label: list(shares) for label in room}
  found = [""] * len(labels)
  for group in ordered:
    label = labels[group[0]]
    open_splits = list(shares)
    if left[label] <= len(empty[label]):
      open_splits = empty[label]
    split = max(open_splits, key=room[label].get)
    left[label] -= 1
    for i in group:
      found[i] = split
      room[labels[i]][split] -= 1
      if split in empty[labels[i]]:
        empty[labels[i]].remove(split)
  # Where classes have images in common, they may not suffice for each.
  if few := {label: different[label] for label in empty if empty[label]}:
    raise _too_few(few, shares, class_names)
  return found


def _sizes(count: int, shares: Mapping[str, float]) -> dict[str, int]:
  """Numbers of `count` images of a class that are for each split."""
  first, *others = shares
  sizes = {}
  for i, split in enumerate(others):
    most = count - sum(sizes.values()) - (len(others) - i)
    sizes[split] = min(max(1, round(count * shares[split])), most)
  return {first: count - sum(sizes.values()), **sizes}


def _too_few(
  counts: Mapping[int, int], shares: Iterable[str], class_names: Sequence[str]
) -> errors.UserError:
  """Make the error for classes with so many different images."""
  listed = [f"{class_names[label]} has {n}" for label, n in counts.items()]
  more = len(listed) - _MOST_NAMED
  more = f" and {more} more" if more > 0 else ""
  parts = list(shares)
  return errors.UserError(
    f"Too few images in {len(counts)} of {len(class_names)} classes: each needs"
    f" {len(parts)} different ones or more, to be divided into"
    f" {', '.join(parts)}, but {', '.join(listed[:_MOST_NAMED])}{more}. Add"
    " images, or take such classes away."
  )
