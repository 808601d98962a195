"""Names of methods: a reader, an editor, or both."""

import dataclasses

from vqt_jax import errors
from vqt_jax.models import editors
from vqt_jax.models import readers

# Readers alone, and editors with the linear reader.
NAMES = (*readers.READERS, *editors.EDITORS)
# Stands for all of `NAMES`, and for these pairs.
ALL = "all"
PAIRS = ("vqt+vpt_deep", "vqt+adaptformer")


@dataclasses.dataclass(frozen=True)
class Method:
  """A reader and an editor, by their names.

  Attributes:
    reader: key of `readers.READERS`.
    editor: key of `editors.EDITORS`; None if the stream stays frozen.
  """

  reader: str
  editor: str | None = None

  @property
  def trains_network(self) -> bool:
    """True if a network with a recipe of its own reads the stream."""
    reader = readers.READERS[self.reader]
    return reader.is_network or bool(reader.members)

  @property
  def has_queries(self) -> bool:
    """True if queries that learn attend to tokens."""
    return readers.READERS[self.reader].has_queries

  @property
  def may_be_exact(self) -> bool:
    """True if the head is all that is fitted, so that it can be computed."""
    reader = readers.READERS[self.reader]
    trains = reader.init and not reader.is_fixed
    return not (self.editor or trains or reader.members)


def parse(name: str, kind: str = "method") -> Method:
  """Parse a method's name.

  Args:
    name: a reader ("vqt"), an editor, which the linear reader reads ("lora"),
      or READER+EDITOR ("vqt+lora").
    kind: noun for the name in error messages.

  Raises:
    UserError: the name is unknown; the message suggests the nearest ones. Or
      the reader takes no editor.
  """
  reader, plus, editor = name.partition("+")
  if not plus:
    if name in readers.READERS:
      return Method(name)
    if name in editors.EDITORS:
      return Method("linear", name)
    raise errors.unknown_name(kind, name, NAMES)
  if reader not in readers.READERS:
    raise errors.unknown_name(f"reader of {kind}", reader, readers.READERS)
  if editor not in editors.EDITORS:
    raise errors.unknown_name(f"editor of {kind}", editor, editors.EDITORS)
  if members := readers.READERS[reader].members:
    raise errors.UserError(
      f"{kind} {name}: an editor changes the stream, which the readers of"
      f" {reader} share. Take {editor} beside one of them, e.g."
      f" {members[-1]}+{editor}."
    )
  if readers.READERS[reader].is_fixed:
    raise errors.UserError(
      f"{kind} {name}: an editor learns by gradients, but {reader} computes its"
      f" head from the frozen stream. Take {reader} alone, or {editor}."
    )
  return Method(reader, editor)


def split_list(names: str, kind: str = "methods") -> tuple[str, ...]:
  """Split a list of methods into their names.

  Args:
    names: separated by commas; "all" stands for `NAMES` and `PAIRS`.
    kind: noun for the list in error messages.

  Raises:
    UserError: a name is unknown or occurs twice.
  """
  if names == ALL:
    return NAMES + PAIRS
  found = tuple(name.strip() for name in names.split(","))
  for i, name in enumerate(found):
    parse(name, kind)
    if name in found[:i]:
      raise errors.UserError(f"{kind}={names} names {name} twice.")
  return found
