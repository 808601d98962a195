"""Data movement of a compiled program, read from its HLO text.

Bytes between devices (`collectives`) and between a device and its main memory
(`traffic`); the body of a loop counts once per iteration.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
)
# Targets of custom calls that move nothing.
_PLACES = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
# Names of values that are there already, or loops whose bodies count instead.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "call",
  "conditional",
  "after-all",
  "opt-barrier",
  "partition-id",
  "replica-id",
)
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A communication operation, seen from one device.

  Attributes:
    kind: one of `COLLECTIVES`.
    size: bytes of its result each time.
    dtypes: of what is sent.
    devices: number of devices that take part.
    times: number of executions in a call.
    loops: number of loops around it.
  """

  kind: str
  size: int
  dtypes: tuple[str, ...]
  devices: int
  times: int
  loops: int

  @property
  def sent(self) -> float:
    """Bytes that a device must send in a call, at least."""
    others = (self.devices - 1) / self.devices
    share = {
      "all-reduce": 2 * others,
      "reduce-scatter": self.devices - 1,
      "collective-permute": 1,
    }.get(self.kind, others)
    return self.times * self.size * share


def collectives(text: str, trips: int = 1) -> list[Collective]:
  """Find all communication of a compiled program."""
  program, found = _Program(text, trips), []
  for op, times, loops in program.executed(inside_fusions=True):
    kind = op.kind.removesuffix("-start")
    if kind not in COLLECTIVES:
      continue
    found.append(
      Collective(
        kind,
        sum(x.size for x in op.results),
        tuple(sorted({x.dtype for x in op.results})),
        _group(op.text),
        times,
        loops,
      )
    )
  return found


def traffic(text: str, trips: int = 1) -> int:
  """Return the bytes that a device moves to and from its main memory in a call.

  Everything that operations read and write, except in on-chip memory; of slices
  and updates, the part in question. Arguments as of `collectives`.
  """
  program = _Program(text, trips)
  return sum(
    times * program.moved(op)
    for op, times, _ in program.executed(inside_fusions=False)
  )


@dataclasses.dataclass(frozen=True)
class _Shape:
  dtype: str
  size: int  # bytes
  main: bool  # Whether it lies in the main memory.


@dataclasses.dataclass(frozen=True)
class _Operation:
  """A line of a compiled program."""

  name: str
  kind: str
  shapes: tuple[_Shape, ...]
  operands: tuple[str, ...]
  text: str

  @property
  def size(self) -> int:
    return sum(x.size for x in self.results if x.main)

  @property
  def results(self) -> tuple[_Shape, ...]:
    """Shapes of the results.

    Started communication lists its operands before its results, and sometimes
    counters (`u32[]`) behind them; an all-reduce is in place.
    """
    kind = self.kind.removesuffix("-start")
    if kind == self.kind or kind not in COLLECTIVES or kind == "all-reduce":
      return self.shapes
    both = [x for x in self.shapes if (x.dtype, x.size) != ("u32", 4)]
    return tuple(both[len(both) // 2 :])

  def refers(self, what: str) -> str:
    """Return the computation that it refers to, e.g. as its "body"."""
    return re.search(rf"\b{what}=%?([\w.\-]+)", self.text)[1]


class _Program:
  """A compiled program: its computations, each a dict of named operations."""

  def __init__(self, text: str, trips: int):
    self.trips = trips
    self.computations: dict[str, dict[str, _Operation]] = {}
    self.roots: dict[str, _Operation] = {}
    name = ""
    for line in text.splitlines():
      if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        name = head[2]
        self.computations[name] = {}
        if head[1]:
          self.entry = name
      elif op := _operation(line):
        self.computations[name][op.name] = op
        if line.lstrip().startswith("ROOT"):
          self.roots[name] = op

  def executed(
    self, inside_fusions: bool, name: str = "", times: int = 1, loops: int = 0
  ) -> Iterator[tuple[_Operation, int, int]]:
    """Yield operations, number of executions, and number of loops around."""
    visit = functools.partial(self.executed, inside_fusions)
    for op in self.computations[name or self.entry].values():
      yield op, times, loops
      if op.kind == "while":
        trips = self._trips(op)
        yield from visit(op.refers("body"), times * trips, loops + 1)
      elif op.kind == "call":
        yield from visit(op.refers("to_apply"), times, loops)
      elif op.kind == "conditional":
        for branch in _branches(op.text):
          yield from visit(branch, times, loops)
      elif inside_fusions and (called := _calls(op.text)):
        yield from visit(called, times, loops)

  def _trips(self, loop: _Operation) -> int:
    """Return the trip count of a loop from 0 in steps of 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
      return int(known[1])
    condition = self.computations[loop.refers("condition")].values()
    limits = [
      int(number[1])
      for op in condition
      if op.kind == "constant"
      and (number := re.search(r"constant\((\d+)\)", op.text))
    ]
    return max(limits, default=self.trips)

  def moved(self, op: _Operation) -> int:
    """Return the bytes of main memory that an operation reads and writes."""
    if op.kind in _FREE or op.kind.endswith("-done") or _PLACES.search(op.text):
      return 0
    within = self._within(op)
    read = sum(
      self._read(op, i, within[operand])
      for i, operand in enumerate(op.operands)
      if operand in within
    )
    return read + self._written(op, within)

  def _within(self, op: _Operation) -> dict[str, _Operation]:
    return next(x for x in self.computations.values() if op.name in x)

  def _read(self, op: _Operation, index: int, operand: _Operation) -> int:
    """Return the bytes that an operation reads of one of its operands."""
    if not operand.size:
      return 0
    return min(operand.size, self._part(op, index, operand.size))

  def _part(self, op: _Operation, index: int, whole: int) -> int:
    """Return the bytes read of operand `index`, in any memory."""
    if index == 0 and op.kind in _SLICES:
      # What was started names what goes in first.
      return op.shapes[1 if op.kind == "slice-start" else 0].size
    if index == 0 and op.kind == "dynamic-update-slice":
      return 0
    if op.kind != "fusion" or not (called := _calls(op.text)):
      return whole
    inside = self.computations[called]
    parameter = next(
      x
      for x in inside.values()
      if x.kind == "parameter" and f"parameter({index})" in x.text
    )
    return self._of_users(inside, parameter, whole)

  def _of_users(self, inside, value: _Operation, whole: int) -> int:
    parts = 0
    for user in inside.values():
      for i, operand in enumerate(user.operands):
        if operand != value.name:
          continue
        if user.kind in ("bitcast", "tuple"):
          parts += self._of_users(inside, user, whole)
        else:
          parts += self._part(user, i, whole)
    return parts

  def _written(self, op: _Operation, within: dict[str, _Operation]) -> int:
    """Return the bytes written: of an update in place, those of the update."""
    if op.kind == "dynamic-update-slice":
      update = within[op.operands[1]]
      return update.shapes[0].size if op.size else 0
    if op.kind in ("copy-start", "slice-start"):
      shape = op.shapes[1 if op.kind == "slice-start" else 0]
      return shape.size if shape.main else 0
    if op.kind != "fusion" or not (called := _calls(op.text)):
      return op.size
    inside, root = self.computations[called], self.roots[called]
    results = [root]
    if root.kind == "tuple":
      results = [inside[name] for name in root.operands]
    return sum(
      min(shape.size, self._result(inside, result))
      for shape, result in zip(op.shapes, results)
      if shape.main
    )

  def _result(self, inside, op: _Operation) -> int:
    """Return the bytes of a fusion's result that are new."""
    while op.kind == "bitcast":
      op = inside[op.operands[0]]
    if op.kind == "dynamic-update-slice":
      return sum(x.size for x in inside[op.operands[1]].shapes)
    if op.kind == "fusion" and (called := _calls(op.text)):
      return self._result(self.computations[called], self.roots[called])
    return sum(x.size for x in op.shapes)


def _operation(line: str) -> _Operation | None:
  match = re.match(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line
  )
  if not match:
    return None
  name, result, kind, rest = match.groups()
  # Up to the bracket that closes the operands, which hold none but in types.
  operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
  return _Operation(name, kind, _shapes(result), tuple(operands), line)


def _shapes(text: str) -> tuple[_Shape, ...]:
  """Parse shapes: "bf16[4,8]{1,0:T(8,128)S(1)}", or several in brackets."""
  return tuple(
    _Shape(
      dtype,
      _bytes(dtype, [int(d) for d in dims.split(",") if d]),
      not re.search(r"S\([1-9]", layout),
    )
    for dtype, dims, layout in re.findall(
      r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text
    )
  )


def _bytes(dtype: str, dims: list[int]) -> int:
  bits = re.search(r"\d+", dtype)  # "pred" has none, and takes a byte.
  return math.prod(dims) * max(8, int(bits[0]) if bits else 8) // 8


def _calls(text: str) -> str | None:
  match = re.search(r"\bcalls=%?([\w.\-]+)", text)
  return match and match[1]


def _branches(text: str) -> list[str]:
  names = re.search(r"branch_computations=\{([^}]*)\}", text)
  if names:
    return re.findall(r"%?([\w.\-]+)", names[1])
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)


def _group(text: str) -> int:
  """Return the number of devices that take part in a collective."""
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[x]) for x in re.findall(r"'(\w+)'", mesh[2]))
  if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
    return int(groups[1])
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return len(groups[1].split(","))
  return 2  # Pairs of source and target.
