"""A run's files are for programs: here a person gets training in figures, evaluation in a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from domino_jax.training.metrics import read_metrics


def training_summary(run: Path) -> dict[str, Any]:
    """First and last training loss and the last held-out figures of a run's log.

    Empty for an imported draft.
    """
    # A window in which every step was skipped has no loss; neither has a pass that was not finite.
    records = [record for record in read_metrics(run) if record.get("loss") is not None]
    training = [record for record in records if record["split"] == "train"]
    heldout = [record for record in records if record["split"] == "heldout"]
    summary: dict[str, Any] = {}
    if training:
        summary |= {
            "first_loss": training[0]["loss"],
            "last_loss": training[-1]["loss"],
            "steps": training[-1]["step"],
        }
    if heldout:
        summary["heldout"] = heldout[-1]
    return summary


def evaluation_table(report: dict[str, Any]) -> Table:
    """The table of an `evaluation.json`: a column per prompt set, the training figures below."""
    evaluator = report["evaluator"]
    training = report["training"]
    title = (
        f"{evaluator['target']}, step {evaluator['step']}, block {evaluator['block_size']}, "
        f"{evaluator['proposals']} proposals, temperature {evaluator['temperature']}, "
        f"{evaluator['max_new_tokens']} new tokens"
    )
    if "dtype" in evaluator:  # older reports do not say
        title += f", {evaluator['dtype']}"
    table = Table("", *report["sets"], title=title)
    columns = list(report["sets"].values())

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(cell(figures) for figures in columns))

    def figure(key: str, digits: int) -> Callable[[dict[str, Any]], str]:
        # Some may be missing: head off without a Domino head, tokens compared of sampled answers.
        return lambda figures: f"{figures[key]:.{digits}f}" if key in figures else "-"

    head = any("tau_head_off" in figures for figures in columns)
    ways = ", head on and off" if head else ""  # the comparison adds them up
    row("prompts", figure("prompts", 0))
    row("tau, head on" if head else "tau", figure("tau", 3))
    row("tau, head off", figure("tau_head_off", 3))
    row("tokens/s speculative", figure("tokens_per_second", 1))
    row("tokens/s plain", figure("tokens_per_second_plain", 1))
    row(f"tokens compared{ways}", figure("tokens_compared", 0))
    row(f"tokens equal{ways}", figure("tokens_equal", 0))
    if any("endpoint" in figures for figures in columns):
        row("endpoint: tau, over ours, proposals", _endpoint_tau)
        row("endpoint: tokens compared / equal", _endpoint_text)
    if "first_loss" in training:
        table.caption = (
            f"loss {training['first_loss']:.3f} -> {training['last_loss']:.3f} "
            f"in {training['steps']} steps"
        )
    if "heldout" in training:
        # Teacher-forced, and told to be: it is no tau, and stands beside several of them.
        heldout = training["heldout"]
        base = ""
        if "base_accept_len" in heldout:
            base = f", base {heldout['base_accept_len']:.3f}"
        table.caption = (
            f"{table.caption}; held-out accept_len (teacher-forced) "
            f"{heldout['accept_len']:.3f}{base}"
        )
    return table


def _endpoint_tau(figures: dict[str, Any]) -> str:
    # Not every server tells what its drafts took.
    shown = [figures.get("endpoint", {}).get(key) for key in ("tau", "ratio", "proposals")]
    return ", ".join("-" if figure is None else f"{figure:.4g}" for figure in shown)


def _endpoint_text(figures: dict[str, Any]) -> str:
    endpoint = figures.get("endpoint")
    return f"{endpoint['tokens_compared']} / {endpoint['tokens_equal']}" if endpoint else "-"
