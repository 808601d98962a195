"""Kills runs at random moments until they are done, and compares the bits.

  python benchmarks/kill_runs.py [--signals 50] [--processes 1] [--seed 0]

Half of the signals are SIGKILL, half SIGTERM, to any one of the processes. The
run is `configs/digits.py`, shortened, saving after every epoch; the first one
is left alone. Prints a line per run and exits with 1 if any came out
differently.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = 75  # The exit status of a run that was asked to stop.
COMMAND = (
  sys.executable,
  "main.py",
  "--config=configs/digits.py",
  "--config.epochs=8",
  "--config.lr=1.0,0.25",
  "--config.weight_decay=0.0",
  "--config.seeds=1,2",
  "--config.keep_fraction=0.5",
  "--config.checkpoint_seconds=0",
)


def start(
  workdir: pathlib.Path, cache: pathlib.Path, count: int
) -> list[subprocess.Popen]:
  """Starts the run, or resumes it, in so many processes."""
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  together = (
    f"--coordinator=localhost:{port}",
    f"--num_processes={count}",
    "--lost_after=20",
  )
  return [
    subprocess.Popen(
      [*COMMAND, f"--workdir={workdir}"]
      + ([*together, f"--process_id={i}"] if count > 1 else []),
      cwd=ROOT,
      env=environment,
      stderr=subprocess.DEVNULL,
    )
    for i in range(count)
  ]


def outcome(workdir: pathlib.Path) -> dict[str, object]:
  """All of a run that must not depend on what happened on the way."""
  results = json.loads((workdir / "results.json").read_text())
  files = [workdir / "metrics.jsonl", *sorted(workdir.glob("tuned/*/*"))]
  return {
    "accuracy": results["test_accuracy"],
    **{str(f.relative_to(workdir)): f.read_bytes() for f in files},
  }


def harass(
  workdir: pathlib.Path,
  cache: pathlib.Path,
  count: int,
  rng: random.Random,
  longest: float,
) -> list[str]:
  """Starts a run again and again until it is done; returns what it suffered."""
  suffered = []
  # Of one that has others, 1 and SIGABRT: it noticed that another was gone.
  fine = {0, STOPPED, -signal.SIGKILL, -signal.SIGTERM}
  fine |= {1, -signal.SIGABRT} if count > 1 else set()
  while not (workdir / "results.json").exists():
    processes = start(workdir, cache, count)
    after, number = rng.uniform(0, longest), rng.choice([9, 15])
    process = rng.choice(processes)
    try:
      process.wait(after)
    except subprocess.TimeoutExpired:
      process.send_signal(number)
      suffered.append(f"{signal.Signals(number).name} {after:.1f} s")
    status = [p.wait() for p in processes]
    if not set(status) <= fine:
      raise SystemExit(f"Status {status} in {workdir} after {suffered}.")
  return suffered


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--signals", type=int, default=50, help="at least")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--folder", default=None, help="where the runs go")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="kill_runs_"))
  rng = random.Random(args.seed)
  for name in ("compiles", "alone"):  # The second one compiles no more.
    began = time.monotonic()
    processes = start(folder / name, folder / "cache", args.processes)
    if any([process.wait() for process in processes]):
      raise SystemExit(f"The run in {folder / name} fails; see its log.txt.")
    longest = 1.2 * (time.monotonic() - began)
  expected = outcome(folder / "alone")
  different = outcome(folder / "compiles") != expected
  print(f"left alone, twice: {'DIFFERENT' if different else 'the same'}")
  runs = signals = 0
  while signals < args.signals:
    workdir = folder / f"killed_{runs}"
    suffered = harass(workdir, folder / "cache", args.processes, rng, longest)
    runs, signals = runs + 1, signals + len(suffered)
    same = outcome(workdir) == expected
    different |= not same
    what = ", ".join(suffered) or "no signal"
    print(f"{'the same' if same else 'DIFFERENT'} after {what}", flush=True)
  print(f"{signals} signals in {runs} runs of {args.processes} process(es)")
  return int(different)


if __name__ == "__main__":
  sys.exit(main())
