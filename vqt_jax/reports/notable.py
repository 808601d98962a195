"""The answers of an evaluation that tell most about a model."""

import dataclasses
import heapq
from typing import Any

COUNT = 6  # Of each kind.


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to a labelled image.

  Attributes:
    name: of the image.
    true: number of its class.
    predicted: number of the most probable class.
    confidence: its probability.
    image: the image, or where it is.
  """

  name: str
  true: int
  predicted: int
  confidence: float
  image: Any


class Notable:
  """The most confident mistakes, and the least certain hits.

  Answers come one by one; `COUNT` of each kind are kept.
  """

  def __init__(self):
    """Keep nothing yet."""
    self._mistakes, self._hits, self._seen = [], [], 0

  def add(self, answer: Answer) -> None:
    """Keep an answer if it is among the most notable ones so far.

    Of equal ones the first stays.
    """
    hit = answer.predicted == answer.true
    kept = self._hits if hit else self._mistakes
    rank = -answer.confidence if hit else answer.confidence
    heapq.heappush(kept, (rank, -self._seen, answer))
    if len(kept) > COUNT:
      heapq.heappop(kept)
    self._seen += 1

  @property
  def mistakes(self) -> list[Answer]:
    """Mistakes, the most confident one first."""
    return [answer for *_, answer in sorted(self._mistakes, reverse=True)]

  @property
  def hits(self) -> list[Answer]:
    """Right answers, the least certain one first."""
    return [answer for *_, answer in sorted(self._hits, reverse=True)]
