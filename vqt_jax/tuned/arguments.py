"""Command lines of tuned models and images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import glob
import os
import pathlib
import sys

from absl import flags
from etils import epy

from vqt_jax import errors
from vqt_jax.data import listing
from vqt_jax.runtime import devices
from vqt_jax.runtime import logfile

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  from vqt_jax.runtime import compiled
  from vqt_jax.runtime import numerics
  from vqt_jax.tuned import bundle


def run(
  argv: Sequence[str],
  values: flags.FlagValues,
  doc: str,
  command: Callable[[list[str]], int],
  interrupted: str,
) -> int:
  """Parse a command line and run its command; return the exit status.

  Args:
    argv: the program's name, flags and arguments.
    values: the command's flags, which are set.
    doc: what --help prints.
    command: from the arguments that are no flags to the exit status.
    interrupted: what to say after Ctrl-C.
  """
  logfile.reopen_closed_streams()
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  try:
    arguments = values(list(argv))[1:]
    if values.help:
      print(doc)
      return 0
    devices.load_jax()
    compiled.keep_programs()
    with numerics.jax_defaults():
      return command(arguments)
  except (errors.UserError, flags.Error) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    return 130


def split(arguments: Sequence[str], usage: str) -> tuple[list[str], list[str]]:
  """Split arguments into tuned models, which come first, and the others.

  Raises:
    UserError: the first one is no tuned model.
  """
  if not arguments:
    raise errors.UserError(f"No run given. {usage}")
  bundle.find(arguments[0])
  count = 1
  while count < len(arguments) and bundle.is_model(arguments[count]):
    count += 1
  return list(arguments[:count]), list(arguments[count:])


def short_names(runs: Sequence[str]) -> list[str]:
  """Return the last parts of places, or the places if these do not differ."""
  paths = [pathlib.PurePath(run) for run in runs]
  paths = [p.parent if p.name == "tuned" else p for p in paths]
  short = [path.name or run for path, run in zip(paths, runs)]
  return short if len({*short}) == len(short) else list(runs)


def find_images(arguments: Iterable[str]) -> Iterator[str]:
  """Yield paths of images: files, those in folders, patterns, from stdin."""
  for argument in arguments:
    path = os.path.expanduser(argument)
    if argument == "-":
      lines = (line.rstrip("\r\n").lstrip("\ufeff") for line in sys.stdin)
      yield from (os.path.expanduser(line) for line in lines if line.strip())
    elif os.path.isdir(path):
      found = listing.find_images(path)
      if not found:
        raise errors.UserError(
          f"There is no image in {argument}: expected files such as .jpg."
        )
      yield from map(str, found)
    elif glob.has_magic(path) and not os.path.exists(path):
      found = sorted(glob.glob(path, recursive=True))
      if not found:
        raise errors.UserError(f"No file matches {argument}.")
      yield from found
    else:
      yield path
