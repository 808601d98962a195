"""`--plan`: what is compiled ahead of time is what a run then calls."""

import collections
import dataclasses

import jax
from jax.experimental import topologies
import pytest

import main
from tests import runs
import vqt_jax
from vqt_jax import cli
from vqt_jax.config import config_dict
from vqt_jax.config import resolve
from vqt_jax.features import store
from vqt_jax.planning import plan
from vqt_jax.planning import programs
from vqt_jax.planning import tpus
from vqt_jax.runtime import memory
from vqt_jax.runtime import mesh
from vqt_jax.training import step as step_lib


def said(capfd, argv):
  """Exit status and what was said of a command line with --plan."""
  argv = [arg for arg in argv if not arg.startswith("--workdir")]
  status = main.main(argv)
  return status, capfd.readouterr().err


def planned(material, tmp_path, where="here", **changes):
  """What the command line of a run would plan."""
  values = cli.parse(runs.command(material, tmp_path, **changes))
  config = resolve.resolve(values.config)
  return config, plan.make_context(config, where)


def test_plan_of_this_machine(material, tmp_path, capfd):
  """Four devices; nothing is written, and no images are read."""
  argv = runs.command(material, tmp_path / "run")
  status, text = said(capfd, [*argv, "--plan=here"])
  assert status == 0
  assert "4 x cpu, data 4 x model 1" in text
  for name in ("extraction", "search", "seeds", "test"):
    assert f"\n{name} " in text
  assert "all-reduce" in text and "verdict  it fits" in text
  assert "batch    40 images fit: all there are" in text
  assert not (tmp_path / "run").exists()


def test_what_does_not_fit_exits_with_3(material, tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(memory, "device_memory", lambda: 10_000)
  monkeypatch.setattr(plan, "TRIES", 2)
  argv = runs.command(material, tmp_path, method="linear")
  status, text = said(capfd, [*argv, "--plan=here"])
  assert status == 3
  assert "verdict  it does not fit: " in text
  assert text.endswith("spread the backbone: --config.mesh.model=2, or more\n")
  assert "batch    no batch was found that fits" in text


def test_weights_count_as_far_as_a_device_holds_them(material, tmp_path):
  parts = []
  for model in (1, 2):
    _, job = planned(material, tmp_path, mesh__model=model)
    parts.append(plan.measure(programs.extraction(job), job.mesh).memory)
  assert parts[1]["weights"] < 0.7 * parts[0]["weights"]


def test_keys_and_values_of_one_cpu(material, tmp_path):
  """As the run itself would hold them."""
  _, job = planned(material, tmp_path)
  one = dataclasses.replace(job, mesh=mesh.make_mesh(1, 1, jax.devices()[:1]))
  small = dataclasses.replace(one, available=9)
  for each, ndim in ((job, 4), (one, 6), (small, 4)):
    data = programs.search(each).data
    assert data["tokens"].ndim == ndim
  assert plan.measure(programs.search(one), one.mesh).memory


@pytest.mark.parametrize(
  "changes",
  [
    {"keep_fraction": 0.5},
    {"lr": "4.0,", "features": "host", "query_dropout": 0.0},
    {"lr": "4.0,", "method": "linear", "features": "live"},
    {
      "lr": "4.0,",
      "method": "linear",
      "features": "live",
      "data": "stream",
      "batch_size": 16,
    },
  ],
  ids=str,
)
def test_planned_is_called(material, tmp_path, monkeypatch, changes):
  """Same functions, with arguments of the same shapes in the same places."""
  changes = {"epochs": 2, "seeds": "7,8,9"} | changes
  config, job = planned(material, tmp_path, **changes)
  called = collections.defaultdict(list)

  def watch(module, name, program):
    original = getattr(module, name)

    def wrapped(*args):
      called[program(args)].append(signature(args))
      return original(*args)

    wrapped.lower = original.lower
    monkeypatch.setattr(module, name, wrapped)

  phases = {2: "search", 3: "seeds"}  # By the number of runs.
  watch(step_lib, "train_steps", lambda args: phases[len(args[2].key)])
  watch(step_lib, "eval_steps", lambda args: "test")
  runner = store.extractor(job.layout)

  def extract(*args):
    called["extraction"].append(signature(args))
    return runner(*args)

  monkeypatch.setattr(store, "extractor", lambda layout: extract)
  vqt_jax.train(config, tmp_path / "run")
  monkeypatch.undo()
  for program in programs.all_programs(job):
    calls = called.pop(program.name)
    found = calls[-1 if program.name == "test" else 0]
    for mine, theirs in zip(signature(program.args), found, strict=True):
      assert mine == theirs, program.name
  assert not called


def signature(args):
  """Static arguments as they are; types, shapes and places of others."""
  return [
    describe(leaf)
    for arg in args
    for leaf in jax.tree.leaves(arg) or [arg]  # Holes have none.
  ]


def describe(leaf):
  if not hasattr(leaf, "shape"):
    return leaf
  place = leaf.sharding.spec if isinstance(leaf, jax.Array) else None
  if isinstance(leaf, jax.ShapeDtypeStruct):
    place = leaf.sharding.spec
  # Numpy arrays go wherever they are wanted: to all devices.
  place = [axis for axis in place or [] if axis] and tuple(place)
  return leaf.shape, str(leaf.dtype), place or ()


def test_no_compiler_for_tpus(material, tmp_path, capfd, monkeypatch):
  def missing(*args, **kwargs):
    raise RuntimeError("libtpu.so is not installed")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  argv = runs.command(material, tmp_path)
  status, text = said(capfd, [*argv, "--plan=v5e:4x4"])
  assert status == 2
  assert text.startswith("error: libtpu, which holds the compiler for TPUs")
  assert "pip install" in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
  "where, words",
  [
    ("v5e:3x3", "Unknown slice 'v5e:3x3'. There are: v5e:1x1, v5e:2x2"),
    ("v5e", "Unknown slice 'v5e'"),
    ("v9:2x2", "Unknown kind of TPU 'v9'. Known: v4, v5e"),
    ("hare", "Did you mean here?"),
  ],
)
def test_slices_that_are_not(material, tmp_path, capfd, where, words):
  argv = runs.command(material, tmp_path)
  status, text = said(capfd, [*argv, f"--plan={where}"])
  assert status == 2
  assert text.startswith("error: ") and words in text


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"methods": "linear,vqt"}, "is for one method: add e.g. --config.me"),
    ({"mesh__model": 4}, "mesh model=4 cannot share the 2 attention heads"),
  ],
)
def test_what_a_run_refuses_has_no_plan(material, tmp_path, changes, words):
  argv = runs.command(material, tmp_path, **changes)
  config = resolve.resolve(cli.parse(argv).config)
  with pytest.raises(ValueError, match=words):
    plan.make_context(config, "here")


def test_all_tasks_have_no_plan():
  config = config_dict.default_config()
  config.task = "all"
  with pytest.raises(ValueError, match="A plan is for one task"):
    plan.make_context(resolve.resolve(config), "here")


def test_what_bounds_a_step(material, tmp_path):
  """The slowest of three, each by the chip's own figure."""
  _, job = planned(material, tmp_path)
  needs = plan.measure(programs.search(job), job.mesh)
  assert needs.seconds(job.chip) is None  # Of a CPU nothing is known.
  chip = dataclasses.replace(tpus.CHIPS["v5e"], flops=1.0)
  seconds = needs.seconds(chip)
  assert max(seconds, key=seconds.get) == "arithmetic"
  assert seconds["arithmetic"] == needs.flops > 0
  assert seconds["links"] == needs.sent / 200e9 > 0
