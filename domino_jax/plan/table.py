"""Places are chosen by comparing them: a column for each place, a line for each figure."""

from collections.abc import Callable, Sequence

from rich.table import Table

from domino_jax.plan.plan import Plan

MIB, GIB, TERA = 2**20, 2**30, 1e12
BUFFERS = 5  # of the 8 that a plan holds


def plan_table(plans: Sequence[Plan]) -> Table:
    """The table of plans of one run."""
    table = Table(title="A training step: figures of one device, FLOPs of all")
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(plan.spec)
    table.caption = "The bounds are what the chip's published peaks allow, not a step time."

    def row(name: str, cell: Callable[[Plan], str | None]) -> None:
        cells = [cell(plan) for plan in plans]
        # What no place has is left out: launches, where all are TPUs.
        if any(cells):
            table.add_row(name, *(text or "-" for text in cells))

    row("devices", lambda plan: f"{plan.devices} x {plan.device_kind}")
    row("mesh", _mesh)
    row("batch x accumulation", lambda plan: f"{plan.batch_size} x {plan.grad_accumulation}")
    row("fits", lambda plan: "yes" if plan.fits else "NO")
    row("peak memory of published", _memory)
    row("  of it arguments", lambda plan: _size(plan.argument_bytes))
    for kind in sorted({kind for plan in plans for kind in plan.exchanges}):
        row(kind, _exchange_of(kind))
    row("launches, at most", lambda plan: f"{plan.launches:,}" if plan.launches else None)
    row("TFLOP useful / executed", _all_flops)
    # Not a set: stages stand in the order in which a step comes to them.
    for stage in {stage: None for plan in plans for stage in plan.executed_flops}:
        row(f"  {stage}", _stage_of(stage))
    row("  of it float32", lambda plan: _tera(plan.float32_flops))
    row("bound by FLOPs", lambda plan: _milliseconds(plan.seconds_of_flops))
    row("bound by bytes", _bytes)
    row("compiled in", lambda plan: f"{plan.compile_seconds:.0f} s{', before' * plan.cached}")
    for spec in range(BUFFERS):
        row("largest buffers" if spec == 0 else "", _buffer_at(spec))
    return table


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis} {size}" for axis, size in plan.mesh.items())


def _size(size: int | None) -> str | None:
    if size is None:
        return None
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    if size >= MIB / 10:
        return f"{size / MIB:.1f} MiB"
    return f"{size / 2**10:.1f} KiB"


def _memory(plan: Plan) -> str:
    needed = _size(plan.needed_bytes)  # None where a refusal tells no figure: more than there is
    words = f"{needed or 'more'} of {_size(plan.memory_bytes)}"
    return words if plan.refusal is None else f"{words}, refused by the compiler"


def _exchange_of(kind: str) -> Callable[[Plan], str | None]:
    def cell(plan: Plan) -> str | None:
        one = plan.exchanges.get(kind)
        if one is None:
            return None
        words = f"{one.count:,} x, {_size(one.bytes)}"
        largest = _size(one.largest_in_loop)
        return f"{words}; in loops {largest} each at most" if one.largest_in_loop else words

    return cell


def _all_flops(plan: Plan) -> str:
    useful = sum(plan.useful_flops.values())
    executed = sum(plan.executed_flops.values())
    return _flops(useful, executed)


def _stage_of(stage: str) -> Callable[[Plan], str]:
    def cell(plan: Plan) -> str:
        useful = plan.useful_flops.get(stage, 0.0)
        executed = plan.executed_flops.get(stage, 0.0)
        return _flops(useful, executed)

    return cell


def _flops(useful: float, executed: float) -> str:
    return f"{_tera(useful)} / {_tera(executed)}"


def _tera(flops: float) -> str:
    digits = ".2f" if flops >= TERA / 10 or not flops else ".1g"
    return f"{flops / TERA:{digits}}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _bytes(plan: Plan) -> str | None:
    if plan.seconds_of_bytes is None or plan.bytes_moved is None:
        return None
    return f"{_milliseconds(plan.seconds_of_bytes)} ({_size(plan.bytes_moved)})"


def _buffer_at(spec: int) -> Callable[[Plan], str | None]:
    def cell(plan: Plan) -> str | None:
        if spec >= len(plan.buffers):
            return None
        buffer = plan.buffers[spec]
        return f"{_size(buffer.bytes)} {buffer.shape} {buffer.scope}"

    return cell
