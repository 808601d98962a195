"""Trials: one setting and one seed each."""

import dataclasses

SEARCH_SEED = 100  # The seed of all trials of a search, as the authors'.


@dataclasses.dataclass(frozen=True)
class Trial:
  """A setting and a seed.

  Attributes:
    lr: peak learning rate, scaled to the batch size.
    weight_decay: coefficient of the weight decay.
    seed: of initialisation and dropout.
    query_dropout: dropout rate of the queries.
    normalize: whether feature groups are divided by their norms.
  """

  lr: float
  weight_decay: float
  seed: int
  query_dropout: float = 0.0
  normalize: bool = True

  def describe(self, batch_size: int) -> str:
    """Describe the setting; the rate is per 256 images, as in config.lr."""
    rate = f"lr {self.lr * 256 / batch_size:g}"
    if batch_size != 256:
      rate += f" (x {batch_size}/256 = {self.lr:g})"
    return f"{rate}, weight decay {self.weight_decay:g}"


def best_trial(
  trials: tuple[Trial, ...], accuracy: list[float], diverged: set[int]
) -> int:
  """Return the index of the trial that is most accurate on val.

  On a tie the smaller learning rate wins, then the smaller weight decay. Trials
  that diverged are left out.
  """
  able = [i for i in range(len(trials)) if i not in diverged]
  return min(
    able, key=lambda i: (-accuracy[i], trials[i].lr, trials[i].weight_decay)
  )
