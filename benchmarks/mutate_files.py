"""Damages files of every kind at random, reads them, and counts what happens.

  python -m benchmarks.mutate_files [--mutants 20000] [--kind tuned/]

A mutant is a small set of good files of which one was changed: bits, bytes and
blocks, or what a parser sees (names, numbers, types, sizes, nesting), or the
file is a folder, a pipe or a link now. Another process reads them, with little
memory more than it began with; if it dies or hangs, that is counted and a new
one goes on. Prints how the mutants of each kind ended, and exits with 1 if one
ended in another way than with values or a sentence.

  same      the values of the good files
  other     other values: the change made other files that are as good, or is
            in a part that has no checksum
  sentence  a `UserError`
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import struct
import tempfile
import time
import traceback
from typing import Any
import warnings
import zipfile

import jax
import numpy as np

import vqt_jax
from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax import results as results_lib
from vqt_jax.config import config_dict
from vqt_jax.features import disk
from vqt_jax.features import store
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit
from vqt_jax.models import vit_config
from vqt_jax.reports import compare
from vqt_jax.reports import run_figure
from vqt_jax.reports import run_report
from vqt_jax.reports import run_table
from vqt_jax.runtime import array_files
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import metrics
from vqt_jax.training import stage as stage_lib
from vqt_jax.training import trial as trial_lib
from vqt_jax.training import workdir
from vqt_jax.tuned import bundle

MEMORY = 1 << 30  # Bytes that a reader may take, above what it begins with.
HANG_SECONDS = 20
IMAGES = 8
# What numbers, names and other values of a parser become.
VALUES = (
  None, True, False, [], {}, "", 0, -1, 1, 7, 2**31, 2**60, 2**63, 10**400,
  0.5, -1e308, 1e999, float("nan"), "..", "../../evil", "/etc/passwd", "a\0b",
  "\x1b[2J", "x" * 300, [[[[]]]], [0] * 1000, {"a": {"a": {}}}, "O", "<f8",
  "|b1", "V9999999999",
)  # fmt: skip
NAMES = (
  "Transformer/encoderblock_2000000/x", "../../../evil", "", "/", "a\0b",
  "Transformer/encoderblock_0/LayerNorm_0/scale", "cls", "x" * 300, "\ud800",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
  """Files that belong together.

  Attributes:
    write: makes them in an empty folder.
    read: reads them in a folder, and returns all that they hold.
  """

  write: Callable[[pathlib.Path], Any]
  read: Callable[[pathlib.Path], Any]


def backbone() -> vqt_jax.Backbone:
  config = vit_config.ViTConfig(
    width=8, depth=2, mlp_dim=16, num_heads=2, patch_size=(4, 4),
    image_size=(8, 8),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  random_leaf = lambda x: rng.standard_normal(x.shape).astype(np.float32)
  params = jax.tree.map(random_leaf, vit.param_shapes(config))
  return vqt_jax.Backbone(config, params, source="vit.npz")


def tuner() -> tuner_lib.Tuner:
  return tuner_lib.make_tuner("vqt", backbone().config, 3, num_queries=1)


def tuned_variables(trials: int) -> Any:
  rng = np.random.default_rng(1)
  draw = lambda x: rng.standard_normal((trials, *x.shape)).astype(np.float32)
  return jax.tree.map(draw, tuner().shapes())


# Checkpoints.


def write_npz(folder):
  checkpoints.save_npz(folder / "vit.npz", backbone())


def write_compressed(folder):
  write_npz(folder)
  with np.load(folder / "vit.npz") as leaves:
    np.savez_compressed(folder / "vit.npz", **leaves)


def write_zarr(folder):
  import tensorstore

  write_npz(folder)
  step = folder / "checkpoint.bv-000000005"
  with np.load(folder / "vit.npz") as leaves:
    for name in leaves:
      metadata = {
        "compressor": {"id": "zstd", "level": 1},
        "shape": leaves[name].shape,
        "chunks": leaves[name].shape,
      }
      tensorstore.open(
        {
          "driver": "zarr",
          "kvstore": {
            "driver": "file",
            "path": str(step / f"params~{name.replace('/', '~')}"),
          },
          "metadata": metadata,
        },
        create=True,
        dtype=leaves[name].dtype,
      ).result().write(leaves[name]).result()
  (folder / "vit.npz").unlink()
  (folder / "checkpoint.bv-LAST").write_text("000000005")


def write_folder(folder):
  tensors = {
    "cls_token": (1, 1, 8), "pos_embed": (1, 5, 8),
    "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,),
    "norm.weight": (8,), "norm.bias": (8,),
  }  # fmt: skip
  for i in range(2):
    for name, shape in (
      ("norm1", (8,)), ("attn.qkv", (24, 8)), ("attn.proj", (8, 8)),
      ("norm2", (8,)), ("mlp.fc1", (16, 8)), ("mlp.fc2", (8, 16)),
    ):  # fmt: skip
      tensors[f"blocks.{i}.{name}.weight"] = shape
      tensors[f"blocks.{i}.{name}.bias"] = shape[:1]
  arrays = {name: np.ones(s, np.float32) for name, s in tensors.items()}
  content = array_files.to_safetensors(arrays, {})
  (folder / "model.safetensors").write_bytes(content)
  config = {
    "architecture": "vit_tiny_patch16_224",
    "global_pool": "token",
    "model_args": {"num_heads": 2, "init_values": None, "img_size": [8, 8]},
    "pretrained_cfg": {
      "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3
    },
  }  # fmt: skip
  files.write_json(folder / "config.json", config)


def read_backbone(name):
  def read(folder):
    with contextlib.suppress(errors.UserError):
      checkpoints.read_config(folder / name, image_size=8)
    loaded = vqt_jax.load_backbone(folder / name)
    return loaded.params, dataclasses.astuple(loaded.config)

  return read


# What a run writes.

STAGE = stage_lib.Stage(
  name="seeds",
  label="seeds",
  tuner=tuner(),
  trials=tuple(trial_lib.Trial(0.1, 0.01, seed) for seed in (1, 2)),
  trial_noun="seed",
  judge=("val", None),
)


def write_stage(folder):
  history = [{"loss": [1.5, 2.5], "accuracy": [0.5, 0.25]} for _ in range(3)]
  outcome = stage_lib.StageResult(history, 1.5, [], [0.5, 0.25])
  outcome.variables = tuned_variables(2)
  stage_lib.write_result(folder / "seeds.safetensors", outcome)


def read_stage(folder):
  found = stage_lib.read_result(folder / "seeds.safetensors", STAGE)
  return dataclasses.asdict(found)


def write_safetensors(folder):
  arrays = {"a/b": np.arange(12.0).reshape(3, 4), "c": np.ones(2, np.float32)}
  content = array_files.to_safetensors(arrays, {"seed": 1})
  (folder / "a.safetensors").write_bytes(content)


def read_safetensors(folder):
  def check(shapes, info):
    if shapes != {"a/b": (3, 4), "c": (2,)}:
      raise ValueError(f"other shapes: {shapes}")

  with files.explain_damage(folder / "a.safetensors"):
    arrays, info = array_files.read_safetensors(folder / "a.safetensors", check)
    return arrays, info["seed"]


def write_tuned(folder):
  checkpoints.save_npz(folder.parent / "vit.npz", backbone())  # Stays good.
  write_bundle(folder)


def write_bundle(folder):
  vit = folder.parent / "vit.npz"
  loaded = vqt_jax.load_backbone(vit)
  mask = np.zeros((2, tuner().num_features), np.float32)
  mask[:, [1, 4, 5]] = 1
  info = {
    "task": "shapes",
    "classes": ["a", "b", "c"],
    "preprocessing": {
      "image_size": [8, 8], "value_range": "-1..1", "fit": "squash",
    },
    "seeds": [1, 2],
    "results": {"chosen": {"lr": 0.1}},
  }  # fmt: skip
  bundle.write(
    folder / "tuned", str(vit), loaded, tuner(),
    tuned_variables(2), info, mask,
  )  # fmt: skip


def read_tuned(folder):
  found = vqt_jax.load(folder / "tuned", folder.parent / "vit.npz")
  return (
    found.variables,
    found.classes,
    dataclasses.astuple(found.tuner.options),
  )


def rows(phase, epochs):
  return [
    {"phase": phase, "epoch": epoch, "run": run, "lr": 0.1, "loss": 1 / epoch}
    for epoch in range(1, epochs)
    for run in range(2)
  ]


def write_metrics(folder):
  writer = metrics.MetricsWriter(folder)
  for phase in ("search", "seeds"):
    writer.epochs(phase, rows(phase, 4))
  writer.close()


def read_metrics(folder):
  """Goes on with the run, which logs all again."""
  writer = metrics.MetricsWriter(folder)
  for phase in ("search", "seeds"):
    writer.epochs(phase, rows(phase, 4))
  writer.close()
  written = (folder / "metrics.jsonl").read_bytes()
  shutil.rmtree(folder / "tensorboard")
  return written


ACCURACY = {
  "mean": 0.5,
  "std": 0.1,
  "interval": [0.4, 0.6],
  "per_seed": {"1": 0.4, "2": 0.6},
  "images": 100,
}
RUNS = [{"lr": lr, "weight_decay": 0.01, "seed": 1} for lr in (0.1, 1.0)]
RESULTS = {
  "task": "squares",
  "method": "vqt",
  "num_queries": 1,
  "backbone": "ViT-8x2/4 vit.npz",
  "weights": "0123",
  "image_size": [8, 8],
  "data": {
    "dataset": "squares",
    "num_classes": 3,
    "splits": {"test": {"slices": "test", "images": 100}},
  },
  "protocol": "vtab",
  "value_range": "-1..1",
  "resize": "bilinear",
  "batch_size": 8,
  "test_accuracy": ACCURACY,
  "chosen": {"lr": 0.1, "weight_decay": 0.01, "num_queries": 1},
  "tested": [
    {
      "name": name,
      "setting": {"lr": 0.1},
      "kept_share": [0.5, 0.25, 1.0],
      "test_accuracy": ACCURACY,
      "trained_parameters": 1000,
      "training_seconds": 1.5,
    }
    for name in ("all", "selected")
  ],
  "search": {
    "chosen": 1,
    "runs": RUNS,
    "val_accuracy": [0.5, None],
    "diverged": [1],
    "seconds": 1.5,
  },
  "selection": {
    "keep_fractions": [
      {"keep_fraction": share, "val_accuracy": 0.5} for share in (0.5, 1.0)
    ],
    "chosen": 0.5,
  },
  "best": None,
  "seeds": {
    "runs": RUNS,
    "history": [{"loss": [1.5, 2.5], "accuracy": [0.5, 0.25]}] * 3,
  },
  "trained_parameters": 1000,
  "seconds": {"training": 1.5, "epoch": 0.1, "test": 0.5, "process": 9.5},
  "memory": {"peak_bytes": 1, "step_bytes": None, "side_by_side": 2},
  "tuned_bytes": 1000,
  "test_classes": {
    "class": ["red", "green", "blue"],
    "images": [40, 60, 0],
    "right": [40, 60, 0],
    "predicted": [80, 110, 10],
  },
  "versions": {"jax": "0.10.2"},
  "device": "8 x cpu",
}


def write_results(folder):
  files.write_json(folder / "results.json", RESULTS)


def read_results(folder):
  found = results_lib.read(folder)
  summary = compare.summarize({"a": results_lib.read_to_compare(folder)})
  console = console_lib.Console(io.StringIO())
  run_table.show(console, folder, found)
  compare.show(console, summary)
  # Pictures take long: a tenth of them.
  if hashlib.sha256(json.dumps(found).encode()).digest()[0] < 25:
    run_figure.report(found, folder / "report.png")
    run_report.report(found, {"task": "squares"}, folder / "report.html")
    for name in ("report.png", "report.html"):
      (folder / name).unlink()
  return found, compare.to_csv(summary)


def write_predictions(folder):
  label = np.arange(3).repeat(RESULTS["test_classes"]["images"])
  wrong = (label + 1) % 3
  seeds, shares = zip(*ACCURACY["per_seed"].items())
  first = np.arange(len(label))
  each = [np.where(first < x * len(label), label, wrong) for x in shares]
  probability = np.linspace(0.4, 1, len(label), dtype=np.float32)
  results_lib.write_predictions(
    folder, seeds, label, np.stack([*each, label]), probability
  )


def read_predictions(folder):
  found = results_lib.read_predictions(folder, RESULTS)
  if found is None:
    raise errors.UserError("There are none, so the run is not paired.")
  return tuple(found)


def feature_file(folder):
  mesh = mesh_lib.make_mesh(-1, 1)
  layout = store.Layout(backbone().config, True, "bfloat16", mesh)
  return disk.FeatureFile(folder, "x", {"weights": "0"}, layout, IMAGES)


def write_features(folder):
  def extract(start):
    rng = np.random.default_rng(2)
    layout = feature_file(folder)._layout
    draw = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape))
    tokens = draw(layout.row[0], IMAGES, *layout.row[1:])
    yield {
      "final": draw(IMAGES, 8).astype(np.float32),
      "tokens": tokens.astype(layout.dtype),
    }

  feature_file(folder).write(extract, IMAGES)


def read_features(folder):
  try:
    found = feature_file(folder).open()
  except disk.DamagedFile as e:  # Then they are made again.
    raise errors.UserError(str(e)) from e
  if found is None:
    raise errors.UserError("There are none, so they are made.")
  sent = found.send(np.arange(IMAGES))
  return found.in_memory().tokens, found.final, np.asarray(sent["tokens"])


CONFIG = config_dict.default_config()
CONFIG.task, CONFIG.init = "digits", "vit.npz"


def write_config(folder):
  files.write_json(folder / "config.json", config_dict.to_json(CONFIG))
  (folder / "metrics.jsonl").write_bytes(files.json_line(rows("search", 2)[0]))


def read_config(folder):
  with workdir.open_workdir(CONFIG, folder):
    return "opened"


KINDS = {
  "npz": Kind(write_npz, read_backbone("vit.npz")),
  "npz, compressed": Kind(write_compressed, read_backbone("vit.npz")),
  "checkpoint.bv": Kind(write_zarr, read_backbone("checkpoint.bv")),
  "safetensors folder": Kind(write_folder, read_backbone(".")),
  "safetensors": Kind(write_safetensors, read_safetensors),
  "stages/": Kind(write_stage, read_stage),
  "features": Kind(write_features, read_features),
  "tuned/": Kind(write_tuned, read_tuned),
  "metrics.jsonl": Kind(write_metrics, read_metrics),
  "config.json": Kind(write_config, read_config),
  "results.json": Kind(write_results, read_results),
  "predictions": Kind(write_predictions, read_predictions),
}


# Mutations: content -> content.


def flip(content: bytes, rng: random.Random) -> bytes:
  changed = bytearray(content)
  for _ in range(rng.choice((1, 1, 1, 2, 9))):
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
  return content[: rng.randrange(len(content))]


def overwrite(content: bytes, rng: random.Random) -> bytes:
  start = rng.randrange(len(content))
  number = rng.choice((0, 2**31, 2**32 - 1, 2**60, 2**64 - 1))
  new = struct.pack("<Q", number)[: rng.choice((1, 2, 4, 8))]
  return content[:start] + new + content[start + len(new) :]


def move(content: bytes, rng: random.Random) -> bytes:
  """Removes, repeats or inserts a block."""
  a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
  new = rng.choice((b"", content[a:b] * 2, rng.randbytes(b - a)))
  return content[:a] + new + content[b:]


def mutate_json(content: bytes, rng: random.Random) -> bytes:
  value = json.loads(content)
  places = list(_places(value))
  if rng.random() < 0.05:
    return rng.choice(
      (b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"9" * 9999)
    )
  if not places:
    return json.dumps(rng.choice(VALUES)).encode()
  holder, key = rng.choice(places)
  match rng.randrange(4):
    case 0 if isinstance(holder, dict):
      del holder[key]
    case 1 if isinstance(holder, dict):
      holder[rng.choice(NAMES)] = holder.pop(key)
    case 2:
      other, place = rng.choice(places)
      with contextlib.suppress(KeyError, IndexError):
        holder[key] = json.loads(json.dumps(other[place]))
    case _:
      holder[key] = rng.choice(VALUES)
  return json.dumps(value).encode()


def _places(value: Any):
  """Yields (dict or list, key) of everything in a value of JSON."""
  items = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list):
    items = enumerate(value)
  for key, each in list(items):
    yield value, key
    yield from _places(each)


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
  lines = content.splitlines(keepends=True)
  line = rng.randrange(len(lines))
  lines[line] = mutate_json(lines[line], rng) + b"\n" * rng.randrange(3)
  return b"".join(lines)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
  end = 8 + int.from_bytes(content[:8], "little")
  header = mutate_json(content[8:end], rng)
  return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_npz(content: bytes, rng: random.Random) -> bytes:
  """Changes one part of a zip file, which is as good a zip file then."""
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    parts = [(name, archive.read(name)) for name in archive.namelist()]
    method = archive.infolist()[0].compress_type
  chosen = rng.randrange(len(parts))
  name, part = parts[chosen]
  array = np.load(io.BytesIO(part))
  match rng.randrange(6):
    case 0:
      parts[chosen] = rng.choice(NAMES[:6]) + ".npy", part
    case 1:
      parts.append((rng.choice(NAMES[:6]) + ".npy", part))
    case 2:
      del parts[chosen]
    case 3:
      spoilt = rng.choice(
        (array.astype(int), array > 0, array * np.nan, array.astype(np.float16),
         array[None], np.asfortranarray(array), array.astype("S3"))
      )  # fmt: skip
      out = io.BytesIO()
      np.save(out, spoilt)
      parts[chosen] = name, out.getvalue()
    case 4:
      header = {
        "descr": rng.choice(("<f4", "|O", "<i8", "V9999999", "<f2", "bad", [])),
        "fortran_order": rng.choice((True, False, 3)),
        "shape": rng.choice(
          ((2**60,), (2**20, 2**20), (-1,), (0,), (), (2**70,), array.shape, 3)
        ),
      }
      text = repr(header).ljust(117).encode() + b"\n"
      start = b"\x93NUMPY\1\0" + struct.pack("<H", len(text))
      parts[chosen] = name, start + text + part[-array.nbytes :]
    case _:
      parts[chosen] = name, rng.choice((flip, cut, overwrite, move))(part, rng)
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", method) as archive:
    for name, part in parts:
      archive.writestr(name, part)
  return out.getvalue()


def structured(path: pathlib.Path):
  """The mutation that knows what a file is, or None."""
  if path.name == ".zarray" or path.suffix == ".json":
    return mutate_json
  return {
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".npz": mutate_npz,
  }.get(path.suffix)


def replace(path: pathlib.Path, rng: random.Random) -> None:
  """Puts something else where a file was."""
  path.unlink()
  match rng.randrange(5):
    case 0:
      path.mkdir()
    case 1:
      os.mkfifo(path)
    case 2:
      path.symlink_to("/dev/zero")
    case 3:
      path.symlink_to(path.name)


def mutate(folder: pathlib.Path, rng: random.Random) -> str:
  """Changes a file in a folder; returns how."""
  everything = sorted(p for p in folder.rglob("*") if p.is_file())
  path = rng.choice(everything)
  content = path.read_bytes()
  ways = [flip, cut, overwrite, move, *[structured(path)] * 4, replace]
  way = rng.choice([way for way in ways if way])
  if way is replace:
    replace(path, rng)
  else:
    path.write_bytes(way(content, rng))
    info = path.with_name(bundle.INFO)
    if path.name == bundle.WEIGHTS and info.exists() and rng.random() < 0.8:
      told = json.loads(info.read_bytes())
      told["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
      info.write_text(json.dumps(told))
  return f"{way.__name__} {path.relative_to(folder)}"


# Reading.


def digest(value: Any) -> str:
  """Tells whether two values are the same, arrays included."""
  leaves = jax.tree_util.tree_leaves_with_path(value)
  sums = hashlib.sha256()
  for path, leaf in leaves:
    if isinstance(leaf, np.ndarray | jax.Array):
      array = np.asarray(leaf)
      leaf = (str(array.dtype), array.shape, array.tobytes())
    sums.update(repr((path, leaf)).encode())
  return sums.hexdigest()


def peak_bytes(reset: bool = False) -> int:
  if reset:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("VmHWM:")[1].split()[0])


def outside(root: pathlib.Path) -> dict[str, int]:
  """What must not change: everything beside the folder of the mutant."""
  return {
    str(p): p.stat().st_mtime_ns for p in root.iterdir() if p.name != "mutant"
  }


def read_mutants(root, kinds, seed, numbers, connection) -> None:
  """Reads mutants in this process; sends (number, kind, way, end, peak)."""
  size = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = size * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  warnings.simplefilter("ignore")  # Two parts of a zip file have one name.
  folder, good = root / "mutant", {}
  for name in kinds:
    kind = KINDS[name]
    shutil.copytree(root / name.replace("/", ""), folder)
    good[name] = digest(kind.read(folder))
    shutil.rmtree(folder)
  beside = outside(root)
  for number in numbers:
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(kinds)
    shutil.copytree(root / name.replace("/", ""), folder)
    way = mutate(folder, rng)
    connection.send((number, name, way, None, 0))
    before = peak_bytes(reset=True)
    try:
      found = digest(KINDS[name].read(folder))
      end = "same" if found == good[name] else "other"
    except errors.UserError as e:
      end = "sentence" if 10 < len(str(e)) < 20_000 else f"no sentence: {e}"
    except BaseException:
      end = "exception: " + traceback.format_exc()
    if outside(root) != beside:
      end = "wrote elsewhere"
    connection.send((number, name, way, end, peak_bytes() - before))
    shutil.rmtree(folder)


def run(
  mutants: int, seconds: float, seed: int, kinds: tuple[str, ...] = (*KINDS,)
) -> list[tuple]:
  """Reads mutants; returns (number, kind, way, how it ended, peak) of each."""
  ends, context = [], multiprocessing.get_context("spawn")
  until = time.monotonic() + seconds
  with tempfile.TemporaryDirectory(prefix="mutants_") as place:
    root = pathlib.Path(place)
    for name in kinds:
      kind = KINDS[name]
      (root / name.replace("/", "")).mkdir()
      kind.write(root / name.replace("/", ""))
    while len(ends) < mutants and time.monotonic() < until:
      ours, theirs = context.Pipe()
      numbers = range(len(ends), mutants)
      process = context.Process(
        target=read_mutants, args=(root, kinds, seed, numbers, theirs)
      )
      process.start()
      theirs.close()
      told = (len(ends), "?", "start", None, 0)
      with contextlib.suppress(EOFError):
        while len(ends) < mutants and time.monotonic() < until:
          waits = HANG_SECONDS if told[1] != "?" else 120
          if not ours.poll(waits):
            process.kill()
            ends.append((*told[:3], "hang", 0))
            break
          told = ours.recv()
          if told[3] is not None:
            ends.append(told)
      process.kill()
      process.join()
      if told[3] is None and len(ends) == told[0]:
        ends.append((*told[:3], f"died: {process.exitcode}", 0))
      shutil.rmtree(root / "mutant", ignore_errors=True)
      if told[1] == "?":
        raise SystemExit("The good files cannot be read.")
  return ends


def report(ends: list[tuple]) -> bool:
  """Prints a table; returns whether all ended well."""
  fine = ("same", "other", "sentence")
  counts = collections.Counter((kind, end) for _, kind, _, end, _ in ends)
  print(f"{'kind':19}{'mutants':>9}" + "".join(f"{end:>10}" for end in fine))
  for kind in KINDS:
    of_kind = [end for end in ends if end[1] == kind]
    each = "".join(f"{counts[kind, end]:10,}" for end in fine)
    print(f"{kind:19}{len(of_kind):9,}{each}")
  ways = collections.Counter(
    f"{kind}: {way.split()[0]}"
    for _, kind, way, end, _ in ends
    if end == "other"
  )
  print("other:", ", ".join(f"{way} {n:,}" for way, n in sorted(ways.items())))
  number, kind, way, _, peak = max(ends, key=lambda end: end[-1])
  print(f"most memory: {peak / 2**20:.0f} MiB, {kind}, {way}, number {number}")
  bad = [end for end in ends if end[3] not in fine]
  for number, kind, way, end, _ in bad[:50]:
    print(f"\n{number}: {kind}, {way}\n{end}")
  print(f"{len(ends):,} mutants, {len(bad):,} ended badly")
  return not bad


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--mutants", type=int, default=20_000)
  parser.add_argument("--seconds", type=float, default=3000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kind", action="append", choices=KINDS)
  args = parser.parse_args()
  kinds = tuple(args.kind or KINDS)
  ends = run(args.mutants, args.seconds, args.seed, kinds)
  return 0 if report(ends) and len(ends) == args.mutants else 1


if __name__ == "__main__":
  raise SystemExit(main())
