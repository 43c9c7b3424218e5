"""The table of plans: a column for each topology, a row for each figure."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from domino_jax.base.escapes import printable
from domino_jax.plan.plan import Exchange, Plan

MIB, GIB, TERA = 2**20, 2**30, 1e12
BUFFERS = 5  # of the 8 that a plan holds


def plan_table(plans: Sequence[Plan]) -> Table:
    """The table of plans of one run."""
    table = Table(title="A training step: figures of one device, FLOPs of all")
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(Text(plan.spec))
    table.caption = "The bounds are what the chip's published peaks allow, not a step time."

    def row(name: str, cells: Iterable[str | None]) -> None:
        texts = list(cells)
        # What no place has is left out: launches, where all are TPUs.
        if any(texts):
            # Not as `str`: scopes and names of devices may hold what rich takes for markup.
            table.add_row(*(Text(printable(text or "-")) for text in (name, *texts)))

    row("devices", (f"{plan.devices} x {plan.device_kind}" for plan in plans))
    row("mesh", (" ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) for plan in plans))
    row("batch x accumulation", (f"{plan.batch_size} x {plan.grad_accumulation}" for plan in plans))
    row("fits", ("yes" if plan.fits else "NO" for plan in plans))
    row("peak memory of published", map(_memory, plans))
    row("  of it arguments", (_size(plan.argument_bytes) for plan in plans))
    for kind in sorted({kind for plan in plans for kind in plan.exchanges}):
        row(kind, (_exchange(plan.exchanges.get(kind)) for plan in plans))
    row("launches, at most", (f"{plan.launches:,}" if plan.launches else None for plan in plans))
    row("TFLOP useful / executed", (_flops(plan) for plan in plans))
    # Not a set: stages stand in the order in which a step comes to them.
    for stage in {stage: None for plan in plans for stage in plan.executed_flops}:
        row(f"  {stage}", (_flops(plan, stage) for plan in plans))
    row("  of it float32", (_tera(plan.float32_flops) for plan in plans))
    row("bound by FLOPs", (_milliseconds(plan.seconds_of_flops) for plan in plans))
    row("bound by bytes", map(_bytes, plans))
    row("compiled in", map(_compiled, plans))
    for index in range(BUFFERS):
        row("" if index else "largest buffers", (_buffer(plan, index) for plan in plans))
    return table


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


def _exchange(one: Exchange | None) -> str | None:
    if one is None:
        return None
    words = f"{one.count:,} x, {_size(one.bytes)}"
    largest = _size(one.largest_in_loop)
    return f"{words}; in loops {largest} each at most" if one.largest_in_loop else words


def _flops(plan: Plan, stage: str | None = None) -> str:
    """Useful and executed, of a stage or of the step."""
    both = (plan.useful_flops, plan.executed_flops)
    if stage is None:
        return " / ".join(_tera(sum(flops.values())) for flops in both)
    return " / ".join(_tera(flops.get(stage, 0.0)) for flops in both)


def _tera(flops: float) -> str:
    digits = ".2f" if flops >= TERA / 10 or not flops else ".1g"
    return f"{flops / TERA:{digits}}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _bytes(plan: Plan) -> str | None:
    if plan.seconds_of_bytes is None or plan.bytes_moved is None:
        return None
    return f"{_milliseconds(plan.seconds_of_bytes)} ({_size(plan.bytes_moved)})"


def _compiled(plan: Plan) -> str:
    return f"{plan.compile_seconds:.0f} s{', before' * plan.cached}"


def _buffer(plan: Plan, index: int) -> str | None:
    if index >= len(plan.buffers):
        return None
    buffer = plan.buffers[index]
    return f"{_size(buffer.bytes)} {buffer.shape} {buffer.scope}"
