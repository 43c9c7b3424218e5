"""A compiler's own cost analysis counts a loop's body once, and a training step lives in loops.

They go over the target's layers, positions of the GRU, pieces of the vocabulary loss. So the text
of the compiled program is walked from its entry, with how often each computation runs:

    entry x 1 -> while (34 turns) -> body x 34 -> fusion -> its computation, fused: one kernel
                                     `- conditional: every branch is counted

Only what a reader of a plan asks for is kept: collectives, buffers, launches, bytes moved.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from domino_jax.base.scopes import scope_of

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Names for what exists already, and containers whose contents are visited themselves.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "call-done", "async-done", "after-all", "add-dependency"),
    *("opt-barrier", "partition-id", "replica-id", "domain"),
}
_KNOWN_TURNS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_SLICES = ("dynamic-slice", "slice", "gather")  # read no more of an operand than comes out
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")


@dataclass(frozen=True)
class Operation:
    """One instruction; `shape` as it is written, `operands` by name, what follows as text."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    literal: str

    @property
    def called(self) -> str | None:
        """The one computation that it names, as a fusion or a call does."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else None

    @property
    def path(self) -> str:
        """Where in the traced program it comes from, "" where the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Operations by name, in their order; the last one written as ROOT is the result."""

    operations: Mapping[str, Operation]
    root: str


@dataclass(frozen=True)
class Collective:
    """One exchange between devices: bytes of its whole arrays on a device, and how often it runs.

    `arrays` are those of each array that comes out: a compiler combines small exchanges. `loop` is
    the path of the innermost loop around it, None outside of all.
    """

    kind: str
    bytes: int
    times: int
    loop: str | None
    path: str
    arrays: tuple[int, ...]


@dataclass(frozen=True)
class Buffer:
    """An array that an operation writes to a device's memory."""

    bytes: int
    shape: str
    scope: str


@dataclass(frozen=True)
class _Visit:
    computation: Computation
    times: int
    loop: str | None
    fused: bool  # inside one kernel: nothing of it is a buffer or a launch


@dataclass(frozen=True)
class CompiledProgram:
    """A program's computations; `unknown_trip_count` counts a loop whose length only data knows."""

    computations: Mapping[str, Computation]
    entry: str
    unknown_trip_count: int
    _visits: list[_Visit] = field(default_factory=list, repr=False)  # walked once, read by all

    def visits(self) -> list[_Visit]:
        """Every computation that runs, once for each place that it is called from."""
        if not self._visits:
            self._visits.extend(self._walk(self.entry, 1, None, False))
        return self._visits

    def _walk(self, name: str, times: int, loop: str | None, fused: bool) -> Iterator[_Visit]:
        computation = self.computations[name]
        yield _Visit(computation, times, loop, fused)
        for operation in computation.operations.values():
            opcode = operation.opcode
            attributes = operation.attributes
            if opcode == "while":
                trip_count = self._trip_count(computation, operation)
                inside = operation.path or operation.name
                # A loop of known length runs without asking its condition.
                asked = () if _KNOWN_TURNS.search(attributes) else ("condition",)
                for part in ("body", *asked):
                    yield from self._walk(
                        _named(attributes, part), times * trip_count, inside, fused
                    )
            elif opcode == "conditional":
                for branch in _branches(attributes):
                    yield from self._walk(branch, times, loop, fused)
            elif opcode in ("call", "call-start", "async-start") and operation.called:
                yield from self._walk(operation.called, times, loop, fused)
            elif "calls=" in attributes and not opcode.startswith(COLLECTIVES):
                assert operation.called
                yield from self._walk(operation.called, times, loop, True)

    def _trip_count(self, computation: Computation, loop: Operation) -> int:
        known = _KNOWN_TURNS.search(loop.attributes)
        if known:
            return int(known[1])
        # A TPU's compiler drops the count; its loops still compare a counter with a constant.
        condition = self.computations[_named(loop.attributes, "condition")]
        compare = condition.operations[condition.root]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return self.unknown_trip_count
        counter, bound = compare.operands
        limit = _constant(condition, bound)
        if limit is None:
            return self.unknown_trip_count
        place = _element(condition, counter)
        start = computation.operations.get(loop.operands[0].partition("#")[0])
        first = None
        if place is not None and start is not None and start.opcode == "tuple":
            first = _constant(computation, start.operands[place])
        # A start that is not found counts as 0, which gives the most turns.
        return max(limit - (first or 0), 1)


def read_program(text: str, *, unknown_trip_count: int = 1) -> CompiledProgram:
    """Reads the text of a compiled program (`compiled.as_text()`, or a dump of XLA's).

    Args:
        text: HLO after optimisation, one instruction a line.
        unknown_trip_count: of a loop whose length is not in the text, at most.
    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = None
    operations: dict[str, Operation] = {}
    for line in text.splitlines():
        opening = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opening:
            name, root, operations = opening[2], "", {}
            entry = name if opening[1] else entry
        elif line.startswith("}") and name is not None:
            computations[name] = Computation(operations, root or "")
            name = None
        elif name is not None and (operation := _operation(line)):
            operations[operation.name] = operation
            root = operation.name if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise ValueError("no entry computation in the program's text")
    return CompiledProgram(computations, entry, unknown_trip_count)


def _operation(line: str) -> Operation | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    # The shape of a tuple holds spaces: it ends where its parenthesis does.
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    shape = rest[:end]
    rest = rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closed("(" + rest) - 1
    inside = rest[: end - 1]
    names = tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", inside))
    return Operation(found[1], opcode, shape, names, rest[end:], inside)


def _closed(text: str) -> int:
    """Where the parenthesis that the text begins with is closed, one after it."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _named(attributes: str, part: str) -> str:
    found = re.search(rf"{part}=%([\w.\-]+)", attributes)
    assert found, part
    return found[1]


def _branches(attributes: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if listed:
        return _NAME.findall(listed[1])
    return [_named(attributes, "true_computation"), _named(attributes, "false_computation")]


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that a name stands for, through copies; None if it is computed."""
    operation = computation.operations.get(name)
    while operation is not None and operation.opcode in ("copy", "bitcast"):
        operation = computation.operations.get(operation.operands[0])
    if operation is None or operation.opcode != "constant":
        return None
    return int(operation.literal) if re.fullmatch(r"-?\d+", operation.literal) else None


def _element(computation: Computation, name: str) -> int | None:
    """Which element of its tuple a name takes: `%tuple#2`, or an operation that does."""
    _, sharp, place = name.partition("#")
    if sharp:
        return int(place)
    operation = computation.operations.get(name)
    found = re.search(r"index=(\d+)", operation.attributes) if operation is not None else None
    return int(found[1]) if found else None


def array_bytes(shape: str, *, main_memory: bool = False) -> list[int]:
    """Bytes of each array of a shape, `(f32[2,3]{1,0}, bf16[4]{0:S(1)})` -> [24, 8].

    Args:
        shape: of an array or a tuple.
        main_memory: leave out what lies in a TPU's fast memory, `S(1)` and above.
    """
    # Bits are multiplied before they become bytes: two of s4 share one.
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        count = math.prod(int(size) for size in sizes.split(",") if size)
        found.append(_bits(kind) * count // 8)
    return found


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8  # a whole byte, which its name does not say
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 0


def collectives(program: CompiledProgram) -> list[Collective]:
    """Every exchange between devices that the program makes."""
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for visit in program.visits():
        operations = visit.computation.operations
        for operation in operations.values():
            # Where it ends: the shape of a start holds what goes in as well.
            kind = operation.opcode.removesuffix("-done")
            if kind not in COLLECTIVES:
                continue
            origin = _origin(operation, operations)
            channel = re.search(r"channel_id=(\d+)", origin.attributes)
            if visit.fused and channel:
                # A TPU may repeat it in the computations that start and end it.
                if (kind, channel[1]) in seen:
                    continue
                seen.add((kind, channel[1]))
            given = sum(sum(_operand_bytes(name, operations)) for name in origin.operands)
            # The whole array comes out of an all-gather, but goes into a reduce-scatter.
            arrays = tuple(array_bytes(operation.shape))
            path = operation.path or origin.path
            size = max(sum(arrays), given)
            found.append(Collective(kind, size, visit.times, visit.loop, path, arrays))
    return found


def _origin(operation: Operation, operations: Mapping[str, Operation]) -> Operation:
    """The operation whose end this is, or itself."""
    if operation.opcode.endswith("-done") and operation.operands:
        return operations.get(operation.operands[0], operation)
    return operation


def _operand_bytes(
    name: str, operations: Mapping[str, Operation], *, main_memory: bool = False
) -> list[int]:
    whole, _, place = name.partition("#")
    operation = operations.get(whole)
    if operation is None:
        return []
    shapes = [found[0] for found in re.finditer(r"\w+\[[\d,]*\](\{[^}]*\})?", operation.shape)]
    chosen = shapes[int(place)] if place else operation.shape
    return array_bytes(chosen, main_memory=main_memory)


def _works(visit: _Visit) -> Iterator[Operation]:
    """What does something of its own; of two that start and end it, the one that ends it."""
    if visit.fused:
        return
    for operation in visit.computation.operations.values():
        started = operation.opcode.endswith(("-start", "-update"))
        allocated = '"AllocateBuffer"' in operation.attributes  # room for what others write
        if operation.opcode not in _NOTHING and not started and not allocated:
            yield operation


def launches(program: CompiledProgram) -> int:
    """Kernels and library calls that the program makes on a GPU, at most."""
    return sum(visit.times for visit in program.visits() for _ in _works(visit))


def largest_buffers(program: CompiledProgram, count: int = 8) -> list[Buffer]:
    """The largest arrays that operations write to main memory, each shape and scope once."""
    found: set[Buffer] = set()
    for visit in program.visits():
        for operation in _works(visit):
            scope = scope_of(operation.path)
            for array in re.finditer(_ARRAY, operation.shape):
                sizes = array_bytes(array[0], main_memory=True)
                if sizes:
                    found.add(Buffer(sizes[0], f"{array[1]}[{array[2]}]", scope))
    # By every field: a set gives arrays of one size in any order.
    return sorted(found, key=lambda buffer: (-buffer.bytes, buffer.shape, buffer.scope))[:count]


def bytes_moved(program: CompiledProgram) -> int:
    """Bytes that operations read from and write to main memory; a cache may serve some of them.

    Of an array that a kernel only slices or updates in place, the slice or the update counts.
    """
    total = 0
    for visit in program.visits():
        operations = visit.computation.operations
        for operation in _works(visit):
            origin = _origin(operation, operations)
            moved = _written(operation, origin, program)
            for place, name in enumerate(origin.operands):
                whole = sum(_operand_bytes(name, operations, main_memory=True))
                moved += min(whole, _read(origin, place, whole, program))
            total += moved * visit.times
    return total


def _read(operation: Operation, place: int, whole: int, program: CompiledProgram) -> int:
    """Bytes that an operation reads of its operand, which has `whole`."""
    opcode = operation.opcode.removesuffix("-start")
    if opcode in _SLICES and place == 0:
        # What a started slice gives is the second array of its shape; the first is its operand.
        return min(whole, array_bytes(operation.shape)[-1 if opcode == operation.opcode else 1])
    if opcode == "dynamic-update-slice" and place == 0:
        return 0  # in place: what is not overwritten is not touched
    if opcode != "fusion" or operation.called is None:
        return whole
    inside = program.computations[operation.called].operations.values()
    given = [x.name for x in inside if x.opcode == "parameter" and x.literal == str(place)]
    used = [(x, at) for x in inside for at, name in enumerate(x.operands) if name in given]
    read = [_read(user, at, whole, program) for user, at in used]
    return min(whole, sum(read))


def _written(operation: Operation, origin: Operation, program: CompiledProgram) -> int:
    # A kernel that ends in an update in place writes the update alone, whatever its shape says.
    whole = sum(array_bytes(operation.shape, main_memory=True))
    operations: Mapping[str, Operation] = {}
    root: Operation | None = origin
    if origin.opcode.startswith("fusion") and origin.called is not None:
        computation = program.computations[origin.called]
        operations = computation.operations
        root = computation.operations.get(computation.root)
        while root is not None and root.opcode == "bitcast":
            root = operations.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice" or not operations:
        return whole
    return min(whole, sum(_operand_bytes(root.operands[1], operations)))
