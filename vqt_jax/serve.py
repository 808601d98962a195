"""Answer images over HTTP with what runs have trained.

  vqt-jax serve runs/photos runs/dtd --port 8000

and `python -m vqt_jax.serve` with the same arguments: workdirs of finished
runs, or bundles (their tuned/), on one backbone, which sees an image once for
all of them. A browser finds a page there, and programs answers as JSON:

  curl -F file=@cat.jpg http://127.0.0.1:8000/predict

Needs the packages of the extra `serve`: pip install ".[serve]" in the
repository.

--host HOST      the address to listen on; default: 127.0.0.1, this machine
                 only. There are no users and passwords: for others, put a
                 proxy with TLS in front
--port PORT      default: 8000
--backbone FILE  the backbone, if it is elsewhere than in training

What is more than this is refused:

--images N             images in a request; default: 16
--image_megabytes N    an image, encoded; default: 16
--request_megabytes N  a request; default: 32
--megapixels N         an image, decoded; default: 25
--queue N              images of all requests that wait; default: 128
--seconds N            until a request is answered; default: 30

A tuned/ that is replaced is taken up within seconds. SIGTERM and Ctrl-C answer
what has been asked, and end.

Exit status: 0, or 2 if there is something to correct.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import signal
import sys
import threading

from absl import flags
from etils import epy

from vqt_jax import errors
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import logfile
from vqt_jax.serving import limits as limits_lib
from vqt_jax.tuned import arguments as arguments_lib

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  from vqt_jax.serving import app as app_lib
  from vqt_jax.serving import programs
  from vqt_jax.serving import served as served_lib
  from vqt_jax.serving import server

USAGE = "Usage: RUN... [--host HOST] [--port PORT] (--help tells more)."
_EXTRA = ("starlette", "uvicorn", "python-multipart", "prometheus-client")
_REFRESH = 5.0  # Seconds between two looks at the bundles.


def main(argv: Sequence[str]) -> int:
  """Serve as a command line says; return the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("host", "127.0.0.1", "", flag_values=values)
  flags.DEFINE_integer("port", 8000, "", 0, 65535, flag_values=values)
  flags.DEFINE_string("backbone", None, "", flag_values=values)
  fields = [field.name for field in dataclasses.fields(limits_lib.Limits)]
  for name in fields:
    default = getattr(limits_lib.Limits, name)
    flags.DEFINE_integer(name, default, "", 1, flag_values=values)

  def command(arguments):
    limits = limits_lib.Limits(**{name: values[name].value for name in fields})
    serve(arguments, values.host, values.port, values.backbone, limits)
    return 0

  return arguments_lib.run(argv, values, __doc__, command, "Interrupted.")


def serve(
  runs: Sequence[str],
  host: str,
  port: int,
  backbone: str | None,
  limits: limits_lib.Limits,
) -> None:
  """Serve until a signal comes, see the top of this file.

  Raises:
    UserError: a package is missing, a model cannot be read, or the address
      cannot be used.
  """
  modules = [package.replace("-", "_") for package in _EXTRA]
  if not all(map(importlib.util.find_spec, modules)):
    raise errors.UserError(
      f"vqt-jax serve needs more packages: pip install {' '.join(_EXTRA)}"
    )
  if not runs:
    raise errors.UserError(f"No run given. {USAGE}")
  console = console_lib.Console()
  with _ended_by_signals(), server.bind(host, port) as bound:
    sizes = ", ".join(map(str, programs.SIZES))
    console.note(f"for batches of {sizes} images", "compile")
    served = served_lib.Served(runs, backbone)
    for name, model in served.programs.models.items():
      console.note(f"{name}: {model}", "model")
    app = app_lib.App(served, limits, logfile.print_to_stderr)
    stop = threading.Event()
    threading.Thread(
      target=served.watch,
      args=(_REFRESH, stop, logfile.print_to_stderr),
      daemon=True,
    ).start()
    address, port = bound.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    console.note(f"http://{address}:{port}   Ctrl-C ends", "ready")
    try:
      server.make_server(app, limits.seconds).run([bound])
    finally:
      stop.set()
      app.close()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
  """Make SIGTERM and SIGINT end the program with status 0.

  While models are loaded, and when uvicorn, which sends them again at its end,
  has answered all.
  """
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, lambda *_: sys.exit(0)) for n in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
