"""Values beyond the end of a grid at which the best setting lies."""

from collections.abc import Sequence

# Values that are added at a time, and how often learning rates, and how often
# weight decays are added.
VALUES, ROUNDS = 2, 3


def beyond(values: Sequence[float], best: float) -> tuple[float, ...]:
  """Return the next values beyond an end of a grid, nearest first.

  Each is the one before it times the factor between the last two of the grid.
  A 0 is the end of a grid that has it, and no value to step from.

  Args:
    values: the grid, in any order.
    best: one of them.

  Returns:
    `VALUES` numbers; none if `best` is inside, or the grid has no step.
  """
  steps = sorted({value for value in values if value > 0})
  if len(steps) < 2:
    return ()
  if best == steps[0] and min(values) > 0:
    factor = steps[0] / steps[1]
  elif best == steps[-1]:
    factor = steps[-1] / steps[-2]
  else:
    return ()
  return tuple(best * factor**power for power in range(1, VALUES + 1))


def most(rates: int, decays: int) -> int:
  """Return how many settings are added at most to a grid of these sizes."""
  added = VALUES * ROUNDS
  larger = (n + added if n > 1 else n for n in (rates, decays))
  return next(larger) * next(larger) - rates * decays
