"""The exception for bad input, and suggestions for misspelt names."""

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


def printable(text: str) -> str:
  """Write control codes as escapes: in names of files they rule a terminal."""
  show = lambda c: c if c.isprintable() or c == "\n" else ascii(c)[1:-1]
  return "".join(map(show, text))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
  """Make the error for a name that is none of the known ones.

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


def check_keywords(function: F) -> F:
  """Decorate a function to raise a `UserError` for unknown keywords."""
  known = list(inspect.signature(function).parameters)

  @functools.wraps(function)
  def checked(*args, **kwargs):
    for name in kwargs:
      if name not in known:
        raise unknown_name(f"argument of {function.__name__}", name, known)
    return function(*args, **kwargs)

  return checked
