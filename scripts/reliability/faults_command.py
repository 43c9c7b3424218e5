"""A promise about crashes and rot is worth what was tried: this breaks real runs on purpose.

`scripts/reliability/faults [PART[=COUNT]]...` tells what held, in one table at the end.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from faults_damage import damaged, logs, misplaced
from faults_disk import full_disks
from faults_growth import growth
from faults_kills import kills, saves, signals
from faults_owners import owners
from faults_place import Case, Place
from faults_refusals import DRIFT, NUMBERS, SILENCE, drift, numbers, silence

Part = Callable[[Place, int], Iterator[Case]]
PARTS: dict[str, tuple[Part, int]] = {
    "kills": (kills, 50),
    "saves": (saves, 60),
    "owners": (owners, 50),
    "signals": (signals, 30),
    "damage": (damaged, 400),
    "places": (misplaced, 200),
    "logs": (logs, 100),
    "drift": (drift, len(DRIFT) + 1),
    "numbers": (numbers, len(NUMBERS)),
    "silence": (silence, len(SILENCE)),
    "disk": (full_disks, 30),
    "growth": (growth, 30),  # minutes
}


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART[=COUNT]]...")
@click.option("--seed", default=0, show_default=True, help="Of every choice.")
@click.option("--keep", is_flag=True, help="Keep the directory of a case that did not hold.")
def main(parts: tuple[str, ...], seed: int, keep: bool) -> None:
    """Breaks real runs on purpose; exit code 1 if anything did not hold."""
    asked = {}
    for word in parts or tuple(PARTS):
        name, _, count = word.partition("=")
        if name not in PARTS or (count and not count.isdigit()):
            raise click.UsageError(
                f"{word}: expected PART or PART=COUNT, with a PART of {', '.join(PARTS)}"
            )
        asked[name] = int(count) if count else PARTS[name][1]
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    rows, bad = [], []
    place = Place(directory, seed=seed)
    try:
        for name, count in asked.items():
            began = time.monotonic()
            cases = list(PARTS[name][0](place, count))
            wrong = [case for case in cases if case.fault is not None]
            rows.append((name, cases, wrong, time.monotonic() - began))
            bad += wrong
    finally:
        place.close()
        if keep and bad:
            click.echo(f"kept: {directory}", err=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    click.echo(table(rows))
    for name, cases, _, _ in rows:
        if name == "growth":  # whose cases are figures
            click.echo("\n".join(f"- {case.name}" for case in cases))
    for case in bad:
        click.echo(f"- {case.part}: {case.name}: {case.fault}")
    sys.exit(1 if bad else 0)


def table(rows: list[tuple[str, list[Case], list[Case], float]]) -> str:
    """The Markdown table: a row for each part, what came of its cases counted."""
    lines = [
        "| part | cases | held | did not hold | outcomes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, cases, wrong, seconds in rows:
        kinds = [case.outcome for case in cases if case.outcome]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        held = len(cases) - len(wrong)
        lines.append(
            f"| {name} | {len(cases)} | {held} | {len(wrong)} | {counted} | {seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
