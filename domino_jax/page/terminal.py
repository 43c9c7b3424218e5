"""A run's training in figures and its evaluation as a table, for a terminal.

Both are read through `Source`: a log or an earlier evaluation may contain any value, and the table
leaves out those that are not figures.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from domino_jax.base.escapes import printable
from domino_jax.evaluation.record import EVALUATION
from domino_jax.page.sources import Source
from domino_jax.training.log import METRICS, log_notice, read_metrics

COUNT, PLACES = "{:.0f}", "{:.3f}"


def training_summary(run: Path) -> dict[str, Any]:
    """Of a run's log: its data, first and last training loss, and the last held-out figures.

    With a `notice` where the log differs from that of the newest checkpoint. Empty for an imported
    draft.

    Raises:
        InputError: the log cannot be read.
    """
    records = Source(METRICS, (), read_metrics(run)).entries
    # A window in which every step was skipped has no loss; neither has a pass that was not finite.
    measured = [record for record in records if record["loss"].number is not None]
    training = [record for record in measured if record["split"].text == "train"]
    heldout = [record for record in measured if record["split"].text == "heldout"]
    data = [record for record in records if record["split"].text == "data"]
    summary: dict[str, Any] = {}
    if training:
        summary["first_loss"] = training[0]["loss"].value
        summary["last_loss"] = training[-1]["loss"].value
        summary["steps"] = training[-1]["step"].value
    if heldout:
        summary["heldout"] = _plain_values(heldout[-1])
    if data:
        known = _plain_values(data[-1]).items()
        summary["data"] = {name: value for name, value in known if name not in ("step", "split")}
    notice = log_notice(run)
    if notice is not None:
        summary["notice"] = notice
    return summary


def _plain_values(record: Source) -> dict[str, Any]:
    """The text and the finite numbers of a record, which strict JSON can represent."""
    return {
        name: value
        for name, value in record.value.items()
        if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
    }


def evaluation_table(report: dict[str, Any]) -> Table:
    """The table of an `evaluation.json`: a column per prompt set, what else was measured below."""
    evaluator = report["evaluator"]
    head = f"head {evaluator['head']}" if evaluator["head"] else "no head"
    title = (
        f"{evaluator['target']}, step {evaluator['step']}, block {evaluator['block_size']}, "
        f"{head}, temperature {evaluator['temperature']}, "
        f"{evaluator['max_new_tokens']} new tokens, {evaluator['dtype']}"
    )
    source = Source(EVALUATION, (), report)
    sets = source["sets"]
    # Not as `str`, here and below: rich would replace markup and names of emoji in it.
    caption = Text("; ".join(_caption(source)), style="table.caption")
    table = Table("", title=Text(printable(title), style="table.title"), caption=caption)
    for name in sets.names:
        table.add_column(Text(printable(name)))
    columns = [_column(sets[name]) for name in sets.names]
    for name in columns[0] if columns else ():
        cells = [column[name] for column in columns]
        # What no set has is left out: a head that could be off, speeds.
        if any(cells):
            table.add_row(name, *(Text(text or "-") for text in cells))
    return table


def _column(figures: Source) -> dict[str, str]:
    """What a set of prompts shows in each row; nothing where it was not measured."""
    ways, speed, endpoint = figures["ways"], figures["speed"], figures["endpoint"]
    rates = [speed["tokens_per_second"], speed["tokens_per_second_plain"]]
    counted_by = "replay" if figures["replayed"].value is True else "decoding"
    # Not every server tells what its drafts took.
    served = [endpoint[key] for key in ("tau", "ratio", "proposals")]
    return {
        "prompts": _figure(COUNT, figures["prompts"]),
        "proposals": _figure(COUNT, ways["serving"]["proposals"]),
        "tau (95 %)": _tau(ways["serving"]),
        "tau, head off": _tau(ways["head_off"]),
        "tau, block proposals": _tau(ways["block"]),
        "n-gram floor": _tau(ways["ngram"]),
        "counted by": counted_by if ways.names else "",
        "tokens/s speculative / plain": _figure("{:.1f} / {:.1f}", *rates),
        "tokens compared / equal": _equal([ways[name] for name in ways.names]),
        "endpoint: tau, over ours, proposals": (
            ", ".join(_figure("{:.4g}", figure) or "-" for figure in served)
            if endpoint.names
            else ""
        ),
        "endpoint: tokens compared / equal": _equal([endpoint]),
    }


def _figure(form: str, *sources: Source) -> str:
    """Numbers in a format string; "" where a source is not a number."""
    numbers = [source.number for source in sources]
    return "" if None in numbers else form.format(*numbers)


def _tau(way: Source) -> str:
    # One prompt has no interval.
    tau, ends = _figure(PLACES, way["tau"]), way["interval"]
    interval = _figure(f" ({PLACES} to {PLACES})", ends[0], ends[1])
    return f"{tau}{interval}" if tau else ""


def _equal(compared: Sequence[Source]) -> str:
    """Tokens compared with the target's own output, and the equal ones, over all modes."""
    pairs = [(one["tokens_compared"].number, one["tokens_equal"].number) for one in compared]
    found = [(tokens, equal) for tokens, equal in pairs if tokens is not None and equal is not None]
    if not found:
        return ""
    tokens, equal = (sum(column) for column in zip(*found, strict=True))
    return f"{tokens:.0f} / {equal:.0f}"


def _caption(report: Source) -> Iterator[str]:
    training, cycle = report["training"], report["cycle"]
    heldout = training["heldout"]
    base = _figure(f", base {PLACES}", heldout["base_accept_len"])
    words = (
        _figure("break-even tau {:.2f} at batch 1 here", cycle["break_even_tau"]),
        _figure(
            "{:.2f} where verifying a block costs one step", cycle["break_even_tau_if_one_step"]
        ),
        _figure(
            f"loss {PLACES} -> {PLACES} in {COUNT} steps",
            training["first_loss"],
            training["last_loss"],
            training["steps"],
        ),
        # Not comparable with the tau of the table, so its kind is named.
        _figure(f"held-out accept_len (teacher-forced) {PLACES}{base}", heldout["accept_len"]),
    )
    yield from filter(None, words)
