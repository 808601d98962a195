"""Train a method on a task and test it.

  python main.py --config configs/vtab_cifar.py --workdir runs/cifar

and, after an installation with pip, `vqt-jax train` with the same flags.

--config FILE[:name=value,...]  the config: a file, or one that is shipped:
                                digits, vtab_cifar, vtab, compare
--config.FIELD=VALUE            changes a field; all are listed below
--workdir DIR                   a folder, or gs://BUCKET/FOLDER, for the
                                results; the same command resumes the run; one
                                run at a time
--debug                         shows the traceback of an error
--plan SLICE                    does not train, but prints what the run would
                                need on a slice of TPUs, e.g. v5e:4x4, or
                                "here"; exits with 3 if it does not fit

Exit status: 0 if the run is finished, 75 if a signal stopped it (all is saved;
the same command resumes), 2 if there is something to correct.

On several machines run the same command on each; they share the workdir, which
only the first one writes. Cloud TPUs, Slurm, Open MPI and Kubernetes tell the
processes about each other; elsewhere add
--coordinator=HOST:PORT         of the first one, the same everywhere ("none":
                                each runs alone; "auto": as the platform says)
--num_processes=N               number of processes
--process_id=I                  number of this process, from 0
--lost_after=SECONDS            end all processes if one gives no sign of life
                                for so long (default: 60)
"""

from __future__ import annotations

from collections.abc import Sequence
import difflib
import os
import re
import traceback
from typing import Any

from absl import flags
from etils import epy
from ml_collections import ConfigDict
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields
from vqt_jax.config import files as config_files
from vqt_jax.config import resolve
from vqt_jax.config import values as values_lib
from vqt_jax.data import names
from vqt_jax.models import methods as methods_lib
from vqt_jax.runtime import devices
from vqt_jax.runtime import logfile
from vqt_jax.runtime import processes

with epy.lazy_imports():  # JAX takes seconds; mistakes and --help need none.
  import jax

  from vqt_jax.experiments import train
  from vqt_jax.planning import plan as plan_lib
  from vqt_jax.runtime import compiled
  from vqt_jax.runtime import console as console_lib
  from vqt_jax.runtime import numerics
  from vqt_jax.training import launch
  from vqt_jax.training import preemption

# Exit status of a run that was asked to stop: EX_TEMPFAIL, try again.
STOPPED = 75

USAGE = "Usage: --config FILE --workdir DIR (--help tells more)."


class _Parser(flags.ArgumentParser):
  """A parser of flags that names the expected type.

  It also serves tuples, which the parser of ml_collections would collect from
  all occurrences of a flag, instead of taking the last one.
  """

  def __init__(self, parser: flags.ArgumentParser, default: Any):
    self._parser, self._default = parser, default

  def parse(self, argument: Any) -> Any:
    try:
      return self._parser.parse(argument)
    except ValueError as e:
      words = values_lib.describe_type(self._default)
      raise ValueError(f"expected {words}") from e


_INTEGER = _Parser(flags.IntegerParser(), 0)
for _type, _parser in {
  int: _INTEGER,
  float: _Parser(flags.FloatParser(), 0.0),
  bool: _Parser(flags.BooleanParser(), False),
  tuple: _Parser(tuple_parser.TupleParser(), (0.0,)),
}.items():
  config_flags.register_flag_parser_for_type(_type, _parser)


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
  try:
    values = parse(list(argv))
    if values.help:
      logfile.print_to_stdout(
        f"{__doc__}\nFields of a config:\n\n{fields.describe()}"
      )
      return 0
    return run(values)
  except errors.UserError as e:
    if "--debug" in argv:
      traceback.print_exc()
    logfile.print_to_stderr(f"error: {e}")
    return 2
  except KeyboardInterrupt:
    logfile.print_to_stderr(f"Interrupted; the same command {launch.RESUMES}")
    return 130
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    message = _out_of_memory_message(e)
    if "--debug" in argv or not message:
      raise
    logfile.print_to_stderr(f"error: {message}")
    if processes.is_connected():
      processes.exit_now(2)
    return 2


def parse(argv: list[str]) -> flags.FlagValues:
  """Parse a command line.

  Raises:
    UserError: an unknown flag or field, a value of the wrong type, or a config
      that cannot be loaded.
  """
  argv, name = _take_config(argv)
  for arg in argv[1:]:
    if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
      fields.find(match[1])
  values = flags.FlagValues()
  for text in ("workdir", "plan", "coordinator"):
    flags.DEFINE_string(text, None, "", flag_values=values)
  for number in ("num_processes", "process_id"):
    flags.DEFINE(_INTEGER, number, None, "", flag_values=values)
  flags.DEFINE_integer("lost_after", 60, "", 5, flag_values=values)
  flags.DEFINE_boolean("debug", False, "", flag_values=values)
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  known = ["config", *(flag for flag in values if len(flag) > 1)]
  given = name is not None
  config = config_files.load(name) if given else config_dict.default_config()
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=argv
    )
    surplus = values(argv)[1:]
  except flags.UnrecognizedFlagError as e:
    raise _unknown_flag(e.flagname, known) from e
  except flags.Error as e:
    raise errors.UserError(f"{str(e).removeprefix('flag ')}.") from e
  if surplus:
    raise errors.UserError(f"Unexpected argument {surplus[0]!r}. {USAGE}")
  if not given:
    values.config = None
  return values


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
  """Take --config out of a command line; return the rest and the last value."""
  rest, name, args = [], None, iter(argv)
  for arg in args:
    flag, equals, value = arg.partition("=")
    if flag in ("--config", "-config"):
      name = value if equals else next(args, "")
    else:
      rest.append(arg)
  return rest, name


def _unknown_flag(name: str, known: list[str]) -> errors.UserError:
  """Suggest the flag that was meant, for example a field without `config.`."""
  meant = {field: f"config.{field}" for field in fields.FIELDS}
  meant |= {field.split(".")[-1]: meant[field] for field in fields.FIELDS}
  meant |= {flag: flag for flag in known}
  near = difflib.get_close_matches(name.replace("-", "_"), meant, 1)
  if not near:
    return errors.unknown_name(
      "flag", f"--{name}", [f"--{flag}" for flag in known]
    )
  return errors.UserError(
    f"Unknown flag '--{name}'. Did you mean --{meant[near[0]]}?"
  )


def run(values: flags.FlagValues) -> int:
  """Train, or plan, as parsed flags say; return the exit status."""
  config = values.config
  if config is None or not (values.workdir or values.plan):
    missing = "--config" if config is None else "--workdir"
    raise errors.UserError(f"{missing} is missing. {USAGE}")
  given = tuple(values["config"].override_values)
  config = resolve.resolve(config, keep=given)
  if processes.is_alone(values.coordinator):  # Several fail together.
    names.check_known(config.task, config.data_dir)
  devices.set_gpu_flags()
  devices.load_jax()
  if values.plan:
    return plan(config, values.plan, given)
  compiled.keep_programs()
  if values.coordinator is None and not (
    values.num_processes is values.process_id is None
  ):
    raise errors.UserError(f"--coordinator is missing. {USAGE}")
  status = 0
  with launch.open_run(
    config,
    values.workdir,
    values.coordinator,
    values.num_processes,
    values.process_id,
    values.lost_after,
  ) as (log, screen):
    try:
      console = console_lib.for_process()
      note_unused(console, config, given)
      train.train(config, values.workdir, console)
    except preemption.Stopped:
      if processes.is_first():
        print("Stopped and saved; resume with the same command.", file=screen)
      status = STOPPED
    except jax.errors.JaxRuntimeError as e:
      if not processes.is_connected() or _out_of_memory_message(e):
        raise
      traceback.print_exc()  # To the log.
      status = 1
  if status == 1:
    logfile.print_to_stderr(f"error: {launch.crash_message(log)}")
    processes.exit_now(1)
  return status


def note_unused(
  console: console_lib.Console, config: ConfigDict, given: Sequence[str]
) -> None:
  """Note which of the fields given as flags no method of a config uses."""
  names = methods_lib.split_list(config.methods or config.method)
  for field in given:
    if not fields.is_used_in(field, config):
      console.note(f"{field} is not used by {', '.join(names)}", "note")


def plan(config: ConfigDict, where: str, given: Sequence[str] = ()) -> int:
  """Print what a run would need; return the exit status."""
  with (
    logfile.redirect_output(os.devnull, launch.jax_crash_message()),
    numerics.jax_defaults(),
  ):
    console = console_lib.Console()
    note_unused(console, config, given)
    return 0 if plan_lib.run(config, where, console) else 3


def _out_of_memory_message(error: BaseException) -> str | None:
  """Return advice if an error is due to too little memory, else None."""
  text = str(error).strip().split("\n")[0][:200].rstrip(".")
  known = re.search("RESOURCE_EXHAUSTED|out of memory", text, re.I)
  if not isinstance(error, MemoryError) and not known:
    return None
  return (
    f"There is not enough memory: {text or 'all of it is taken'}. Lower"
    " config.batch_size and config.eval_batch_size, take smaller images, or"
    " keep features elsewhere (config.features=disk or live)."
  )
