"""Plans as a table: a column for each place, a line for each figure."""

from collections.abc import Callable, Sequence

from rich.table import Table

from domino_jax.plan import Plan

MIB, GIB, TERA = 2**20, 2**30, 1e12


def plan_table(plans: Sequence[Plan]) -> Table:
    """The table of plans of one run."""
    table = Table("a device, a step", *(plan.place for plan in plans), title="Plan")
    table.caption = "bounds of time are the published peaks of the chip, not a step time"

    def row(name: str, cell: Callable[[Plan], str | None]) -> None:
        cells = [cell(plan) for plan in plans]
        if any(cells):
            table.add_row(name, *(text or "-" for text in cells))

    row("fits", lambda plan: "yes" if plan.fits else "NO")
    row("memory, needed of published", _memory)
    row("of it arguments", lambda plan: _size(plan.argument_bytes))
    row("devices", lambda plan: f"{plan.devices} x {plan.device_kind}")
    row("mesh", lambda plan: " ".join(f"{axis} {size}" for axis, size in plan.mesh.items()))
    row("batch x accumulation", lambda plan: f"{plan.batch_size} x {plan.grad_accumulation}")
    kinds = sorted({kind for plan in plans for kind in plan.exchanges})
    for kind in kinds:
        row(kind, lambda plan, kind=kind: _exchange(plan, kind))  # type: ignore[misc]
    row("launches, at most", lambda plan: f"{plan.launches:,}" if plan.launches else None)
    row("TFLOP useful, all devices", lambda plan: _tera(plan.useful_flops))
    row("TFLOP executed, at most", lambda plan: _tera(plan.executed_flops))
    stages = {stage: None for plan in plans for stage in plan.executed_flops}
    for stage in stages:
        row(f"  {stage}: useful / executed", lambda plan, stage=stage: _stage(plan, stage))  # type: ignore[misc]
    row("  of them float32", lambda plan: f"{plan.float32_flops / TERA:.2f}")
    row("bound by FLOPs", lambda plan: f"{plan.seconds_of_flops * 1e3:.1f} ms")
    row("bound by bytes", _bytes)
    row("compiled in", lambda plan: f"{plan.compile_seconds:.0f} s{' (before)' * plan.cached}")
    for place in range(5):
        row(f"buffer {place + 1}", lambda plan, place=place: _buffer(plan, place))  # type: ignore[misc]
    return table


def _size(size: int | None) -> str | None:
    if size is None:
        return None
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _memory(plan: Plan) -> str:
    needed = _size(plan.needed_bytes)
    words = f"{needed or 'more'} of {_size(plan.memory_bytes)}"
    return words if plan.refusal is None else f"{words}, refused by the compiler"


def _exchange(plan: Plan, kind: str) -> str | None:
    one = plan.exchanges.get(kind)
    if one is None:
        return None
    words = f"{one.count:,} x, {_size(one.bytes)}"
    return f"{words}, {_size(one.largest_in_loop)} at most in a loop" if one.largest_in_loop else words


def _tera(flops: dict[str, float]) -> str:
    return f"{sum(flops.values()) / TERA:.2f}"


def _stage(plan: Plan, stage: str) -> str:
    useful, executed = plan.useful_flops.get(stage, 0.0), plan.executed_flops.get(stage, 0.0)
    return f"{useful / TERA:.2f} / {executed / TERA:.2f}"


def _bytes(plan: Plan) -> str | None:
    if plan.seconds_of_bytes is None or plan.bytes_moved is None:
        return None
    return f"{plan.seconds_of_bytes * 1e3:.1f} ms ({_size(plan.bytes_moved)})"


def _buffer(plan: Plan, place: int) -> str | None:
    if place >= len(plan.buffers):
        return None
    buffer = plan.buffers[place]
    return f"{_size(buffer.bytes)} {buffer.shape}\n{buffer.scope}"
