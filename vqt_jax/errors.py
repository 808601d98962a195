"""The one exception that is the user's to mend, and names near a wrong one."""

from collections.abc import Callable, Iterable
import difflib
import functools
import inspect
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MOST_LISTED = 20  # names in a message


class UserError(ValueError):
  """Bad input. The message says what was expected, found, and what to do.

  `main.py` prints it without a traceback and exits with status 2.
  """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
  """An error for a name that is none of the known ones.

  Args:
    kind: what the name should have been, e.g. "method".
    name: what was given.
    known: the valid names; all are listed if they are few.

  Returns:
    The error, to be raised, with the nearest valid names in its message.
  """
  known = list(known)
  folded = {k.lower(): k for k in known}
  matches = functools.partial(
    difflib.get_close_matches, name.lower(), folded, 3
  )
  near = matches(0.6)
  if not near and len(known) > MOST_LISTED:
    near = matches(0.0)
  message = f"Unknown {kind} {name!r}."
  if near:
    message += f" Did you mean {' or '.join(folded[n] for n in near)}?"
  if not known:
    message += " There are none."
  elif len(known) <= MOST_LISTED:
    message += f" Known: {', '.join(known)}."
  return UserError(message)


def names_checked(function: F) -> F:
  """Decorates a function: a keyword that it lacks is a `UserError`."""
  known = list(inspect.signature(function).parameters)

  @functools.wraps(function)
  def checked(*args, **kwargs):
    for name in kwargs:
      if name not in known:
        raise unknown(f"argument of {function.__name__}", name, known)
    return function(*args, **kwargs)

  return checked
