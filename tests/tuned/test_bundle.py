"""Bundles: what is written is read, what is damaged or foreign is refused."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests import helpers
from tests import runs
import vqt_jax
from vqt_jax.tuned import bundle
from vqt_jax.tuned import card

CLASSES = 3


@pytest.fixture
def made(tmp_path):
  """A model of two seeds, its backbone's file, and its bundle."""
  backbone = helpers.tiny_backbone(depth=1)
  vqt_jax.save_npz(tmp_path / "vit.npz", backbone)
  tuner = vqt_jax.make_tuner("vqt", backbone, CLASSES, num_queries=2)
  seeds = [tuner.init(jax.random.key(seed)) for seed in range(2)]
  model = helpers.tuned_model(backbone, tuner, *seeds)
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit.npz", model)
  return tmp_path / "tuned", model


def change(folder, **changes):
  info = runs.read_json(folder / "bundle.json")
  (folder / "bundle.json").write_text(json.dumps(info | changes))


def test_what_is_written_is_read(made):
  folder, model = made
  helpers.write_bundle(folder, "vit.npz", model)  # Replaces the first.
  found = bundle.read(folder)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, found.variables, model.variables)
  )
  assert model.info.items() <= found.info.items()
  assert sorted(os.listdir(folder)) == [
    "README.md",
    "bundle.json",
    "model.safetensors",
  ]
  assert sorted(os.listdir(folder.parent)) == ["tuned", "vit.npz"]


def test_no_path_of_the_machine_is_in_it(made):
  folder, _ = made
  for content in runs.files(folder).values():
    assert os.fsencode(folder.parent) not in content


def test_nothing_else_is_replaced(made, tmp_path):
  _, model = made
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("mine")
  with pytest.raises(vqt_jax.UserError, match="other things .notes.txt"):
    helpers.write_bundle(tmp_path / "mine", "vit.npz", model)
  assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_selected_features_are_the_only_rows(made, tmp_path):
  _, model = made
  mask = np.zeros((2, model.tuner.num_features))
  mask[0, [1, 5]] = mask[1, [0, 40]] = 1
  bundle.write(
    tmp_path / "selected",
    str(tmp_path / "vit.npz"),
    model.backbone,
    model.tuner,
    model.variables,
    model.info,
    mask,
  )
  head = bundle.read(tmp_path / "selected").variables["head"]
  np.testing.assert_array_equal(head["features"], [[1, 5], [0, 40]])
  kernel = vqt_jax.load(tmp_path / "selected").variables["head"]["kernel"]
  expected = model.variables["head"]["kernel"] * mask[..., None]
  np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize(
  "rows",
  [
    [[1, 1], [2, 3]],
    [[-1, 2], [2, 3]],
    [[1, 2], [2, 999]],
    [[2, 1], [2, 3]],
    [[1], [2]],
    [[1.0, 2.0], [2.0, 3.0]],
  ],
)
def test_rows_that_are_no_features(made, tmp_path, rows):
  _, model = made
  head = dict(model.variables["head"])
  rows = np.array(rows)
  rows = rows.astype(np.int32) if rows.dtype == int else rows
  head |= {"kernel": head["kernel"][:, :2], "features": rows}
  variables = {**model.variables, "head": head}
  model = dataclasses.replace(model, variables=variables)
  helpers.write_bundle(tmp_path / "tuned", tmp_path / "vit.npz", model)
  with pytest.raises(vqt_jax.UserError, match="model.safetensors: "):
    vqt_jax.load(tmp_path / "tuned")


def test_damaged_bundles(made):
  folder, _ = made
  weights = folder / "model.safetensors"
  content = weights.read_bytes()
  weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(vqt_jax.UserError, match="is damaged, or of another bund"):
    bundle.read(folder)
  weights.write_bytes(content[:-8])
  with pytest.raises(vqt_jax.UserError, match="is damaged, or of another bund"):
    bundle.read(folder)
  weights.unlink()
  with pytest.raises(vqt_jax.UserError, match="There is no .*safetensors"):
    bundle.read(folder)
  (folder / "bundle.json").write_text("{")
  with pytest.raises(vqt_jax.UserError, match="Cannot read .*bundle.json"):
    bundle.read(folder)
  (folder / "bundle.json").write_text("[]")
  with pytest.raises(vqt_jax.UserError, match="Cannot read .*bundle.json"):
    bundle.read(folder)


def test_a_later_format(made):
  folder, _ = made
  change(folder, format=2, program="vqt_jax 9.0")
  with pytest.raises(
    vqt_jax.UserError, match="format 2, written by vqt_jax 9.0; .* newer vqt_"
  ):
    bundle.read(folder)


@pytest.mark.parametrize(
  "changes",
  [
    {"classes": None},
    {"classes": [1, 2, 3]},
    {"seeds": [1]},
    {"seeds": "ab"},
    {"tuner": {"method": "vqt"}},
    {"tuner": {"method": "vqt", "options": {}, "config": 1}},
    {"tuner": {"method": "vqt", "options": {"secret": 1}}},
    {"backbone": {}},
    {"backbone": {"source": 3}},
    {"backbone": "vit.npz"},
    {"preprocessing": {}},
    {"preprocessing": {"image_size": "x", "value_range": 1, "resize": 2}},
    {"preprocessing": {"image_size": [12, 12], "value_range": "-1..1", "x": 1}},
    {"preprocessing": {"image_size": [1.5, 12], "value_range": "-1..1"}},
    {
      "preprocessing": {
        "image_size": [12, 12],
        "value_range": "-1..1",
        "fit": "zoom",
      }
    },
    {"results": 3},
  ],
  ids=str,
)
def test_fields_of_another_kind(made, changes):
  folder, _ = made
  change(folder, **changes)
  with pytest.raises(vqt_jax.UserError):
    vqt_jax.load(folder)


@pytest.mark.parametrize("name", ["cache_dir", "progress", "subtree"])
def test_only_known_settings_reach_the_backbone(made, name):
  """A file cannot choose where downloads go, or what else happens."""
  folder, _ = made
  info = runs.read_json(folder / "bundle.json")
  change(folder, backbone=info["backbone"] | {name: "/tmp/elsewhere"})
  assert vqt_jax.load(folder).backbone.config.depth == 1


def test_places_without_a_model(made, tmp_path):
  for place, words in (
    (tmp_path / "none", "there is no such folder"),
    (tmp_path, "no bundle.json"),
  ):
    (tmp_path / "tuned" / "bundle.json").unlink(missing_ok=True)
    with pytest.raises(vqt_jax.UserError, match=f"no tuned model: .*{words}"):
      vqt_jax.load(place)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(vqt_jax.UserError, match="its run is not finished"):
    vqt_jax.load(tmp_path)


def write_old(folder, source, model, seed=7, **changes):
  """A folder of one seed, as versions before 0.3 wrote it."""
  c = model.backbone.config
  flat = runs.flat(jax.tree.map(lambda x: x[0], model.variables))
  names = {k: k[2:-2].replace("']['", "/") for k in flat}
  folder.mkdir(parents=True)
  safetensors.numpy.save_file(
    {names[k]: np.asarray(v) for k, v in flat.items()},
    folder / "variables.safetensors",
  )
  info = {
    "method": model.tuner.method,
    "num_classes": model.tuner.num_classes,
    "num_queries": model.tuner.num_queries,
    "normalize": model.tuner.normalize,
    "combine": model.tuner.combine,
    "target_size": model.tuner.target_size,
    "options": dataclasses.asdict(model.tuner.options),
    "backbone": {
      "source": source,
      "path": None,
      "variant": c.variant,
      "image_size": list(c.image_size),
      "trained_size": None,
      "pool_type": c.pool_type,
      "gelu": c.gelu,
      "value_range": "-1..1",
      "sha256": model.backbone.identity,
    },
    "resize": "legacy",
    "seed": seed,
  }
  info = {k: v for k, v in (info | changes).items() if v is not None}
  (folder / "info.json").write_text(json.dumps(info))


def test_folders_of_single_seeds_load(made, tmp_path):
  _, model = made
  images = helpers.tiny_examples(model.backbone, 3, CLASSES)["image"]
  source = str(tmp_path / "vit.npz")
  for i, seed in enumerate((7, 8)):
    one = model.of_seed(i)
    write_old(tmp_path / "old" / f"seed_{seed}", source, one, seed)
  for place, expected in (
    (tmp_path / "old", model),
    (tmp_path / "old" / "seed_8", model.of_seed(1)),
  ):
    found = vqt_jax.load(place, backbone=source)
    np.testing.assert_array_equal(found(images), expected(images))
    assert found.info["preprocessing"]["resize"] == "legacy"
    assert found.classes == ("0", "1", "2")
  # The oldest have neither a target size nor a digest, nor options.
  write_old(tmp_path / "1", source, model, options=None, target_size=None)
  assert vqt_jax.load(tmp_path / "1", source).tuner == model.tuner
  write_old(tmp_path / "2", source, model, method=None)
  with pytest.raises(vqt_jax.UserError):
    vqt_jax.load(tmp_path / "2", source)


def test_the_card_is_in_words(made):
  folder, model = made
  text = (folder / "README.md").read_text()
  for words in ("3 classes", "2 seeds", "`vit.npz`", "| 50.00 (one seed); 10 "):
    assert words in text
  info = bundle.read(folder).info | {"classes": ["a|b", "<c>\n# d"]}
  assert "| a\\|b, \\<c\\> \\# d |" in card.model_card(info)
