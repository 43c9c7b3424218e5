"""Collectives, buffers, launches and bytes moved of a compiled program, read from its HLO text.

A compiler's own cost analysis counts a loop's body once, and a training step lives in loops: over
the target's layers, positions of the GRU, chunks of the vocabulary loss. So the text is walked
from its entry, with how often each computation runs:

    entry x 1 -> while (34 turns) -> body x 34 -> fusion -> its computation, fused: one kernel
                                     `- conditional: every branch is counted
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
_SLICES = ("dynamic-slice", "slice", "gather")  # read no more of an operand than comes out
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Operation:
    """One instruction: `shape` and `literal` as written, `operands` by name, the rest as text."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    literal: str

    def named(self, attribute: str) -> str:
        """The computation that an attribute names, "" without that attribute."""
        return _first(rf"(?:{attribute})=%([\w.\-]+)", self.attributes)

    @property
    def called(self) -> str:
        """The computation that a fusion or a call runs, "" for other instructions."""
        return self.named("calls|to_apply")

    @property
    def path(self) -> str:
        """Where in the traced program it comes from, "" where the compiler made it up."""
        return _first(r'op_name="([^"]*)"', self.attributes)


def _first(pattern: str, text: str) -> str:
    """The group of a pattern's first match, "" without a match."""
    found = re.search(pattern, text)
    return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Operations by name, in their order; the last one written as ROOT is the result."""

    operations: Mapping[str, Operation]
    root: str

    def origin(self, operation: Operation) -> Operation:
        """The operation whose end this is, or itself."""
        if operation.opcode.endswith("-done") and operation.operands:
            return self.operations.get(operation.operands[0], operation)
        return operation

    def operand_bytes(self, name: str, *, main_memory: bool = False) -> int:
        """Bytes of an operand, `%tuple#2` for one element; see `array_bytes`."""
        whole, _, index = name.partition("#")
        operation = self.operations.get(whole)
        if operation is None:
            return 0
        shape = operation.shape
        if index:
            shape = list(_ARRAY.finditer(shape))[int(index)][0]
        return sum(array_bytes(shape, main_memory=main_memory))

    def constant(self, name: str) -> int | None:
        """The integer that a name stands for, through copies; None if it is computed."""
        operation = self.operations.get(name)
        while operation is not None and operation.opcode in ("copy", "bitcast"):
            operation = self.operations.get(operation.operands[0])
        if operation is None or operation.opcode != "constant":
            return None
        return int(operation.literal) if re.fullmatch(r"-?\d+", operation.literal) else None

    def tuple_index(self, name: str) -> int | None:
        """Which element of its tuple a name takes: `%tuple#2`, or an operation that does."""
        whole, _, index = name.partition("#")
        if not index and whole in self.operations:
            index = _first(r"index=(\d+)", self.operations[whole].attributes)
        return int(index) if index else None


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

    @functools.cached_property
    def visits(self) -> list[_Visit]:
        """Every computation that runs, once for each place that it is called from."""
        return list(self._walk(self.entry, 1, None, False))

    def _walk(self, name: str, times: int, loop: str | None, fused: bool) -> Iterator[_Visit]:
        computation = self.computations[name]
        yield _Visit(computation, times, loop, fused)
        for operation in computation.operations.values():
            opcode = operation.opcode
            if opcode == "while":
                known = _first(r'known_trip_count"?:\{"n":"(\d+)"', operation.attributes)
                turns = times * int(known or self._trip_count(computation, operation))
                inside = operation.path or operation.name
                yield from self._walk(operation.named("body"), turns, inside, fused)
                # A loop of known length runs without asking its condition.
                if not known:
                    yield from self._walk(operation.named("condition"), turns, inside, fused)
            elif opcode == "conditional":
                for branch in _branches(operation):
                    yield from self._walk(branch, times, loop, fused)
            elif opcode in ("call", "call-start", "async-start") and operation.called:
                yield from self._walk(operation.called, times, loop, fused)
            elif operation.named("calls") and not opcode.startswith(COLLECTIVES):
                yield from self._walk(operation.named("calls"), times, loop, True)

    def _trip_count(self, computation: Computation, loop: Operation) -> int:
        # A TPU's compiler drops the count; its loops still compare a counter with a constant.
        condition = self.computations[loop.named("condition")]
        compare = condition.operations[condition.root]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return self.unknown_trip_count
        counter, bound = compare.operands
        limit = condition.constant(bound)
        if limit is None:
            return self.unknown_trip_count
        index = condition.tuple_index(counter)
        start = computation.operations.get(loop.operands[0].partition("#")[0])
        first = None
        if index is not None and start is not None and start.opcode == "tuple":
            first = computation.constant(start.operands[index])
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
    entry = name = root = ""
    operations: dict[str, Operation] = {}
    for line in text.splitlines():
        opening = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opening:
            name, root, operations = opening[2], "", {}
            entry = name if opening[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(operations, root)
            name = ""
        elif name and (operation := _operation(line)):
            operations[operation.name] = operation
            root = operation.name if line.lstrip().startswith("ROOT ") else root
    if not entry:
        raise ValueError("no entry computation in the program's text")
    return CompiledProgram(computations, entry, unknown_trip_count)


def _operation(line: str) -> Operation | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
    if not found:
        return None
    name, shape, opcode, rest = found.groups()
    depth, end = 1, len(rest)
    for parenthesis in re.finditer(r"[()]", rest):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            end = parenthesis.start()
            break
    inside = rest[:end]
    operands = tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", inside))
    return Operation(name, opcode, shape, operands, rest[end + 1 :], inside)


def _branches(conditional: Operation) -> list[str]:
    listed = _first(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed)
    return [conditional.named("true_computation"), conditional.named("false_computation")]


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
        # A pred is a whole byte, which its name does not say.
        bits = 8 if kind == "pred" else int(_first(r"(\d+)", kind) or 0)
        found.append(bits * count // 8)
    return found


def collectives(program: CompiledProgram) -> list[Collective]:
    """Every collective that the program runs."""
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for visit in program.visits:
        computation = visit.computation
        for operation in computation.operations.values():
            # Where it ends: the shape of a start holds what goes in as well.
            kind = operation.opcode.removesuffix("-done")
            if kind not in COLLECTIVES:
                continue
            origin = computation.origin(operation)
            channel = _first(r"channel_id=(\d+)", origin.attributes)
            if visit.fused and channel:
                # A TPU may repeat it in the computations that start and end it.
                if (kind, channel) in seen:
                    continue
                seen.add((kind, channel))
            given = sum(map(computation.operand_bytes, origin.operands))
            # The whole array comes out of an all-gather, but goes into a reduce-scatter.
            arrays = tuple(array_bytes(operation.shape))
            size = max(sum(arrays), given)
            path = operation.path or origin.path
            found.append(Collective(kind, size, visit.times, visit.loop, path, arrays))
    return found


def _works(program: CompiledProgram) -> Iterator[tuple[_Visit, Operation]]:
    """Operations that write memory of their own; of a start and its end, the end."""
    for visit in program.visits:
        for operation in [] if visit.fused else visit.computation.operations.values():
            started = operation.opcode.endswith(("-start", "-update"))
            allocated = '"AllocateBuffer"' in operation.attributes  # room for what others write
            if operation.opcode not in _NOTHING and not started and not allocated:
                yield visit, operation


def launches(program: CompiledProgram) -> int:
    """Kernels and library calls that the program makes on a GPU, at most."""
    return sum(visit.times for visit, _ in _works(program))


def largest_buffers(program: CompiledProgram, count: int = 8) -> list[Buffer]:
    """The largest arrays that operations write to main memory, each shape and scope once."""
    found: set[Buffer] = set()
    for _, operation in _works(program):
        for array in _ARRAY.finditer(operation.shape):
            for size in array_bytes(array[0], main_memory=True):
                shape = f"{array[1]}[{array[2]}]"
                found.add(Buffer(size, shape, scope_of(operation.path)))
    # By every field: a set gives arrays of one size in any order.
    return sorted(found, key=lambda buffer: (-buffer.bytes, buffer.shape, buffer.scope))[:count]


def bytes_moved(program: CompiledProgram) -> int:
    """Bytes that operations read from and write to main memory; a cache may serve some of them.

    Of an array that a kernel only slices or updates in place, the slice or the update counts.
    """
    total = 0
    for visit, operation in _works(program):
        origin = visit.computation.origin(operation)
        moved = _written(operation, origin, program)
        for index, name in enumerate(origin.operands):
            whole = visit.computation.operand_bytes(name, main_memory=True)
            moved += min(whole, _read(origin, index, whole, program))
        total += moved * visit.times
    return total


def _read(operation: Operation, index: int, whole: int, program: CompiledProgram) -> int:
    """Bytes that an operation reads of its operand of that index, which has `whole`."""
    opcode = operation.opcode.removesuffix("-start")
    if opcode in _SLICES and index == 0:
        # What a started slice gives is the second array of its shape; the first is its operand.
        return min(whole, array_bytes(operation.shape)[-1 if opcode == operation.opcode else 1])
    if opcode == "dynamic-update-slice" and index == 0:
        return 0  # in place: what is not overwritten is not touched
    if opcode != "fusion" or not operation.called:
        return whole
    inside = program.computations[operation.called].operations.values()
    given = [x.name for x in inside if x.opcode == "parameter" and x.literal == str(index)]
    used = [(x, at) for x in inside for at, name in enumerate(x.operands) if name in given]
    read = [_read(user, at, whole, program) for user, at in used]
    return min(whole, sum(read))


def _written(operation: Operation, origin: Operation, program: CompiledProgram) -> int:
    """Bytes that an operation writes; `origin` starts it."""
    whole = sum(array_bytes(operation.shape, main_memory=True))
    if not origin.opcode.startswith("fusion") or not origin.called:
        return whole
    # A kernel that ends in an update in place writes the update alone, whatever its shape says.
    kernel = program.computations[origin.called]
    root = kernel.operations.get(kernel.root)
    while root is not None and root.opcode == "bitcast":
        root = kernel.operations.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return whole
    return min(whole, kernel.operand_bytes(root.operands[1]))
