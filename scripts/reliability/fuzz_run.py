"""A hole in a parser shows among many inputs alone: runs the cases of `fuzz_parsers.py`.

In this process or through the command; counts what became of them.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click
from fuzz_cases import Case, Parser
from fuzz_parsers import all_parsers

SECONDS = 10.0
REFUSED, ACCEPTED = "refused in one line", "accepted"
BAD = ("tracebacks", "slower than 10 s", "accepted though forbidden")
EXAMPLES = 5  # that are printed of each parser and kind


class Slow(BaseException):
    """Raised by the timer; not an Exception, so that no parser takes it for one of its own."""


def main() -> int:
    """Parses the arguments, runs, prints the table; 1 where anything bad was found."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=20_000, help="inputs in this process")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cli", type=int, default=0, help="inputs through the command, instead")
    options.add_argument("--only", help="parsers whose name contains this")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet():
        parsers = [
            one for one in all_parsers(Path(folder)) if not given.only or given.only in one.name
        ]
        if given.cli:
            return through_the_command(parsers, Path(folder), count=given.cli, seed=given.seed)
        began = time.monotonic()
        found = {}
        for parser, count in zip(parsers, shares(parsers, given.count), strict=True):
            found[parser.name] = run(parser, count=count, seed=given.seed)
            print_row(parser.name, found[parser.name])
        print_row("all", sum(found.values(), Counter()))
        print(f"{time.monotonic() - began:.0f} s, seed {given.seed}", flush=True)
        return int(any(counts[kind] for counts in found.values() for kind in BAD))


def shares(parsers: list[Parser], count: int) -> list[int]:
    """How many of `count` inputs each parser gets at least, by its weight."""
    whole = sum(parser.weight for parser in parsers)
    return [-(-count * parser.weight // whole) for parser in parsers]


def run(parser: Parser, *, count: int, seed: int, say: Any = print) -> Counter[str]:
    """Counts what became of `count` inputs; tells the first bad ones of each kind."""
    rng = random.Random(f"{parser.name} {seed}")
    counts: Counter[str] = Counter()
    for number in range(count):
        case = parser.inputs.draw(rng)
        kind, what = outcome(parser, case)
        counts[kind] += 1
        if kind in BAD and counts[kind] <= EXAMPLES:
            say(f"-- {parser.name}, input {number}: {kind}: {what}\n   {str(case.content)[:300]!r}")
    return counts


def outcome(parser: Parser, case: Case, *, seconds: float = SECONDS) -> tuple[str, str]:
    """The kind of what became of one input, and a few words about a bad one.

    After `seconds` an input hangs its parser.
    """
    from domino_jax.base.errors import LINE_CHARACTERS, InputError, one_line

    began = time.monotonic()
    try:
        with limit(seconds):
            problem = parser.check(case.content)
    except InputError as error:
        line = str(error)
        whole = line.isprintable() and 0 < len(line) <= LINE_CHARACTERS
        return (REFUSED, "") if whole else (BAD[0], f"not one line: {line[:200]!r}")
    except click.UsageError as error:
        return (REFUSED, "") if one_line(error.format_message()) else (BAD[0], "an empty message")
    except OSError as error:  # the command makes a line of it
        return (REFUSED, "") if error.strerror else (BAD[0], repr(error))
    except Slow:
        return BAD[1], ""
    except BaseException as error:  # Rust panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return BAD[0], "".join(traceback.format_exception(error)[-3:])[-600:]
    if time.monotonic() - began > seconds:
        return BAD[1], ""
    problem = case.forbidden or problem
    return (BAD[2], problem) if problem else (ACCEPTED, "")


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises `Slow` in its body after so many seconds."""

    def late(*_: object) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what transformers says about each odd tokenizer."""
    import logging

    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def print_row(name: str, counts: Counter[str]) -> None:
    """One row of the table: inputs and each kind."""
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in (REFUSED, ACCEPTED, *BAD))
    print(f"{name}: {counts.total()} inputs, {kinds}", flush=True)


def through_the_command(parsers: list[Parser], folder: Path, *, count: int, seed: int) -> int:
    """Inputs that parsers refuse, through the real command: one line, exit code 2, nothing made."""
    rng = random.Random(seed)
    spoken = [parser for parser in parsers if parser.words]
    done = bad = 0
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    while done < count:
        parser = spoken[done % len(spoken)]
        case = parser.inputs.draw(rng)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            kind, _ = outcome(parser, case)
        last = [] if isinstance(case.content, bytes) else case.content
        words = [*map(str, parser.words), *([last] if isinstance(last, str) else last)]
        if kind != REFUSED or any("\0" in word or len(word) > 100_000 for word in words):
            continue
        try:
            command = [os.fsencode(word) for word in (sys.executable, "-m", "domino_jax", *words)]
        except UnicodeEncodeError:  # half a surrogate pair is no word of any shell
            continue
        done += 1
        before = set(folder.rglob("*"))
        result = subprocess.run(
            command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=120
        )
        text = result.stderr.decode("utf-8", "replace")
        made = sorted(set(folder.rglob("*")) - before)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        one_line = len(errors) == 1 and len(errors[0]) <= 500 and errors[0].isprintable()
        sound = result.returncode == 2 and one_line and "Traceback" not in text
        if not sound or made or result.stdout:
            bad += 1
            print(
                f"-- {parser.name}: code {result.returncode}, made {made[:3]}\n{text[-800:]}\n"
                f"   {case.content!r:.300}"
            )
    held = f"{done - bad} with code 2 and one line, nothing made"
    print(f"{done} through the command: {held}; {bad} otherwise")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
