"""Trains a method on a task and tests it.

  python main.py --config configs/vtab_cifar.py --workdir runs/cifar

and, where it was installed with pip, `vqt-jax train` with the same flags.

--config FILE[:name=value,...]  what to run: a file, or one that comes along:
                                digits, vtab_cifar, vtab, compare
--config.FIELD=VALUE            changes a field; all are listed below
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

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import glob
from importlib import resources
import inspect
import os
import re
import sys
import threading
import traceback
from typing import Any, TextIO

from absl import flags
import jax
from ml_collections import ConfigDict
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from vqt_jax import errors
from vqt_jax.config import fields as fields_lib
from vqt_jax.config import recipes
from vqt_jax.config import values as values_lib
from vqt_jax.experiments import train
from vqt_jax.planning import plan as plan_lib
from vqt_jax.runtime import devices
from vqt_jax.runtime import files
from vqt_jax.runtime import logfile
from vqt_jax.runtime import mirror
from vqt_jax.runtime import numerics
from vqt_jax.runtime import processes
from vqt_jax.training import preemption
from vqt_jax.training import workdir as workdir_lib

# The exit status of a run that was asked to stop: EX_TEMPFAIL, try again.
STOPPED = 75

# There may be no save yet, and who crashed may crash again.
RESUMES = "the same command goes on from the last save, if there is one."

LONG_SECONDS = 10  # To wait without a word.

USAGE = "Usage: --config FILE --workdir DIR (--help tells more)."
FLAGS = (
  "config",
  "workdir",
  "plan",
  "debug",
  "help",
  "coordinator",
  "num_processes",
  "process_id",
  "lost_after",
)


class _Tuples(flags.ArgumentParser):
  """Parser of tuple fields, of which the last flag counts, as of all others.

  With the parser of ml_collections, by its type, flags given twice add up.
  """

  def parse(self, argument: Any) -> tuple[Any, ...]:
    return tuple_parser.TupleParser().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _Tuples())


def main(argv: Sequence[str]) -> int:
  """Run a command line; return the exit status.

  One of several processes ends here instead, after the others.
  """
  status = _main(argv)
  if processes.is_connected():
    processes.exit_together(status)
  return status


def _main(argv: Sequence[str]) -> int:
  logfile.reopen_closed_streams()
  devices.set_gpu_flags()
  try:
    values = parse(list(argv))
    if values.help:
      print(f"{__doc__}\nFields and their defaults:\n{_fields()}")
      return 0
    return run(values)
  except errors.UserError as e:
    if "--debug" in argv:
      traceback.print_exc()
    logfile.print_to_stderr(f"error: {e}")
    return 2
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if "--debug" in argv or not (short := _of_memory(e)):
      raise
    logfile.print_to_stderr(f"error: {short}")
    if processes.is_connected():
      processes.exit_now(2)
    return 2
  except KeyboardInterrupt:
    logfile.print_to_stderr(f"Interrupted; {RESUMES}")
    return 130


def parse(argv: list[str]) -> flags.FlagValues:
  """Flags of a command line.

  Raises:
    UserError: an unknown flag or field, a value of the wrong type, or a config
      that cannot be loaded.
  """
  values = flags.FlagValues()
  argv, path = _find_config(argv)
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.DEFINE_string("plan", None, "", flag_values=values)
  flags.DEFINE_string("coordinator", None, "", flag_values=values)
  for name in ("num_processes", "process_id"):
    flags.DEFINE_integer(name, None, "", flag_values=values)
  flags.DEFINE_integer("lost_after", 60, "", 5, flag_values=values)
  flags.DEFINE_boolean("debug", False, "", flag_values=values)
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  for arg in argv[1:]:
    if match := re.match(r"--?(no)?config\.([^=]*)", arg):
      values_lib.check_field(match[2], fields_lib.default_config())
  try:
    surplus = values(argv)[1:]
  except Exception as e:  # Config files are programs: anything can come.
    raise _explain(e, argv, path) from e
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
  config = recipes.resolve(config, keep=given)
  if values.plan:
    return plan(config, values.plan)
  status = 0
  with (
    _begin(config, values) as (logs, name),
    logfile.redirect_output(
      logs.folder / name, _crashed(logs.folder / name)
    ) as screen,
    _closing(logs),
  ):
    try:
      train.train(config, values.workdir)
    except preemption.Stopped:
      if processes.is_first():
        print("Stopped and saved; resume with the same command.", file=screen)
      status = STOPPED
    except jax.errors.JaxRuntimeError as e:
      if not processes.is_connected() or _of_memory(e):
        raise
      traceback.print_exc()  # To the log.
      status = 1
  if status == 1:
    logfile.print_to_stderr(f"error: {_crashed(logs.folder / name)}")
    processes.exit_now(1)
  return status


def plan(config: ConfigDict, where: str) -> int:
  """Says what a run would need; returns the exit status."""
  with (
    logfile.redirect_output(os.devnull, _jax_crashed()),
    numerics.jax_defaults(),
  ):
    return 0 if plan_lib.run(config, where) else 3


@contextlib.contextmanager
def _closing(logs: mirror.MirroredFolder) -> Iterator[None]:
  """Brings a log into its bucket; a run need not fail for want of that."""
  try:
    yield
  finally:
    with contextlib.suppress(errors.UserError):
      logs.close()


def _crashed(log: files.Path) -> str:
  """What to say where Python cannot, or need not, say what happened."""
  if not processes.is_connected():
    return (
      f"The program crashed or was killed; see the end of {log}. When that is"
      f" mended, {RESUMES}"
    )
  return (
    "This process ended without saving: most likely another process of this"
    f" run is gone (see the end of {log}). When that is mended, start the"
    " same command on all of them: they go on from the last save, if there is"
    " one."
  )


def _jax_crashed() -> str:
  """What to say where JAX dies before there is a log."""
  given = {
    "XLA_FLAGS": devices.given_xla_flags(),
    "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS"),
  }
  flags_of = [f"{name}={value}" for name, value in given.items() if value]
  unknown = " It may not know a flag of {}." if flags_of else ""
  return (
    f"JAX crashed.{unknown.format(' and '.join(flags_of))} To see what it"
    f" says: {sys.executable} -c 'import jax; jax.devices()'"
  )


@contextlib.contextmanager
def _begin(
  config: ConfigDict, values: flags.FlagValues
) -> Iterator[tuple[mirror.MirroredFolder, str]]:
  """Joins the other processes, if any, and opens the workdir.

  Yields:
    The folder, and the name in it, of what takes the noise of this process.
  """
  if values.coordinator is not None:
    alone = values.coordinator == "none"
  elif values.num_processes is values.process_id is None:
    alone = processes.detect_cluster() is None
  else:
    raise errors.UserError(f"--coordinator is missing. {USAGE}")
  workdir = files.path(values.workdir)
  joined = not alone and _join(values)
  with logfile.redirect_output(os.devnull, _jax_crashed()):
    devices.find_devices()  # Before the workdir is touched.
  together = processes.raise_on_all if joined else contextlib.nullcontext
  with contextlib.ExitStack() as opened:
    with logfile.redirect_output(os.devnull), together():
      if not joined or processes.is_first():
        name = "log.txt"
        opened.enter_context(workdir_lib.open_workdir(config, workdir))
      else:
        name = f"log_{jax.process_index()}.txt"
      logs = mirror.MirroredFolder(workdir, name)
    yield logs, name


def _join(values: flags.FlagValues) -> bool:
  """Joins the other processes; returns whether there are any to join."""
  alone = ""
  if values.coordinator is None:  # As in the shell of a Slurm step.
    alone = " If there are none, add --coordinator=none to run alone."
  nobody = (
    f"The other processes did not come within {processes.CONNECT_SECONDS} s:"
    " start the same command on all of them, and see that each reaches the"
    f" first one (coordinator {values.coordinator or 'of the platform'})."
    f"{alone}"
  )  # Then JAX aborts.
  with (
    logfile.redirect_output(os.devnull, nobody) as screen,
    _if_long(screen, f"Waiting for the other processes.{alone}"),
  ):
    return processes.connect(
      values.coordinator,
      values.num_processes,
      values.process_id,
      values.lost_after,
    )


@contextlib.contextmanager
def _if_long(screen: TextIO, words: str) -> Iterator[None]:
  """Has something said if it takes long."""
  timer = threading.Timer(LONG_SECONDS, print, [words], {"file": screen})
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    timer.join()  # The screen goes.


def _find_config(argv: list[str]) -> tuple[list[str], str | None]:
  """A command line with the path of its config file, and that path.

  Of several the last one counts, in the place of the first.

  Raises:
    UserError: there is no such file.
  """
  found, place, path, rest = [], None, None, iter(argv)
  for arg in rest:
    match = re.fullmatch(r"--?config(?:=(.*))?", arg, re.S)
    if match is None:
      found.append(arg)
      continue
    value = next(rest, "") if match[1] is None else match[1]
    name, colon, its_arg = value.partition(":")
    path = _config_file(name)
    if place is None:
      place = len(found)
    found[place : place + 1] = [f"--config={path}{colon}{its_arg}"]
  return found, path


def _config_file(name: str) -> str:
  """The path of a config file; of a shipped one a name does.

  Raises:
    UserError: there is no such file.
  """
  path = os.path.expanduser(name)
  if os.path.isfile(path):
    return path
  shipped = {
    file.name: str(file)
    for file in (resources.files("vqt_jax") / "configs").iterdir()
    if file.name.endswith(".py")
  }
  short = re.sub("^configs/", "", name)
  for file_name in (short, f"{short}.py"):
    if file_name in shipped:
      return shipped[file_name]
  folder = os.path.dirname(path) or "configs"
  known = set(glob.glob(f"{glob.escape(folder)}/*.py"))
  if not known or folder == "configs":
    known.update(f"configs/{file_name}" for file_name in shipped)
  raise errors.unknown_name("config file", name, sorted(known))


def _fields() -> str:
  """All fields of a config with defaults and comments, as flags."""
  body = inspect.getsource(fields_lib.default_config).split("  c = Config()\n")
  lines, group = [], ""
  for line in body[1].splitlines():
    if match := re.fullmatch(r"  c\.(\w+) = \{(.*)", line):
      group = f"{match[1]}."
      lines += [match[2].strip()] * bool(match[2])
    elif line == "  }":
      group = ""
    elif match := re.fullmatch(r'    +"(\w+)": (.*?),(  #.*|)', line):
      lines.append(f"--config.{group}{match[1]}={match[2]}{match[3]}")
    elif not line.startswith("  return"):
      lines.append(re.sub(r"^  c\.(\w+) = ", r"--config.\1=", line).strip())
  return "\n".join(lines)


def _explain(
  error: Exception, argv: list[str], path: str | None
) -> errors.UserError:
  """What a person can do about an exception of flag parsing."""
  chain = list(_chain(error))
  for cause in reversed(chain):
    if isinstance(cause, errors.UserError):
      return cause
  if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.S):
    default = values_lib.check_field(match[1], fields_lib.default_config())
    return errors.UserError(
      f"config.{match[1]}: expected {values_lib.expected(default)}, found"
      f" {match[2]!r}."
    )
  if match := re.match(r"flag --(\w+)=(.*?): invalid literal", str(error)):
    return errors.UserError(
      f"--{match[1]}: expected a whole number, found {match[2]!r}."
    )
  if isinstance(error, flags.UnrecognizedFlagError):
    return _unknown_flag(error.flagname, argv)
  if isinstance(error, flags.Error) and "flag --config=" not in str(error):
    return errors.UserError(f"{error}.")
  root = chain[-1]
  return errors.UserError(f"Cannot load {path}: {type(root).__name__}: {root}.")


def _unknown_flag(name: str, argv: list[str]) -> errors.UserError:
  """What a person meant by a flag, above all a field without its `config.`."""
  fields = values_lib.flatten(fields_lib.default_config())
  known = {field.rpartition(".")[2]: field for field in fields}
  known |= {field: field for field in fields} | dict.fromkeys(FLAGS)
  near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
  field = known[near[0]] if near else None
  if field is None:
    return errors.unknown_name("flag", f"--{name}", [f"--{f}" for f in FLAGS])
  value = ""
  for arg, following in zip(argv, [*argv[1:], ""]):
    if re.match(f"--?{re.escape(name)}(=|$)", arg):
      value = arg.partition("=")[2] or following
  equals = "" if not value or value.startswith("--") else f"={value}"
  return errors.UserError(
    f"Unknown flag '--{name}'. Did you mean --config.{field}{equals}?"
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
