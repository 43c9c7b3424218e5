"""A run's files are for programs: here a person gets training in figures, evaluation in a table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from domino_jax.training.log import log_notice, read_metrics


def training_summary(run: Path) -> dict[str, Any]:
    """Of a run's log: its data, first and last training loss, and the last held-out figures.

    `notice` is there where the newest checkpoint does not confirm the log. Empty for an imported
    draft.

    Raises:
        InputError: the log cannot be read.
    """
    records = read_metrics(run)
    # A window in which every step was skipped has no loss; neither has a pass that was not finite.
    measured = [record for record in records if _numbers(record, "loss")]
    training = [record for record in measured if record.get("split") == "train"]
    heldout = [
        record
        for record in measured
        if record.get("split") == "heldout" and _numbers(record, "accept_len")
    ]
    data = [record for record in records if record.get("split") == "data"]
    summary: dict[str, Any] = {}
    if training:
        summary["first_loss"] = training[0]["loss"]
        summary["last_loss"] = training[-1]["loss"]
        summary["steps"] = training[-1]["step"]
    if heldout:
        summary["heldout"] = heldout[-1]
    if data:
        known = data[-1].items()
        summary["data"] = {name: value for name, value in known if name not in ("step", "split")}
    notice = log_notice(run)
    if notice is not None:
        summary["notice"] = f"{run}/{notice}"
    return summary


def _numbers(record: dict[str, Any], *names: str) -> bool:
    """Whether a line of a log, which may be damaged, has figures of these names."""
    return all(type(record.get(name)) in (int, float) for name in names)


def evaluation_table(report: dict[str, Any]) -> Table:
    """The table of an `evaluation.json`: a column per prompt set, what else was measured below."""
    evaluator = report["evaluator"]
    head = f"head {evaluator['head']}" if evaluator["head"] else "no head"
    title = (
        f"{evaluator['target']}, step {evaluator['step']}, block {evaluator['block_size']}, "
        f"{head}, temperature {evaluator['temperature']}, "
        f"{evaluator['max_new_tokens']} new tokens, {evaluator['dtype']}"
    )
    table = Table("", *report["sets"], title=title, caption="; ".join(_caption(report)))
    columns = [_column(figures) for figures in report["sets"].values()]
    for name in columns[0]:
        cells = [column[name] for column in columns]
        # What no set has is left out: a head that could be off, speeds.
        if any(cells):
            table.add_row(name, *(text or "-" for text in cells))
    return table


def _column(figures: dict[str, Any]) -> dict[str, str]:
    """What a set of prompts shows in each row; nothing where it was not measured."""
    ways, speed, endpoint = figures["ways"], figures.get("speed"), figures.get("endpoint")
    rates = [speed["tokens_per_second"], speed["tokens_per_second_plain"]] if speed else []
    compared = [way for way in ways.values() if "tokens_compared" in way]  # none of samples
    # Not every server tells what its drafts took.
    served = [endpoint.get(key) for key in ("tau", "ratio", "proposals")] if endpoint else []
    return {
        "prompts": f"{figures['prompts']}",
        "proposals": f"{ways['serving']['proposals']}",
        "tau (95 %)": _tau(ways["serving"]),
        "tau, head off": _tau(ways.get("head_off")),
        "tau, block proposals": _tau(ways.get("block")),
        "n-gram floor": _tau(ways.get("ngram")),
        "counted by": "replay" if figures["replayed"] else "decoding",
        "tokens/s speculative / plain": " / ".join(f"{rate:.1f}" for rate in rates),
        "tokens compared / equal": _equal(compared),
        "endpoint: tau, over ours, proposals": ", ".join(
            "-" if figure is None else f"{figure:.4g}" for figure in served
        ),
        "endpoint: tokens compared / equal": _equal([endpoint] if endpoint else []),
    }


def _tau(way: dict[str, Any] | None) -> str:
    if way is None:
        return ""
    # One prompt has no interval.
    ends = way.get("interval")
    return f"{way['tau']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def _equal(compared: list[dict[str, Any]]) -> str:
    """Of all that were compared with the target's own output, added up."""
    tokens = sum(one["tokens_compared"] for one in compared)
    equal = sum(one["tokens_equal"] for one in compared)
    return f"{tokens} / {equal}" if compared else ""


def _caption(report: dict[str, Any]) -> Iterator[str]:
    training = report["training"]
    cycle = report["cycle"] or {}  # null where no cycle was timed
    if cycle.get("break_even_tau") is not None:
        yield f"break-even tau {cycle['break_even_tau']:.2f} at batch 1 here"
    if cycle.get("break_even_tau_if_one_step") is not None:
        yield f"{cycle['break_even_tau_if_one_step']:.2f} where verifying a block costs one step"
    if "first_loss" in training:
        loss = f"loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}"
        yield f"{loss} in {training['steps']} steps"
    if "heldout" in training:
        # Teacher-forced, and told to be: it is no tau, and stands beside several of them.
        heldout = training["heldout"]
        known = _numbers(heldout, "base_accept_len")
        base = f", base {heldout['base_accept_len']:.3f}" if known else ""
        yield f"held-out accept_len (teacher-forced) {heldout['accept_len']:.3f}{base}"
