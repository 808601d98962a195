"""Programs are kept for later processes, and only where that is safe."""

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

import main
from tests import helpers
import vqt_jax
from vqt_jax import predict
from vqt_jax.runtime import compiled


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The cache folder; JAX is as if no variable had said where programs go."""
  names = [
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
  ]
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  monkeypatch.setenv("VQT_JAX_CACHE", str(tmp_path / "cache"))
  yield tmp_path / "cache"
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def gradients():
  """Of a tuner, from a program that is compiled or found each time."""
  backbone = helpers.tiny_backbone(depth=1)
  tuner = vqt_jax.make_tuner("vqt", backbone, 3)
  images = helpers.tiny_examples(backbone, 4, 3)["image"]

  @jax.jit
  def run(variables):
    output = vqt_jax.apply(backbone, tuner, variables, images)
    return output.logits.std()

  return jax.grad(run)(tuner.init(jax.random.key(0)))


def test_programs_that_are_found_give_the_same_bits(cache):
  compiled.keep_programs()
  first, found = gradients(), []
  (folder,) = cache.glob("programs/*")
  kept = {path.name for path in folder.glob("*-cache")}

  def listen(name, **_):
    found.append(name.endswith("/cache_hits"))

  jax.monitoring.register_event_listener(listen)
  second = gradients()
  jax.monitoring.unregister_event_listener(listen)
  assert any(found)
  jax.tree.map(np.testing.assert_array_equal, first, second)

  (folder / "killed-cache").write_bytes(b"half")
  jax.config.update("jax_compilation_cache_dir", None)
  compiled.keep_programs()
  assert {path.name for path in folder.glob("*-cache")} == kept


@pytest.mark.parametrize(
  "why", ["chosen", "off", "a file", "no home", "writable"]
)
def test_programs_are_not_kept(why, cache, tmp_path, monkeypatch):
  """Elsewhere than the user says, without a folder, or with one of others."""
  kept = None
  if why == "chosen":
    kept = str(tmp_path)
    jax.config.update("jax_compilation_cache_dir", kept)
  elif why == "off":
    jax.config.update("jax_enable_compilation_cache", False)
  elif why == "a file":
    cache.touch()
  elif why == "no home":
    monkeypatch.setenv("VQT_JAX_CACHE", "~nobody_of_this_name/cache")
  else:
    monkeypatch.setattr(compiled, "_processor", lambda: "x")
    (cache / "programs" / "x").mkdir(parents=True)
    (cache / "programs" / "x").chmod(0o770)
  compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir == kept


def test_command_lines_keep_programs(monkeypatch, tmp_path):
  kept = []
  monkeypatch.setattr(compiled, "keep_programs", lambda: kept.append(None))
  argv = ["main.py", "--config=vtab", f"--workdir={tmp_path}"]
  assert main.main([*argv, "--num_processes=2"]) == 2
  assert predict.main(["predict", str(tmp_path)]) == 2
  assert len(kept) == 2
