"""Has each file-system call of a small run fail, or be the last one.

  python -m benchmarks.fault_points [--points 100] [--bucket] [--way fail]

The run trains two settings and a seed on tiny images; its workdir, feature file
and the cache of a downloaded backbone are in one folder. First it is left
alone, and all calls with which it changes or opens files there are numbered.
Then, at each of them, or in training checkpoints, which have most of them and
are numbered by themselves, as they are written by several threads, at a random
choice of so many of each kind:

  fail  this call ends with an error that fits it (of a write, after its first
        half): there is no room, no permission, or an I/O error
  full  from this call on there is no room
  copy  what is in the folder at this moment, in the middle of a write, is all
        that is left: what a kill at any moment leaves, many for one run
  kill  the process is killed at this moment, really

With --bucket the workdir is in a bucket, and the requests to its server are
numbered:

  500, 403  this one is answered so
  cut       the connection ends, and nothing was done
  lost      all is done, but the connection ends before the answer
  copy, kill as above

A run has to end with one sentence and status 2, or with the bits of the run
that was left alone; and started again, with these bits. Prints how all ended,
and exits with 1 if one ended in another way. Needs gcc: calls are disturbed by
fault_points.c, in all threads and libraries. (strace counts the calls of each
thread for itself.)
"""

import argparse
import collections
from collections.abc import Iterator
import contextlib
import ctypes
import http.server
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any

from tests import bucket
from tests import runs
from vqt_jax.training import loop

HANG_SECONDS = 200
# As fault_points.c numbers them.
WAYS = {"off": 0, "count": 1, "fail": 2, "full": 3, "kill": 4, "copy": 5}
OF_REQUESTS = ("500", "403", "cut", "lost")
# Beginnings of paths -> what is there; the first one counts.
PLACES = {
  "run/checkpoints": "checkpoints/",
  "run/stages": "stages/",
  "run/tensorboard": "tensorboard/",
  "run/tuned": "tuned/",
  "run/metrics": "metrics.jsonl",
  "run/log": "log.txt",
  "run": "other files of the workdir",
  "store": "feature file",
  "cache": "downloaded backbone",
  "": "other",
}


def command(root: pathlib.Path, workdir: str) -> list[str]:
  return runs.command(
    root / "material",
    workdir,
    init=os.environ["FAULT_POINTS_INIT"],
    features="disk",
    store_dir=root / "point" / "store",
    checkpoint_seconds=0,
    epochs=2,
    warmup_epochs=0,
    batch_size=48,
    eval_batch_size=48,
    lr="1.0,0.1",
    seeds="7,",
  )


def serve_jobs(connection: Any, root: pathlib.Path, workdir: str) -> None:
  """Body of a process: runs the job for each message that comes."""
  import matplotlib.figure

  import main

  os.environ["VQT_JAX_CACHE"] = str(root / "point" / "cache")
  # Drawing takes longer than all else.
  matplotlib.figure.Figure.savefig = lambda self, file, **_: file.write(b"png")
  loop.CALL_SECONDS = 1e9  # Else the machine's speed tells how many calls.
  arm = ctypes.CDLL(None).fault_arm
  screen = os.open(root / "screen", os.O_RDWR | os.O_CREAT | os.O_APPEND)
  os.dup2(screen, 1)
  os.dup2(screen, 2)
  names = ("point", "point/run/checkpoints", "calls", "copies")
  places = [os.fsencode(root / name) for name in names]
  while True:
    way, number, inside = connection.recv()
    os.ftruncate(screen, 0)
    (root / "calls").unlink(missing_ok=True)
    arm(WAYS[way], number, inside, *places)
    try:
      status = main.main(command(root, workdir))
    except BaseException:
      status = traceback.format_exc()
    arm(WAYS["off"], 0, 0, *places)
    sys.stderr.flush()
    connection.send(status)


class Worker:
  """A process that runs the job again and again; replaced when it dies."""

  def __init__(self, root: pathlib.Path, workdir: str):
    self._root, self._workdir, self.process = root, workdir, None

  def run(
    self, way: str = "off", number: int = 0, inside: bool = False
  ) -> tuple[Any, list[str]]:
    """Runs the job; returns its status, or how it ended, and what it said."""
    self.start()
    self._ours.send((way, number, inside))
    try:
      status = self._ours.recv() if self._ours.poll(HANG_SECONDS) else "hangs"
    except EOFError:
      self.process.join()
      status = self.process.exitcode
    if status not in (0, 2):
      self.stop()
    said = (self._root / "screen").read_text(errors="replace")
    return status, said.splitlines()

  def start(self) -> None:
    if self.process is None:
      self._ours, theirs = CONTEXT.Pipe()
      self.process = CONTEXT.Process(
        target=serve_jobs,
        args=(theirs, self._root, self._workdir),
        daemon=True,
      )
      self.process.start()
      theirs.close()

  def stop(self) -> None:
    if self.process is not None:
      self.process.kill()
      self.process.join()
      self.process = None


class Calls:
  """The run in a folder, disturbed at its file-system calls.

  At those in training checkpoints, or at the others.
  """

  def __init__(self, root: pathlib.Path, worker: Worker, in_saves: bool):
    self.worker, self._in_saves = worker, in_saves
    self._root, self._folder = root, root / "point"

  def begin(self) -> None:
    """Empties all that the run will write."""
    shutil.rmtree(self._folder, ignore_errors=True)
    self._folder.mkdir()

  def count(self) -> tuple[Any, list[str]]:
    """Runs the job; returns its status and its points, "KIND PATH"."""
    status, _ = self.worker.run("count", inside=self._in_saves)
    return status, self._points()

  def copy(self) -> list[str]:
    """Keeps what is there at each point of a run; returns the points."""
    shutil.rmtree(self._root / "copies", ignore_errors=True)
    (self._root / "copies").mkdir()
    self.begin()
    self.worker.run("copy", inside=self._in_saves)
    return self._points()

  def bring_back(self, number: int) -> None:
    self._folder.rmdir()
    (self._root / "copies" / str(number)).rename(self._folder)

  def disturb(self, way: str, number: int) -> tuple[Any, list[str], str]:
    """Disturbs the run at a point; returns as `Worker.run`, and the point."""
    status, said = self.worker.run(way, number, self._in_saves)
    return status, said, (self._points() or [""])[0]

  def outcome(self) -> pathlib.Path:
    return self._folder / "run"

  def names(self) -> set[str]:
    """Names of all files, without times and random numbers."""
    found = (str(p.relative_to(self._folder)) for p in self._folder.rglob("*"))
    return {re.sub(r"[0-9a-f]{32}|\d{9,}", "~", name) for name in found}

  def _points(self) -> list[str]:
    calls = self._root / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    lines.sort(key=lambda line: int(line.split(" ", 1)[0]))
    return [line.split(" ", 1)[1] for line in lines]


class Requests:
  """The run in a bucket, disturbed at the requests to its server."""

  def __init__(self, root: pathlib.Path, worker: Worker, server: bucket.Server):
    self.worker, self._root, self._server = worker, root, server
    self._copies: list[Any] = []

  def begin(self) -> None:
    (self._root / "point").mkdir(exist_ok=True)  # Features stay there.
    self._server.objects, self._server.generations = {}, {}

  def count(self) -> tuple[Any, list[str]]:
    status, _, points = self._run(lambda number: "")
    return status, points

  def copy(self) -> list[str]:
    def keep(number):
      del number
      server = self._server
      self._copies.append((dict(server.objects), dict(server.generations)))
      return ""

    self.begin()
    return self._run(keep)[2]

  def bring_back(self, number: int) -> None:
    self._server.objects, self._server.generations = self._copies[number - 1]

  def disturb(self, way: str, number: int) -> tuple[Any, list[str], str]:
    def here(current):
      if current != number:
        return ""
      if way == "kill":
        self.worker.process.kill()
        return "cut"
      return way

    status, said, points = self._run(here)
    return (
      status,
      said,
      points[number - 1] if number <= len(points) else "",
    )

  def _run(self, disturb) -> tuple[Any, list[str], list[str]]:
    points = []

    def request(method, path):
      points.append(f"{method} {path}")
      return disturb(len(points))

    self.worker.start()
    self._server.disturb = request
    status, said = self.worker.run()
    self._server.disturb = lambda method, path: ""
    return status, said, points

  def outcome(self) -> pathlib.Path:
    place = self._root / "bucket"
    shutil.rmtree(place, ignore_errors=True)
    return self._server.copy_to(place) / "run"

  def names(self) -> set[str]:
    found = self._server.objects
    return {re.sub(r"[0-9a-f]{32}|\d{9,}", "~", name) for name in found}


def judge(
  study: Calls | Requests, way: str, number: int, point: str, bits: Any
) -> tuple[str, str]:
  """Disturbs the run at a point; returns how that ended, and at which point.

  With several threads that may be another one than it was the time before.
  """
  study.begin()
  if way == "copy":
    study.bring_back(number)
    ended = "killed"
  else:
    if way == "kill":
      study.worker.stop()
    status, said, point = study.disturb(way, number)
    if not point:  # There are not as many every time.
      return "not reached", ""
    errors = [line for line in said if line.startswith("error: ")]
    if way == "kill" and status == -9:
      ended = "killed"
    elif status == 0:
      ended = "went on"
    elif status == 2 and errors == said[-1:] and "Traceback" not in said:
      ended = f"sentence: {said[-1]}"
    else:
      return f"BAD: {status} {said[-40:]}", point
  if ended != "went on":
    status, said = study.worker.run()
    if status != 0:
      return f"BAD when started again, {ended}: {status} {said[-5:]}", point
  if runs.bits(study.outcome()) != bits:
    return f"BAD: other bits, {ended}", point
  return ended, point


def run(study: Calls | Requests, args: argparse.Namespace, most: int) -> bool:
  """Disturbs the run in all ways; prints how that ended. True: all well."""
  for _ in range(2):  # The first one compiles.
    study.begin()
    status, points = study.count()
    if status != 0:
      raise SystemExit(f"Left alone, it fails: {status}")
  bits, names = runs.bits(study.outcome()), study.names()
  print(f"{len(points)} points:", collections.Counter(map(kind_of, points)))
  rng = random.Random(args.seed)
  ends = collections.defaultdict(collections.Counter)
  left, bad = collections.Counter(), 0
  for way in args.way:
    began = time.monotonic()
    known = study.copy() if way == "copy" else points
    for number in choose(known, most, rng):
      end, point = judge(study, way, number, known[number - 1], bits)
      print(way, number, point, end, flush=True)
      bad += end.startswith("BAD")
      short = end.partition(":")[0]
      for what in ("all", kind_of(point), place_of(point)):
        if point or what == "all":
          ends[way, what][short] += 1
      # Which saves are kept depends on how many were made.
      for name in study.names() ^ names:
        left[re.sub(r"(checkpoints/)\d+([^/]*).*", r"\1N\2", name)] += 1
    seconds = time.monotonic() - began
    print(f"{way}: {len(known)} points, {seconds:.0f} s", flush=True)
  for (way, what), counts in ends.items():
    told = ", ".join(f"{end} {n:,}" for end, n in sorted(counts.items()))
    print(f"{way:6}{what:30}{told}")
  print("there, or missing, unlike after the run left alone:", dict(left))
  print(f"{bad} ended badly")
  return not bad


def choose(points: list[str], most: int, rng: random.Random) -> list[int]:
  """Numbers of the points to disturb: all, or at most so many of each kind."""
  kinds = collections.defaultdict(list)
  for number, point in enumerate(points, 1):
    kinds[kind_of(point)].append(number)
  chosen = (rng.sample(x, min(most or len(x), len(x))) for x in kinds.values())
  return sorted(number for each in chosen for number in each)


def kind_of(point: str) -> str:
  """Kind of a call; method of a request, and what it is about."""
  kind, _, path = point.partition(" ")
  return f"{kind} {path.split('/b/')[0]}" if kind.isupper() else kind


def place_of(point: str) -> str:
  path = re.sub(".*/o/", "", point.split(" ", 2)[-1].replace("%2F", "/"))
  path = path.lstrip("/")
  return next(told for place, told in PLACES.items() if path.startswith(place))


def build(folder: pathlib.Path) -> pathlib.Path:
  """Compiles what disturbs calls; returns the library."""
  library = folder / "fault_points.so"
  source = pathlib.Path(__file__).with_suffix(".c")
  options = ("-O1", "-shared", "-fPIC", "-o", library, source, "-ldl")
  try:
    subprocess.run(["gcc", *options], check=True)
  except FileNotFoundError as e:
    raise SystemExit("Install gcc: it compiles fault_points.c.") from e
  return library


@contextlib.contextmanager
def serve_files(folder: pathlib.Path) -> Iterator[str]:
  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(folder))

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
  ["tensorflow", "tests.bucket", "tests.runs", "vqt_jax.reports.run_figure"]
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--points", type=int, default=0, help="0: all")
  parser.add_argument("--others", type=int, default=0, help="elsewhere")
  parser.add_argument("--bucket", action="store_true")
  parser.add_argument("--seed", type=int, default=0)
  ways = (*OF_REQUESTS, "fail", "full", "copy", "kill")
  parser.add_argument("--way", action="append", choices=ways)
  args = parser.parse_args()
  usual = (*OF_REQUESTS, "copy") if args.bucket else ("fail", "copy")
  args.way = args.way or usual
  with tempfile.TemporaryDirectory(prefix="fault_points_") as place:
    root = pathlib.Path(place)
    (root / "material").mkdir()
    runs.make_material(root / "material")
    with serve_files(root / "material") as address, bucket.serve() as server:
      os.environ |= server.environment | {
        "FAULT_POINTS_INIT": f"{address}/vit.npz",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "LD_PRELOAD": str(build(root)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
      }
      place = "gs://bucket/run" if args.bucket else str(root / "point" / "run")
      worker = Worker(root, place)
      if args.bucket:
        studies = [(Requests(root, worker, server), args.points)]
      else:
        studies = [
          (Calls(root, worker, False), args.others),
          (Calls(root, worker, True), args.points),
        ]
      try:
        fine = [run(study, args, most) for study, most in studies]
      finally:
        worker.stop()
  return 0 if all(fine) else 1


if __name__ == "__main__":
  raise SystemExit(main())
