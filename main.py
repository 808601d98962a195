"""Trains a method on a task and tests it.

  python main.py --config configs/vtab_cifar.py --workdir runs/cifar

--config FILE[:name=value,...]  what to run; every field of vqt_jax/config.py
--config.FIELD=VALUE            can be changed
--workdir DIR                   gets the results; the same command resumes; a
                                folder, or gs://BUCKET/FOLDER; one run at a time
--debug                         shows where an error comes from
--plan SLICE                    instead of training, says what it would need on
                                a slice of TPUs, e.g. v5e:4x4, or "here"; exits
                                with 3 if it does not fit

It exits with 0 if the run is finished, with 75 if a signal stopped it (all is
saved; the same command resumes), and with 2 if there is something to mend.

On several machines the same command runs on each; they share the workdir, which
only the first one writes. Cloud TPUs, Slurm, Open MPI and Kubernetes tell the
processes of each other; elsewhere add
--coordinator=HOST:PORT         of the first one, the same everywhere ("none":
                                each runs alone; "auto": the platform must tell)
--num_processes=N               how many there are
--process_id=I                  which one this is, from 0
--lost_after=SECONDS            without a sign of life from one, the others end
"""

import os

# Before TensorFlow or JAX start: their C++ parts report errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from collections.abc import Iterator, Sequence
import contextlib
import glob
import re
import sys
import traceback

from absl import flags
import jax
from ml_collections import ConfigDict
from ml_collections import config_flags

from vqt_jax import checks
from vqt_jax import config as config_lib
from vqt_jax import errors
from vqt_jax import files
from vqt_jax import noise
from vqt_jax import parallel
from vqt_jax import results

# The exit status of a run that was asked to stop: EX_TEMPFAIL, try again.
STOPPED = 75

USAGE = "Usage: python main.py --config FILE --workdir DIR (--help tells more)."


def main(argv: Sequence[str]) -> int:
  """Runs a command line; returns the exit status."""
  parallel.ask_for_determinism()
  try:
    values = parse(list(argv))
    if values.help:
      print(__doc__)
      return 0
    return run(values)
  except errors.UserError as e:
    if "--debug" in argv:
      traceback.print_exc()
    print(f"error: {e}", file=sys.stderr)
    return 2
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if "--debug" in argv or not (short := _of_memory(e)):
      raise
    print(f"error: {short}", file=sys.stderr)
    if parallel.is_connected():
      parallel.leave(2)
    return 2
  except KeyboardInterrupt:
    print("Interrupted; the same command resumes.", file=sys.stderr)
    return 130


def parse(argv: list[str]) -> flags.FlagValues:
  """Flags of a command line.

  Raises:
    UserError: an unknown flag or field, a value of the wrong type, or a config
      that cannot be loaded.
  """
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.DEFINE_string("plan", None, "", flag_values=values)
  flags.DEFINE_string("coordinator", None, "", flag_values=values)
  for name in ("num_processes", "process_id"):
    flags.DEFINE_integer(name, None, "", flag_values=values)
  flags.DEFINE_integer("lost_after", 60, "", 5, flag_values=values)
  for name in ("debug", "help"):
    flags.DEFINE_boolean(name, False, "", flag_values=values)
  path = _config_path(argv)
  for arg in argv[1:]:
    if match := re.match(r"--?(no)?config\.([^=]*)", arg):
      checks.check_field(match[2], config_lib.default_config())
  try:
    surplus = values(argv)[1:]
  except Exception as e:  # Config files are programs: anything can come.
    raise _explain(e, path) from e
  if surplus:
    raise errors.UserError(f"Unexpected argument {surplus[0]!r}. {USAGE}")
  return values


def run(values: flags.FlagValues) -> int:
  """Trains, or plans, as parsed flags tell; returns the exit status."""
  config = values.config
  if config is None or not (values.workdir or values.plan):
    missing = "--config" if config is None else "--workdir"
    raise errors.UserError(f"{missing} is missing. {USAGE}")
  if not isinstance(config, ConfigDict):
    raise errors.UserError(
        f"{values['config'].config_filename}: expected get_config() to return"
        f" a ConfigDict, found {type(config).__name__}."
    )
  given = tuple(values["config"].override_values)
  config = config_lib.resolve(config, keep=given)
  if values.plan:
    return plan(config, values.plan)
  status = 0
  with (
      _begin(config, values) as (logs, name),
      noise.quiet(logs.folder / name) as screen,
      noise.last_words(screen, _crashed(logs.folder / name)),
      _closing(logs),
  ):
    # Imported late: errors above come at once, and noise goes to the log.
    from vqt_jax import train
    from vqt_jax.train import checkpoint

    try:
      train(config, values.workdir)
    except checkpoint.Stopped:
      if parallel.is_first():
        print("Stopped and saved; resume with the same command.", file=screen)
      status = STOPPED
    except jax.errors.JaxRuntimeError as e:
      if not parallel.is_connected() or _of_memory(e):
        raise
      traceback.print_exc()  # To the log.
      status = 1
  if status == 1:
    print(f"error: {_crashed(logs.folder / name)}", file=sys.stderr)
    parallel.leave(1)
  return status


def plan(config: ConfigDict, where: str) -> int:
  """Says what a run would need; returns the exit status."""
  with noise.quiet(os.devnull):
    from vqt_jax import plan as plan_lib

    return 0 if plan_lib.run(config, where) else 3


@contextlib.contextmanager
def _closing(logs: files.Growing) -> Iterator[None]:
  """Brings a log into its bucket; a run need not fail for want of that."""
  try:
    yield
  finally:
    with contextlib.suppress(errors.UserError):
      logs.close()


def _crashed(log: files.Path) -> str:
  """What to say where Python cannot, or need not, say what happened."""
  if not parallel.is_connected():
    return (
        f"The program crashed; see the end of {log}. The same command resumes."
    )
  return (
      "This process ended without saving: most likely another process of this"
      f" run is gone (see the end of {log}). Start the same command on all of"
      " them again to resume from the last save."
  )


@contextlib.contextmanager
def _begin(
    config: ConfigDict, values: flags.FlagValues
) -> Iterator[tuple[files.Growing, str]]:
  """Joins the other processes, if any, and opens the workdir.

  Yields:
    The folder, and the name in it, of what takes the noise of this process.
  """
  if values.coordinator is not None:
    alone = values.coordinator == "none"
  elif values.num_processes is values.process_id is None:
    alone = parallel.platform() is None
  else:
    raise errors.UserError(f"--coordinator is missing. {USAGE}")
  workdir = files.path(values.workdir)
  joined = not alone and _join(values)
  together = parallel.together if joined else contextlib.nullcontext
  with contextlib.ExitStack() as opened:
    with noise.quiet(os.devnull), together():
      if not joined or parallel.is_first():
        name = "log.txt"
        opened.enter_context(results.open_workdir(config, workdir))
      else:
        name = f"log_{jax.process_index()}.txt"
      logs = files.Growing(workdir, name)
    yield logs, name


def _join(values: flags.FlagValues) -> bool:
  """Joins the other processes; returns whether there are any to join."""
  nobody = (
      f"The other processes did not come within {parallel.CONNECT_SECONDS} s:"
      " start the same command on all of them, and see that each reaches the"
      f" first one (coordinator {values.coordinator or 'of the platform'})."
  )  # Then JAX aborts.
  with noise.quiet(os.devnull) as screen, noise.last_words(screen, nobody):
    return parallel.connect(
        values.coordinator, values.num_processes, values.process_id,
        values.lost_after,
    )  # fmt: skip


def _config_path(argv: list[str]) -> str | None:
  """The config file named on a command line.

  Raises:
    UserError: there is no such file.
  """
  for arg, following in zip(argv[1:], [*argv[2:], ""]):
    match = re.fullmatch(r"--?config(?:=(.*))?", arg)
    if match is None:
      continue
    path = (following if match[1] is None else match[1]).split(":", 1)[0]
    if not os.path.isfile(path):
      folder = os.path.dirname(path) or "configs"
      known = glob.glob(f"{glob.escape(folder)}/*.py")
      raise errors.unknown("config file", path, sorted(known))
    return path
  return None


def _explain(error: Exception, path: str | None) -> errors.UserError:
  """What a person can do about an exception of flag parsing."""
  chain = list(_chain(error))
  for cause in reversed(chain):
    if isinstance(cause, errors.UserError):
      return cause
  if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.S):
    default = checks.check_field(match[1], config_lib.default_config())
    return errors.UserError(
        f"config.{match[1]}: expected {checks.expected(default)}, found"
        f" {match[2]!r}."
    )
  if match := re.match(r"flag --(\w+)=(.*?): invalid literal", str(error)):
    return errors.UserError(
        f"--{match[1]}: expected a whole number, found {match[2]!r}."
    )
  if isinstance(error, flags.UnrecognizedFlagError):
    known = ("--config", "--workdir", "--plan", "--debug", "--help",
             "--coordinator", "--num_processes", "--process_id",
             "--lost_after")  # fmt: skip
    return errors.unknown("flag", f"--{error.flagname}", known)
  if isinstance(error, flags.Error) and "flag --config=" not in str(error):
    return errors.UserError(f"{error}.")
  root = chain[-1]
  return errors.UserError(
      f"Cannot load {path}: {type(root).__name__}: {root}."
  )


def _of_memory(error: BaseException) -> str | None:
  """What to do where memory was too small; None for any other error."""
  text = str(error).strip().split("\n")[0][:200].rstrip(".")
  known = re.search("RESOURCE_EXHAUSTED|out of memory", text, re.I)
  if not isinstance(error, MemoryError) and not known:
    return None
  return (
      f"There is not enough memory: {text or 'all of it is taken'}. Lower"
      " config.batch_size and config.eval_batch_size, take smaller images, or"
      " keep features elsewhere (config.features=disk or live)."
  )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


if __name__ == "__main__":
  sys.exit(main(sys.argv))
