"""Limits of a server, for one request and for all together."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a server; each is a flag of `vqt-jax serve`.

  Attributes:
    images: in a request.
    image_megabytes: of an encoded image.
    request_megabytes: of the body of a request.
    megapixels: of a decoded image.
    queue: images of all requests that are decoded or wait for the backbone.
    seconds: from the beginning of a request to its answer.
  """

  images: int = 16
  image_megabytes: int = 16
  request_megabytes: int = 32
  megapixels: int = 25
  queue: int = 128
  seconds: int = 30


class Overloaded(Exception):
  """The server has as much to do as it may; the request is to be repeated."""


class Budget:
  """An amount that requests share, in one thread.

  Attributes:
    total: what there is.
    used: what has been taken.
  """

  def __init__(self, total: int):
    self.total, self.used = total, 0

  @contextlib.contextmanager
  def share(self) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes an amount, all of which is given back.

    It raises `Overloaded` if not so much is left.
    """
    mine = 0

    def take(amount: int) -> None:
      nonlocal mine
      if self.used + amount > self.total:
        raise Overloaded
      self.used += amount
      mine += amount

    try:
      yield take
    finally:
      self.used -= mine
