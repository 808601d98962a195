"""Head2Toe: features against NumPy, and the fraction that val picks."""

import signal

import jax
import numpy as np
import pytest

import main
from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.config import config_dict
from vqt_jax.features import disk
from vqt_jax.features import store
from vqt_jax.models import head
from vqt_jax.models import readers
from vqt_jax.models import vit_config
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import protocol
from vqt_jax.training import setup


@pytest.mark.parametrize(
  "variant, target_size, tokens",
  [
    ("B/16", 1, 197),
    ("B/16", 512, 197),
    ("B/16", 768, 197),
    ("B/16", 1536, 98),
    ("B/16", 8192, 18),  # 10 times; 17 tokens are left over.
    ("S/14", 8192, 12),
    ("B/16", 10**9, 1),
  ],
)
def test_windows_of_the_official_program(variant, target_size, tokens):
  sizes = vit_config.decode_variant(variant)
  config = vit_config.ViTConfig(**sizes, image_size=(224, 224))
  assert readers.window(config, target_size) == tokens


def reference(tokens, final, size, normalize=True):
  """Features (B, F), image by image, group by group."""
  norm = (lambda x: x / np.linalg.norm(x)) if normalize else lambda x: x
  rows = []
  for image, last in enumerate(final):
    groups = [norm(last)]
    for block in tokens[:, image]:
      starts = range(0, len(block) - size + 1, size)
      means = [block[start : start + size].mean(axis=0) for start in starts]
      groups.append(norm(np.concatenate(means)))
    rows.append(np.concatenate(groups))
  return np.stack(rows)


@pytest.mark.parametrize(
  "pool_type, target_size, size, normalize",
  [
    ("tok", 48, 3, True),
    ("gap", 64, 2, True),
    ("tok", 9, 10, False),
    ("tok", 999, 1, True),
  ],
)
def test_features_equal_numpy(pool_type, target_size, size, normalize):
  backbone = helpers.tiny_backbone(pool_type=pool_type)
  tuner = vqt_jax.make_tuner(
    "head2toe",
    backbone.config,
    5,
    target_size=target_size,
    normalize=normalize,
  )
  assert tuner.window == size
  images = helpers.tiny_examples(backbone, 4, 5)["image"]
  variables = helpers.random_variables(tuner)
  assert not variables["tuner"]
  out = vqt_jax.apply(backbone, tuner, variables, images)
  stream = jax.tree.map(np.asarray, backbone(images))
  expected = reference(stream.tokens, stream.final, size, normalize)
  assert expected.shape == (4, tuner.num_features)
  helpers.assert_close(out.features, expected, 1e-6)
  kernel, bias = (variables["head"][n] for n in ("kernel", "bias"))
  helpers.assert_close(out.logits, expected @ kernel + bias, 1e-5)
  assert out.queries is None


def test_prompts_are_in_no_window():
  backbone = helpers.tiny_backbone()
  options = dict(num_prompts=2)
  # A reader of single tokens gets the prompts as well.
  other = vqt_jax.make_tuner("vqt+vpt_deep", backbone, 5, **options)
  own = helpers.random_variables(other)["tuner"]
  images = helpers.tiny_examples(backbone, 2, 5)["image"]
  everything = {"tuner": own, "backbone": backbone.params}
  stream = jax.tree.map(np.asarray, jax.jit(other.stream)(everything, images))
  assert stream.tokens.shape[2] == 10 + 2
  tokens = np.delete(stream.tokens, [1, 2], axis=2)
  for target_size in (48, 999):
    options |= {"target_size": target_size}
    tuner = vqt_jax.make_tuner("head2toe+vpt_deep", backbone, 5, **options)
    variables = {**helpers.random_variables(tuner), "tuner": own}
    out = vqt_jax.apply(backbone, tuner, variables, images)
    expected = reference(tokens, stream.final, tuner.window)
    helpers.assert_close(out.features, expected, 1e-6)


def test_only_means_are_kept_in_their_own_file(tmp_path):
  config = helpers.tiny_config()
  sizes, files = [], []
  for window in (1, 3):
    mesh = mesh_lib.make_mesh()
    layout = store.Layout(config, True, "float32", mesh, window)
    sizes.append(layout.bytes_per_image)
    files.append(disk.FeatureFile(tmp_path, "x", {}, layout, 4))
  assert sizes == [4 * 16 * (3 * 10 + 1), 4 * 16 * (3 * 3 + 1)]
  assert files[0].path != files[1].path


def run(material, workdir, **changes):
  sizes = {"method": "head2toe", "target_size": 32, **changes}
  assert main.main(runs.command(material, workdir, **sizes)) == 0
  return runs.results(workdir)


def test_val_picks_the_fraction(material, tmp_path):
  """And what comes after is as if it had been given alone."""
  found = run(material, tmp_path / "several", keep_fraction="0.02,0.3,0.6")
  tried = found["selection"]["keep_fractions"]
  by_fraction = {f["keep_fraction"]: f["val_accuracy"] for f in tried}
  assert list(by_fraction) == [0.02, 0.3, 0.6]
  for share in by_fraction.values():
    assert 8 * share == pytest.approx(round(8 * share))
  keep = min(by_fraction, key=lambda f: (-by_fraction[f], -f))
  assert keep == found["selection"]["chosen"] != 0.02
  assert found["chosen"]["keep_fraction"] == keep
  assert set(found["chosen"]) == {"lr", "weight_decay", "keep_fraction"}
  assert found["num_queries"] == 0

  rows = runs.metrics(tmp_path / "several")
  for row in rows:  # Val is judged by, not trained on.
    if row["phase"].startswith("keep"):
      right = 40 * row["accuracy"]
      assert right == pytest.approx(round(right))
  tuner = vqt_jax.make_tuner("head2toe", helpers.tiny_config(), runs.CLASSES)
  config = config_dict.default_config()
  config.keep_fraction = (0.02, 0.3, 0.6)
  planned = [stage.name for stage in protocol.planned(config, tuner)]
  assert list(dict.fromkeys(row["phase"] for row in rows)) == planned
  everything, selected = found["tested"]
  features = 16 * (1 + 3 * 2)
  kept = int(features * keep)
  assert everything["trained_parameters"] == (features + 1) * runs.CLASSES
  assert selected["trained_parameters"] == (kept + 1) * runs.CLASSES
  final, *of_blocks = selected["kept_share"]
  total = 16 * final + 32 * sum(of_blocks)
  assert len(of_blocks) == 3 and total == pytest.approx(kept)
  assert everything["training_seconds"] > found["selection"]["seconds"]

  alone = run(material, tmp_path / "alone", keep_fraction=keep)
  assert alone["selection"] is None
  assert alone["test_accuracy"] == found["test_accuracy"]
  files = [
    runs.files(tmp_path / name, "tuned/**/*.safetensors")
    for name in ("several", "alone")
  ]
  assert files[0] == files[1] and len(files[0]) == 1


def test_one_device_trains_on_the_features_in_use(
  material, tmp_path, monkeypatch, capfd
):
  """Read once, stopped and resumed: the numbers are those of many devices."""
  changes = {
    "method": "head2toe",
    "target_size": 32,
    "keep_fraction": 0.2,
    "lr": "0.1,",
    "weight_decay": "0.01,",
  }
  many = run(material, tmp_path / "many", **changes)
  one = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  monkeypatch.setattr(setup, "find_mesh", lambda *args: one)
  argv = runs.command(material, tmp_path / "one", **changes)
  with monkeypatch.context() as patch:
    select = "vqt_jax.training.step:take_rows"  # In the stage selected.
    runs.signal_on_call(patch.setattr, select, 1, signal.SIGTERM)
    assert main.main(argv) == 75
  capfd.readouterr()
  assert main.main(argv) == 0
  said = capfd.readouterr().err
  assert "resume   selected after epoch 0" in said
  assert "as features of the head" in said
  losses = [
    [row["loss"] for row in runs.metrics(tmp_path / name)]
    for name in ("one", "many")
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-4)
  found = runs.results(tmp_path / "one")
  assert found["test_accuracy"] == many["test_accuracy"]


def test_the_best_protocol_tries_all_fractions(material, tmp_path):
  found = run(
    material,
    tmp_path,
    protocol="best",
    keep_fraction="0.2,0.5",
    lr="4.0,",
    best__keep_fractions="0.5,0.7",
    best__finalists=1,
    best__folds=2,
  )
  tried = [f["keep_fraction"] for f in found["best"]["keep_fractions"]]
  assert tried == [0.2, 0.5, 0.7, 1.0]
  assert found["best"]["searched"] == 1
  assert found["tested"][-1]["name"].startswith("best_")


def test_rows_of_a_head_that_are_stored():
  rows, kernel = np.array([1, 3], np.int32), np.ones((2, 4), np.float32)
  whole = head.spread_rows(rows, kernel, 5)
  np.testing.assert_array_equal(whole.sum(axis=1), [0, 4, 0, 4, 0])
  for bad in ([1], [1, 1], [3, 1], [-1, 3], [1, 5], [[1, 3]], [1.0, 3.0]):
    with pytest.raises(ValueError, match="expected increasing numbers"):
      head.spread_rows(np.array(bad), kernel, 5)
  with pytest.raises(ValueError, match="expected increasing numbers"):
    head.spread_rows(np.array([1, 2**64 - 1], np.uint64), kernel, 5)
