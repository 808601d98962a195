"""Imports run one way: from the command line down to arrays."""

import ast
import graphlib
import itertools
import pathlib

import pytest

import vqt_jax

ROOT = pathlib.Path(vqt_jax.__file__).parent
# Each room may import those below it.
FLOORS = (
  (
    "__init__",
    "__main__",
    "classifier",
    "cli",
    "compare",
    "evaluate",
    "export",
    "predict",
    "serve",
    "share",
  ),
  ("experiments",),
  ("planning", "reports", "serving"),
  ("training",),
  ("features", "results", "tuned"),
  ("config",),
  ("data", "checkpoints"),
  ("models",),
  ("runtime",),
  ("accuracy", "errors", "version"),
)


def _modules():
  for path in sorted(ROOT.rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if not name.startswith("configs."):
      yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def _imports(tree):
  """(name, whether it is imported late) of everything that is imported.

  What is imported lazily stands at the top too, in a `with`.
  """
  blocks = [each.body for each in tree.body if isinstance(each, ast.With)]
  top = {*tree.body, *itertools.chain.from_iterable(blocks)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((each.name, node not in top) for each in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative import"
      yield from (
        (f"{node.module}.{each.name}", node not in top) for each in node.names
      )


MODULES = dict(_modules())


def _own(name):
  """The module of ours that an import leads to, or None."""
  parts = name.split(".")
  if parts[0] != "vqt_jax":
    return None
  for end in range(len(parts), 1, -1):
    if (module := ".".join(parts[1:end])) in MODULES:
      return module
  return "__init__"


def _floor(module):
  room = module.split(".")[0]
  return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_above(module):
  room = module.split(".")[0]
  for name, _ in _imports(MODULES[module]):
    target = _own(name)
    if target is None or module == "__init__" or target == "__init__":
      continue
    if target.split(".")[0] != room:
      assert _floor(target) > _floor(module), f"{module} imports {target}"


def test_no_imports_run_in_a_circle():
  graph = {
    module: {_own(name) for name, _ in _imports(tree)} - {None, module}
    for module, tree in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # Raises a `CycleError`.


@pytest.mark.parametrize("module", MODULES)
def test_only_libraries_are_imported_late(module):
  """And a TFDS builder, which needs TFDS."""
  for name, late in _imports(MODULES[module]):
    assert not late or _own(name) in (None, "data.digits"), name
