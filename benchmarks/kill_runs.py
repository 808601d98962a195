"""Kills runs at random moments until they are done, and compares the bits.

  python benchmarks/kill_runs.py [--runs 5] [--folder DIR] [--seed 0]

Half of the signals are SIGKILL, half SIGTERM. The run is `configs/digits.py`,
shortened, saving after every epoch; the first one is left alone. Prints a line
per run and exits with 1 if any came out differently.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = (
    sys.executable,
    "main.py",
    "--config=configs/digits.py",
    "--config.epochs=8",
    "--config.lr=1.0,0.25",
    "--config.weight_decay=0.0",
    "--config.seeds=1,2",
    "--config.checkpoint_seconds=0",
)


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
  """Starts the run, or resumes it."""
  environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
      [*COMMAND, f"--workdir={workdir}"],
      cwd=ROOT,
      env=environment,
      stderr=subprocess.DEVNULL,
  )


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
    rng: random.Random,
    longest: float,
) -> list[str]:
  """Starts a run again and again until it is done; returns what it suffered."""
  suffered = []
  while not (workdir / "results.json").exists():
    process = start(workdir, cache)
    after, number = rng.uniform(0, longest), rng.choice([9, 15])
    try:
      process.wait(after)
    except subprocess.TimeoutExpired:
      process.send_signal(number)
      suffered.append(f"{signal.Signals(number).name} {after:.1f} s")
    status = process.wait()
    if status not in (0, -signal.SIGKILL, -signal.SIGTERM):
      raise SystemExit(f"Status {status} in {workdir} after {suffered}.")
  return suffered


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=int, default=5)
  parser.add_argument("--folder", default=None, help="where the runs go")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="kill_runs_"))
  rng = random.Random(args.seed)
  for name in ("compiles", "alone"):  # The second one compiles no more.
    began = time.monotonic()
    if start(folder / name, folder / "cache").wait():
      raise SystemExit(f"The run in {folder / name} fails; see its log.txt.")
    longest = 1.2 * (time.monotonic() - began)
  expected = outcome(folder / "alone")
  different = outcome(folder / "compiles") != expected
  print(f"left alone, twice: {'DIFFERENT' if different else 'the same'}")
  for i in range(args.runs):
    workdir = folder / f"killed_{i}"
    suffered = harass(workdir, folder / "cache", rng, longest)
    same = outcome(workdir) == expected
    different |= not same
    what = ", ".join(suffered) or "no signal"
    print(f"{'the same' if same else 'DIFFERENT'} after {what}")
  return int(different)


if __name__ == "__main__":
  sys.exit(main())
