"""What went wrong for users of the other trainers, and one table of the tests that watch it here.

A test that keeps such a thing from happening says so beside itself, with the faults that were put
into the package by hand to see it fail:

    @pytest.mark.pitfall("labels shifted by one", seen="draft/blocks.py: target_ids one earlier")

`pytest --pitfalls` prints the table as the page `docs/pitfalls.md` holds it. The files of the tests
are parsed, not imported, so that the table takes a moment and needs none of their packages.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "pitfalls.md"
PITFALLS = (
    "shift_label missing from the saved config",
    "misspelt or contradicting keys of a draft's config pass silently",
    "rotary frequencies rounded to bfloat16 by a model-wide cast",
    "rotary base or partial factor read from the wrong key, or written under one key only",
    "context up to and with the anchor",
    "labels shifted by one",
    "hidden state off by one layer",
    "mask token aliases eos, pad or bos, or changes on resume or import",
    "no valid anchor in a batch: crash or hang",
    "fully masked attention rows: NaN",
    "a boolean mask added as +1 and 0",
    "merged softmaxes: the log-sum-exp's gradient is dropped without a word",
    "shapes that depend on the data: recompilation late in an epoch",
    "whole logits twice",
    "a dense mask of gigabytes",
    "head not saved, random embedding exported, unknown keys skipped",
    "gamma None silently off or on",
    "a tied head ignored",
    "resume replays the epoch or loses the order",
    "an unfinished save picked up",
    "trained at 98 %, served at 10 %: drafting differs from training",
    "trained at 98 %, served at 10 %: another chat template",
    "a sampled token that equals the mask token is dropped",
    "most answers cut at the token limit, unnoticed",
    "averages biased by short batches",
    "bfloat16 masters and softmax",
    "offline states fill the disk",
    "the first update has rate 0",
    "a batch without anchors still moves the weights through the moments",
    "a NaN is trained on, saved, and the good checkpoints are rotated away",
    "a flipped bit in a checkpoint trains on in silence",
    "a run that lost its checkpoints begins again without a word",
    "resumed with other data, weights, tokens or another template",
    "the log of a resumed run differs from that of an undisturbed one",
    "an evaluator that does not say what it measured",
    "text rendered and tokenised again: the row differs from what was generated",
    "a template prints the date: prompts and fingerprints change at midnight",
    "tools, weight or other keys of a line ignored",
)
HEAD = """\
# What went wrong for users of the other trainers

And the tests that keep it from happening here. Each was tried alone, and alone under each of the
faults beside it where a semicolon parts several, which were put into the package by hand: every
time it failed for what the first column says (2026-11-24 to 2026-12-01). The table is made from the
marks of the tests: `pytest --pitfalls > docs/pitfalls.md`.

| what happened | tests | seen to fail under |
|---|---|---|
"""


@dataclass(frozen=True)
class Watch:
    """A test that watches a pitfall, `draft/test_mask.py::test_...`, and the faults it saw."""

    pitfall: str
    test: str
    seen: str


def watches(tests: Path = TESTS) -> list[Watch]:
    """The pitfall marks of all test functions below a directory."""
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                test = f"{path.relative_to(tests)}::{node.name}"
                found += [Watch(pitfall, test, seen) for pitfall, seen in _marks(node)]
    return found


def _marks(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.pitfall":
            (pitfall,), (seen,) = mark.args, mark.keywords
            yield ast.literal_eval(pitfall), ast.literal_eval(seen.value)


def page(found: list[Watch]) -> str:
    """The table in the order of the list, a line for each test."""
    lines = []
    for pitfall in PITFALLS:
        shown = pitfall
        for watch in found:
            if watch.pitfall == pitfall:
                lines.append(f"| {shown} | `{watch.test}` | {watch.seen} |\n")
                shown = ""
    return HEAD + "".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that prints the table instead of running tests."""
    parser.addoption("--pitfalls", action="store_true", help="print docs/pitfalls.md, run nothing")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Prints the table where it is asked for."""
    if not config.getoption("pitfalls"):
        return None
    print(page(watches()), end="")
    return 0
