"""A run's files are for programs: here a person gets training in figures, evaluation in a table."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from domino_jax.training.log import read_metrics


def training_summary(run: Path) -> dict[str, Any]:
    """Of a run's log: its data, first and last training loss, and the last held-out figures.

    Empty for an imported draft.
    """
    records = read_metrics(run)
    # A window in which every step was skipped has no loss; neither has a pass that was not finite.
    measured = [record for record in records if record.get("loss") is not None]
    training = [record for record in measured if record.get("split") == "train"]
    heldout = [record for record in measured if record.get("split") == "heldout"]
    summary: dict[str, Any] = {}
    if training:
        summary |= {
            "first_loss": training[0]["loss"],
            "last_loss": training[-1]["loss"],
            "steps": training[-1]["step"],
        }
    if heldout:
        summary["heldout"] = heldout[-1]
    for record in records:
        if record.get("split") == "data":
            summary["data"] = {
                name: record[name] for name in record if name not in ("step", "split")
            }
    return summary


def evaluation_table(report: dict[str, Any]) -> Table:
    """The table of an `evaluation.json`: a column per prompt set, what else was measured below."""
    evaluator = report["evaluator"]
    head = f"head {evaluator['head']}" if evaluator["head"] else "no head"
    title = (
        f"{evaluator['target']}, step {evaluator['step']}, block {evaluator['block_size']}, "
        f"{head}, temperature {evaluator['temperature']}, "
        f"{evaluator['max_new_tokens']} new tokens, {evaluator['dtype']}"
    )
    table = Table("", *report["sets"], title=title)
    columns = list(report["sets"].values())

    def row(name: str, cell: Callable[[dict[str, Any]], str | None]) -> None:
        cells = [cell(figures) for figures in columns]
        # What no set has is left out: a head that could be off, speeds.
        if any(cells):
            table.add_row(name, *(text or "-" for text in cells))

    row("prompts", lambda figures: f"{figures['prompts']}")
    row("proposals", lambda figures: f"{figures['ways']['serving']['proposals']}")
    row("tau (95 %)", _tau_of("serving"))
    row("tau, head off", _tau_of("head_off"))
    row("tau, block proposals", _tau_of("block"))
    row("n-gram floor", _tau_of("ngram"))
    row("counted by", _counted_by)
    row("tokens/s speculative / plain", _speeds)
    row("tokens compared / equal", _compared)
    row("endpoint: tau, over ours, proposals", _endpoint_tau)
    row("endpoint: tokens compared / equal", _endpoint_text)
    table.caption = "; ".join(_caption(report))
    return table


def _tau_of(way: str) -> Callable[[dict[str, Any]], str | None]:
    def cell(figures: dict[str, Any]) -> str | None:
        measured = figures["ways"].get(way)
        if measured is None:
            return None
        tau = f"{measured['tau']:.3f}"
        # One prompt has no interval.
        ends = measured.get("interval")
        return f"{tau} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else tau

    return cell


def _counted_by(figures: dict[str, Any]) -> str | None:
    if "replayed" not in figures:
        return None
    return "replay" if figures["replayed"] else "decoding"


def _speeds(figures: dict[str, Any]) -> str | None:
    speed = figures.get("speed")
    if speed is None:
        return None
    return f"{speed['tokens_per_second']:.1f} / {speed['tokens_per_second_plain']:.1f}"


def _compared(figures: dict[str, Any]) -> str | None:
    """Of all ways that draft by a model, added up; None of sampled answers."""
    compared = [way for way in figures["ways"].values() if "tokens_compared" in way]
    if not compared:
        return None
    tokens = sum(way["tokens_compared"] for way in compared)
    equal = sum(way["tokens_equal"] for way in compared)
    return f"{tokens} / {equal}"


def _endpoint_tau(figures: dict[str, Any]) -> str | None:
    # Not every server tells what its drafts took.
    if "endpoint" not in figures:
        return None
    shown = [figures["endpoint"].get(key) for key in ("tau", "ratio", "proposals")]
    return ", ".join("-" if figure is None else f"{figure:.4g}" for figure in shown)


def _endpoint_text(figures: dict[str, Any]) -> str | None:
    endpoint = figures.get("endpoint")
    return f"{endpoint['tokens_compared']} / {endpoint['tokens_equal']}" if endpoint else None


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
        base = ""
        if "base_accept_len" in heldout:
            base = f", base {heldout['base_accept_len']:.3f}"
        yield f"held-out accept_len (teacher-forced) {heldout['accept_len']:.3f}{base}"
