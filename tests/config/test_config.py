"""Configs: fields, presets, string arguments, and what is refused."""

import ast
import copy
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
import vqt_jax
from vqt_jax import data
from vqt_jax import errors
from vqt_jax.config import config_dict
from vqt_jax.config import fields as fields_lib
from vqt_jax.config import files as config_files
from vqt_jax.config import resolve
from vqt_jax.configs import digits
from vqt_jax.configs import folder as folder_config
from vqt_jax.configs import vtab as vtab_config
from vqt_jax.data import vtab
from vqt_jax.models import methods
from vqt_jax.models import readers
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit

ROOT = helpers.ROOT


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem
)
def test_every_shipped_config_builds(path):
  config = resolve.resolve(config_files.load(str(path)))
  assert f"--config configs/{path.name}" in path.read_text()
  assert resolve.resolve(config) == config


def test_every_field_is_read():
  read = set(fields_lib.TASK_FIELDS)  # Read by these names, all at once.
  read |= {n for n, field in fields_lib.FIELDS.items() if field.tuner_option}
  for path in (ROOT / "vqt_jax").rglob("*.py"):
    if path.name not in ("fields.py", "validate.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
          read.add(node.attr)
  assert {name.split(".")[-1] for name in fields_lib.FIELDS} - read <= {
    *readers.READERS,  # Of `reader_lr`.
    *data.SPLITS,  # Of `splits`.
  }


def test_defaults_are_those_of_make_tuner():
  """But the number of queries, which depends on the task."""
  tuner = vqt_jax.make_tuner("vqt", helpers.tiny_config(), 5)
  defaults = vars(tuner) | vars(tuner.options) | {"num_queries": 0}
  for name, field in fields_lib.FIELDS.items():
    if field.tuner_option:
      assert field.default == defaults[name], name


def test_defaults_are_the_noiseless_method_with_the_authors_recipe():
  c = config_dict.default_config()
  assert (c.method, c.num_queries, c.query_dropout) == ("vqt", 0, 0.1)
  assert c.embedding_dropout == 0
  assert (c.value_range, c.resize, c.gelu) == ("", "bilinear", "")
  resolved = resolve.resolve(c)
  assert resolved.lr == (1.0, 0.5, 0.25, 0.1, 0.05)
  assert len(resolved.lr) * len(resolved.weight_decay) == 20
  assert (resolved.optimizer, resolved.editor_rate) == ("adam", 1.0)
  assert c.seeds == (42, 44, 82, 100, 800)


def authors(**changes):
  config = config_dict.default_config()
  config.preset = "authors"
  config.update(changes)
  return config


def test_the_authors_preset_sets_their_oddities_and_their_recipe():
  c = resolve.resolve(authors(epochs=7, warmup_epochs=1, lr=(3.0,)))
  assert c.embedding_dropout == 0.1
  assert (c.resize, c.value_range) == ("legacy", "imagenet")
  assert (c.gelu, c.dtype) == ("exact", "float32")
  assert (c.epochs, c.warmup_epochs, c.schedule) == (100, 10, "epoch")
  assert c.lr == (1.0, 0.5, 0.25, 0.1, 0.05)
  assert c.weight_decay == (1e-2, 1e-3, 1e-4, 0.0)
  assert (c.batch_size, c.optimizer) == (128, "adam")


def test_the_authors_probe_linearly_without_noise():
  config = resolve.resolve(authors(method="linear"))
  assert config.embedding_dropout == 0


def test_a_preset_leaves_what_is_asked_for_and_is_applied_once():
  given = authors(epochs=7, warmup_epochs=1)
  config = resolve.resolve(given, keep=("epochs", "warmup_epochs"))
  assert (config.epochs, config.warmup_epochs) == (7, 1)
  assert config.embedding_dropout == 0.1
  assert resolve.resolve(config) == config
  assert given.preset == "authors"


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"method": "vqtt"}, "Unknown config.method 'vqtt'. Did you mean vqt?"),
    ({"method": "vqt+lra"}, "editor of config.method 'lra'. Did you mean"),
    ({"method": "lora", "features": "host"}, "use features=live"),
    ({"rank": 0}, "config.rank: expected at least 1"),
    ({"method": "head2to"}, "Did you mean head2toe?"),
    ({"target_size": 0}, "config.target_size: expected at least 1"),
    ({"keep_fraction": (0.0, 0.5)}, "0 stands for the default fraction"),
    ({"keep_fraction": (1.5,)}, "fraction: expected 0 to 1, found 1.5"),
    ({"optimizer": "adm"}, "Did you mean adam"),
    ({"schedule": "steps"}, "Did you mean step?"),
    ({"combine": "cat"}, "Known: concat, mean, weighted_sum"),
    ({"resize": "legcy"}, "Did you mean legacy?"),
    ({"value_range": "0.1"}, "config.value_range '0.1': expected one of -1..1"),
    ({"gelu": "erf"}, 'Known: "", tanh, exact'),
    ({"dtype": "float16"}, "Did you mean bfloat16"),
    ({"pool_type": "cls"}, "Unknown config.pool_type"),
    ({"features": "store"}, 'Known: "", device, host, disk, live'),
    ({"data": "disk"}, 'Known: "", device, stream'),
    ({"preset": "author"}, "Did you mean authors?"),
    ({"task": ""}, "config.task is empty"),
    ({"variant": "Q/16"}, "config.variant: Unknown ViT variant 'Q/16'"),
    ({"num_queries": -1}, "num_queries: expected at least 0, found -1"),
    ({"image_size": -1}, "config.image_size: expected at least 1"),
    ({"batch_size": 0}, "config.batch_size: expected at least 1"),
    ({"query_dropout": 1.0}, "expected 0 to 0.99, found 1.0"),
    ({"lr": (float("nan"),)}, "config.lr: expected at least 0, found nan"),
    ({"lr": (0.0, 0.1)}, "0 stands for the published rates"),
    ({"lr": ()}, "config.lr: expected numbers separated by commas"),
    ({"lr": ("a",)}, "found ('a',)"),
    ({"weight_decay": (-1.0,)}, "config.weight_decay: expected at least 0"),
    ({"seeds": (1.5,)}, "config.seeds: expected whole numbers"),
    ({"seeds": np.eye(2)}, "found array([[1., 0.], [0., 1.]])."),
    ({"epochs": 5.0}, "config.epochs: expected a whole number, found 5.0"),
    ({"epochs": True}, "config.epochs: expected a whole number, found Tr"),
    ({"task": None}, "config.task: expected text, found None"),
    ({"epoch": 3}, "Unknown config field 'epoch'. Did you mean epochs?"),
    ({"splits": {"trian": ""}}, "'splits.trian'. Did you mean splits"),
    ({"mesh": 3}, "config.mesh is a group of fields; set config.mesh.model"),
    ([], "config: expected default_config() with changes, or a dict"),
    ({"seeds": (1, 1)}, "holds the same value twice"),
    ({"warmup_epochs": 100}, "config.warmup_epochs=100 must be smaller"),
    ({"mesh": {"model": 0}}, "config.mesh.model: expected at least 1"),
    ({"search_seed": 7}, "config.search_seed=7: this field no longer exists"),
    (
      {"embedding_dropout": 0.1, "features": "host"},
      "cannot be stored: use features=live",
    ),
  ],
)
def test_bad_values_are_refused_in_words(changes, words):
  with pytest.raises(errors.UserError) as caught:
    resolve.resolve(changes)
  assert words in str(caught.value)


@pytest.mark.parametrize(
  "name, given, held",
  [
    ("lr", 1, (1.0,)),
    ("lr", [0.5, 1], (0.5, 1.0)),
    ("lr", np.array([0.5, 1]), (0.5, 1.0)),
    ("seeds", range(3), (0, 1, 2)),
    ("seeds", jnp.arange(3), (0, 1, 2)),
    ("best.num_queries", 3, (3,)),
    ("alpha", np.float32(2), 2.0),
    ("epochs", np.int64(3), 3),
    ("init", pathlib.Path("/a/b"), "/a/b"),
    ("splits.train", np.str_("train"), "train"),
  ],
)
def test_fields_take_what_stands_for_their_values(name, given, held):
  config = config_dict.default_config()
  config[name] = given
  assert repr(config[name]) == repr(held)
  assert copy.deepcopy(config) == config


def test_a_group_takes_what_changes_in_it():
  config = config_dict.default_config()
  config.splits = {"train": "train[:9]"}
  config.update(best={"folds": 3}, mesh={})
  config = copy.deepcopy(config)  # Which still knows the groups' names.
  with pytest.raises(errors.UserError, match="config.best.folds: expected"):
    config.best.folds = "5"
  with pytest.raises(errors.UserError, match="field 'best.fold'. Did you mean"):
    config.best.fold = 5
  assert (config.splits.train, config.splits.val) == ("train[:9]", "")
  assert (config.best.folds, config.best.finalists) == (3, 8)


def test_training_refuses_what_is_no_field(tmp_path):
  with pytest.raises(errors.UserError, match="Did you mean epochs?"):
    vqt_jax.train({"epoch": 3}, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_saved_config_is_the_same_again():
  config = resolve.resolve({"method": "lora", "epochs": 7, "seeds": 3})
  saved = json.loads(json.dumps(config_dict.to_json(config)))
  assert resolve.resolve(saved) == config


def test_the_config_of_a_run_is_a_config_file(tmp_path):
  path = tmp_path / "config.json"
  config = resolve.resolve({"method": "lora", "epochs": 7, "seeds": 3})
  path.write_text(json.dumps(config_dict.to_json(config)))
  assert resolve.resolve(config_files.load(str(path))) == config
  path.write_text("[]")
  with pytest.raises(errors.UserError, match="expected the config.json of"):
    config_files.load(str(path))


def test_a_config_of_an_earlier_version_is_read():
  config = resolve.resolve({"epochs": 7})
  old = config_dict.to_json(config)
  del old["remat"], old["best"]["folds"]  # As before there were such fields.
  old["mesh"]["data"], old["search_seed"] = 8, 100
  old["best"]["normalize"] = [True, False]
  assert resolve.resolve(old) == config
  assert not config_dict.differences(old, config_dict.to_json(config))


@pytest.mark.parametrize(
  "changes, epochs",
  [
    ({}, 10),
    ({"epochs": 30}, 3),
    ({"epochs": 5}, 0),
    ({"epochs": 5, "warmup_epochs": 2}, 2),
    ({"epochs": 5, "methods": "linear,vqt"}, 0),
  ],
)
def test_warm_up_is_a_tenth_unless_it_is_given(changes, epochs):
  assert resolve.resolve(changes).warmup_epochs == epochs


@pytest.mark.parametrize("images, epochs", [(1000, 40), (240, 100), (1, 200)])
def test_a_network_takes_steps_enough_however_few_the_images(images, epochs):
  config = resolve.resolve({"method": "auto"})
  assert config.epochs == 0  # Until the images are counted.
  filled = resolve.fill_epochs(config, images)
  assert (filled.epochs, filled.warmup_epochs) == (epochs, epochs // 10)
  given = resolve.resolve({"method": "auto", "epochs": 7})
  assert resolve.fill_epochs(given, images) == given
  config.warmup_epochs = epochs
  with pytest.raises(errors.UserError, match="nothing would be left to train"):
    resolve.fill_epochs(config, images)


def test_fields_that_do_not_exist_are_refused():
  config = config_dict.default_config().unlock()
  config.num_querys = 3
  with pytest.raises(errors.UserError, match="Did you mean num_queries"):
    resolve.resolve(config)


def test_missing_fields_are_refused():
  config = config_dict.default_config().unlock()
  del config.mesh.model
  with pytest.raises(errors.UserError, match="config.mesh.model is missing"):
    resolve.resolve(config)


@pytest.mark.parametrize(
  "name, words",
  [
    ("splits.trian", "Did you mean splits.train"),
    ("splits", "set config.splits.train"),
    ("zzz", "Unknown config field 'zzz'. Did you mean"),
  ],
)
def test_an_unknown_field_gets_the_nearest(name, words):
  with pytest.raises(errors.UserError) as caught:
    fields_lib.find(name)
  assert words in str(caught.value)


def test_string_arguments_have_the_types_of_their_defaults():
  parse = config_files.parse_arg
  defaults = {"task": "a", "n": 1, "x": 0.5, "on": False}
  assert parse(None, **defaults) == defaults
  assert parse("", **defaults) == defaults
  assert parse("n=3, x=2,on=true,task=gs://b/c=d", **defaults) == {
    "task": "gs://b/c=d",
    "n": 3,
    "x": 2.0,
    "on": True,
  }


@pytest.mark.parametrize(
  "arg, words",
  [
    ("tsak=dtd", "Unknown config argument 'tsak'. Did you mean task?"),
    ("n=ten", "expected n=value, with a whole number as the value"),
    ("task", "expected task=value"),
  ],
)
def test_bad_string_arguments_are_refused(arg, words):
  with pytest.raises(errors.UserError) as caught:
    config_files.parse_arg(arg, task="cifar100", n=1)
  assert words in str(caught.value)


def test_folder_takes_path_columns_backbone_and_method():
  c = folder_config.get_config(
    "path=birds.csv,label=species,image=file,fit=pad"
  )
  assert (c.task, c.fit, c.image_size) == ("./birds.csv", "pad", 28)
  assert (c.image_key, c.label_key, c.split_key) == ("file", "species", "")
  c = folder_config.get_config("path=~/photos,init=howto-i21k-S/16")
  assert (c.task, c.init, c.image_size) == ("~/photos", "howto-i21k-S/16", 224)
  assert resolve.resolve(folder_config.get_config("")).method == "auto"
  vqt = resolve.resolve(folder_config.get_config("method=vqt"))
  assert (len(vqt.lr), vqt.epochs) == (4, 50)
  first = resolve.resolve(folder_config.get_config("method=instant"))
  assert (first.solver, first.num_queries) == ("exact", 4)
  # No preset of a VTAB task of the same name.
  c = folder_config.get_config("path=svhn,method=vqt")
  assert resolve.resolve(c).num_queries == 1
  with pytest.raises(errors.UserError, match="Unknown config argument 'pth'"):
    folder_config.get_config("pth=photos")


def test_vtab_takes_task_variant_method_and_queries():
  c = vtab_config.get_config(
    "task=dtd,variant=S/16,method=linear,num_queries=10"
  )
  assert (c.task, c.method, c.num_queries) == ("dtd", "linear", 10)
  assert (c.init, c.variant) == ("howto-i21k-S/16", "S/16")
  c = vtab_config.get_config("init=ckpt.npz:img,preset=authors,data_dir=/d")
  assert (c.init, c.variant) == ("ckpt.npz:img", "")
  assert (c.preset, c.data_dir) == ("authors", "/d")


@pytest.mark.parametrize(
  "arg, num_queries, keep_fraction",
  [
    ("task=svhn", 20, (1.0,)),
    ("task=vtab-svhn", 20, (1.0,)),
    ("task=clevr_distance", 10, (1.0,)),
    ("task=dtd", 1, (0.7,)),
    ("task=dtd,num_queries=2", 2, (1.0,)),
    ("task=svhn,num_queries=1", 1, (0.7,)),
    ("task=cifar10", 1, (1.0,)),
    ("task=cifar10,num_queries=2", 2, (1.0,)),
    ("task=cifar10,method=linear", 1, (1.0,)),
    ("task=dtd,method=head2toe", 1, resolve.HEAD2TOE_KEEP),
    ("method=head2toe+lora", 1, resolve.HEAD2TOE_KEEP),
    ("task=all", 0, (0.0,)),
    ("task=all,num_queries=3", 3, (0.0,)),
  ],
)
def test_the_authors_queries_and_selection(arg, num_queries, keep_fraction):
  config = resolve.resolve(vtab_config.get_config(arg))
  assert config.num_queries == num_queries
  assert config.keep_fraction == keep_fraction
  assert resolve.resolve(config) == config


def test_editors_have_the_published_recipes():
  """And beside queries a fraction of their rates."""
  recipe = lambda name: tuple(resolve.recipe(methods.parse(name)).values())
  high, low = recipe("vpt_deep"), recipe("lora")
  assert high[0] == "sgd" and max(high[1]) == 50.0 and high[2] == 1.0
  assert low == ("adamw", (5e-3, 1e-3, 5e-4, 1e-4), 1.0)
  assert recipe("linear+lora") == low
  assert recipe("vqt+lora") == (*recipe("vqt")[:2], 0.01)
  assert recipe("head2toe") == ("adam", (0.2, 0.02), 1.0)
  assert recipe("head2toe+lora") == ("adam", (0.2, 0.02), 0.01)
  config = config_dict.default_config()
  config.update(method="lora", lr=(0.5,), optimizer="sgd")
  config = resolve.resolve(config)
  assert (config.lr, config.optimizer) == ((0.5,), "sgd")


@pytest.mark.parametrize("arg", ["", "num_queries=3,method=linear", "preset="])
def test_all_tasks_have_the_configs_they_have_alone(arg):
  get_config = vtab_config.get_config
  config = get_config(f"task=all,{arg}")
  config.preset = "authors"
  config = resolve.resolve(config, keep=("num_queries",))
  for name in ("dtd", "svhn"):
    alone = get_config(f"task={name},{arg}")
    alone.preset = "authors"
    assert resolve.config_for(config, task=name) == resolve.resolve(alone)


def test_all_tasks_are_taken_as_they_are():
  config = vtab_config.get_config("task=all")
  config.image_key, config.splits.val = "image", "train[:9]"
  with pytest.raises(errors.UserError) as caught:
    resolve.resolve(config)
  assert "leave config.image_key, config.splits.val empty" in str(caught.value)


def test_the_authors_queries_are_of_tasks():
  assert set(vtab.NUM_QUERIES) <= set(vtab.VTAB)


def test_digits_needs_no_folder():
  config = digits.get_config("method=linear")
  assert (config.task, config.method) == ("digits", "linear")
  assert pathlib.Path(config.init).is_absolute()


@pytest.mark.parametrize(
  "method",
  [
    "linear",
    "vqt+lora",
    "head2toe+vpt_deep",
    "vpt_shallow",
    "adapter",
    "adaptformer",
    "partial",
  ],
)
def test_a_method_computes_with_the_fields_it_uses_and_no_others(method):
  changes = {
    "num_queries": 3,
    "combine": "mean",
    "normalize": False,
    "target_size": 32,
    "num_prompts": 3,
    "bottleneck": 3,
    "rank": 3,
    "alpha": 3.0,
    "last_blocks": 2,
  }
  assert all(fields_lib.FIELDS[name].used_by for name in changes)
  images = jax.ShapeDtypeStruct((2, 12, 12, 3), jnp.float32)

  def computes(**changed):
    """The program from images to logits, as text."""
    config = config_dict.default_config()
    config.update({"method": method, "num_queries": 2, **changed})
    tuner = tuner_lib.make_tuner(
      method, helpers.tiny_config(), 5, **fields_lib.tuner_options(config)
    )
    params = vit.param_shapes(tuner.config)

    def forward(params, images):
      variables = tuner.init(jax.random.key(0), params) | {"backbone": params}
      stream = tuner.stream(variables, images)
      return tuner(variables, stream.tokens, stream.final).logits

    return str(jax.make_jaxpr(forward)(params, images))

  parsed = methods.parse(method)
  used = {n: x for n, x in changes.items() if fields_lib.is_used(n, parsed)}
  others = {n: x for n, x in changes.items() if n not in used}
  plain = computes()
  assert computes(**others) == plain
  for name, value in used.items():
    assert computes(**{name: value}) != plain, name


def test_json_and_differences():
  old = config_dict.default_config()
  new = resolve.resolve(old)
  new.epochs = 7
  new.splits.test = "test[:9]"
  new.lr = (0.1,)
  as_json = config_dict.to_json(new)
  assert json.loads(json.dumps(as_json)) == as_json
  assert config_dict.differences(config_dict.to_json(old), as_json) == {
    "epochs": (0, 7),
    "warmup_epochs": (-1, 10),
    "keep_fraction": ([0.0], [0.7]),
    "num_queries": (0, 1),
    "lr": ([0.0], [0.1]),
    "optimizer": ("", "adam"),
    "editor_rate": (0.0, 1.0),
    "splits.test": ("", "test[:9]"),
  }
