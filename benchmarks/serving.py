"""Serving over HTTP under load and faults, against the frozen pass alone.

  python -m benchmarks.serving [--variant=S/16] [--size=224] [--tasks=19]
      [--clients=16] [--faulty=6] [--seconds=20]

Clients (`benchmarks.load`) send a photograph of 640 x 480 pixels (JPEG) to a
server with one task, then with all: one alone; many at once; and many besides
faulty ones, which send a byte at a time, leave in the middle of 10 MB, or send
49 million pixels in 0.2 MB. Prints answers a second, their latency, how often
clients were told to try again, requests lost, and the most memory of the
server; and of the frozen pass, in batches of 32, images a second.
"""

from collections.abc import Sequence
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import types

from absl import flags
import jax
import numpy as np
import PIL.Image
import psutil

from benchmarks import predicting
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.serving import app as app_lib
from vqt_jax.serving import limits as limits_lib
from vqt_jax.serving import programs as programs_lib
from vqt_jax.serving import server as server_lib
from vqt_jax.tuned import inputs

_ROW = "{:24} {:>10} {:>8} {:>8} {:>6} {:>5} {:>10}"


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  for name, default in (
    ("size", 224),
    ("tasks", 19),
    ("clients", 16),
    ("faulty", 6),
    ("seconds", 20),
  ):
    flags.DEFINE_integer(name, default, "", flag_values=values)
  flags.DEFINE_string("variant", "S/16", "", flag_values=values)
  values(argv)
  model = predicting.make_model(values.variant, values.size)
  print(_frozen_pass(model))
  print(_ROW.format(*"load images/s p50,s p99,s again lost MiB".split()))
  with tempfile.TemporaryDirectory() as folder:
    image = pathlib.Path(folder) / "photo.jpg"
    small = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    PIL.Image.fromarray(small).resize((640, 480)).save(image, quality=90)
    for tasks in (1, values.tasks):
      models = {f"task_{i}": model for i in range(tasks)}
      with _serve(models) as port, _PeakMemory() as memory:
        for name, clients, faulty in (
          ("one client", 1, 0),
          (f"{values.clients} clients", values.clients, 0),
          (f"and {values.faulty} faulty", values.clients, values.faulty),
        ):
          row = _load(port, image, clients, values.seconds, faulty)
          label = f"{tasks} task{'s' * (tasks > 1)}, {name}"
          print(_ROW.format(label, *row, f"{memory.peak / 2**20:,.0f}"))


def _frozen_pass(model) -> str:
  """Measure the backbone alone."""
  c = model.backbone.config
  params = jax.device_put(model.backbone.params)
  run = jax.jit(tuner_lib.run_backbone, static_argnums=(0, 1))
  batch = np.zeros((inputs.BATCH, *c.image_size, 3), np.float32)
  seconds = []
  for _ in range(4):  # The first one compiles.
    start = time.perf_counter()
    jax.block_until_ready(run(c, True, params, batch).final)
    seconds.append(time.perf_counter() - start)
  rate = inputs.BATCH / np.median(seconds[1:])
  return f"frozen pass of ViT-{c.variant} alone: {rate:.1f} images/s"


@contextlib.contextmanager
def _serve(models):
  """Serve models in a thread; yield the port."""
  served = types.SimpleNamespace(programs=programs_lib.compile_programs(models))
  app = app_lib.App(served, limits_lib.Limits(), lambda line: None)
  with server_lib.bind("127.0.0.1", 0) as bound:
    server = server_lib.make_server(app, 30)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
      time.sleep(0.01)
    yield bound.getsockname()[1]
    server.should_exit = True
    thread.join()
    app.close()


def _load(port, image, clients, seconds, faulty) -> list[str]:
  """Run clients in a process; return the cells of a row."""
  command = [sys.executable, "-m", "benchmarks.load"]
  command += map(str, (port, image, clients, seconds, faulty))
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
  found = json.loads(done.stdout)
  answered, lost = np.array(found["answered"]), found["lost"]
  if lost:
    print(f"lost: {lost[:5]}")
  rate = len(answered) / found["seconds"]
  p50, p99 = np.percentile(answered, (50, 99))
  cells = [f"{rate:.1f}", f"{p50:.2f}", f"{p99:.2f}"]
  return [*cells, str(found["again"]), str(len(lost))]


class _PeakMemory:
  """The most memory that this process has while the block runs, bytes."""

  peak = 0

  def __enter__(self):
    self._end = threading.Event()
    threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *args):
    self._end.set()

  def _watch(self):
    process = psutil.Process()
    while not self._end.wait(0.05):
      self.peak = max(self.peak, process.memory_info().rss)


if __name__ == "__main__":
  main(sys.argv)
