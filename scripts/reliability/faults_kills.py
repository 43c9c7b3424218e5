"""Machines are taken away at any moment: processes that end at random ones.

`kill -9` on training, SIGTERM and SIGINT on seven verbs:

start-up | inputs | compile | step step [save] step step [save] ... | end
    ^ uniformly over the time that an undisturbed process takes
                                    ^ aimed: as soon as an unfinished save lies on the disk
"""

import functools
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from faults_place import (
    ANSWERS,
    Bits,
    Case,
    Place,
    all_cases,
    cleared,
    difference,
    in_turn,
    left,
    override,
    run_bits,
)
from faults_process import Running
from faults_verdict import DONE, INTERRUPTED, completion, crash, interruption, last_line

KILLS_PER_RUN = 4
AIMED = 0.3  # share of kills that wait for a save
COMMANDS = 0.3  # share of processes that begin at the very start; the others have imported jax
STEPS = override(train__steps=40)


def kills(place: Place, count: int) -> Iterator[Case]:
    """`kill -9` until `count` have struck; every run is started again until it ends equal."""
    yield from _killed_runs("kills", place, count, aimed=AIMED)


def saves(place: Place, count: int) -> Iterator[Case]:
    """`kill -9` during saves; no complete checkpoint may be reported as damaged."""
    yield from _killed_runs("saves", place, count, aimed=1.0)


def _killed_runs(part: str, place: Place, count: int, *, aimed: float) -> Iterator[Case]:
    run = functools.partial(_killed_run, part, place, *_reference(place), aimed=aimed)
    works = []
    for index, first in enumerate(range(0, count, KILLS_PER_RUN)):
        number = min(KILLS_PER_RUN, count - first)
        works.append((f"run {index + 1}", functools.partial(run, index=index, count=number)))
    yield from all_cases(part, works, count)


def _reference(place: Place) -> tuple[Bits, dict[bool, float]]:
    """An undisturbed run, and how long one takes by either way of beginning it."""
    filling, filled = place.filling, place.copy()
    process = filling.begin(filled, "train", "config.yaml", STEPS)
    while process.poll() is None and "saving checkpoint 8" not in process.log.read_text():
        time.sleep(0.01)
    process.send(signal.SIGTERM)
    process.wait()
    outcome = filling.run(filled, "train", "config.yaml", STEPS)  # what a resumed run compiles
    assert outcome.code == DONE, outcome.log
    seconds = {}
    for command in (True, False):
        directory = place.copy()
        outcome = place.processes().run(directory, "train", "config.yaml", STEPS, command=command)
        assert outcome.code == DONE, outcome.log
        seconds[command] = outcome.seconds
        bits = run_bits(directory / "run")
    return bits, seconds


def _killed_run(
    part: str,
    place: Place,
    reference: Bits,
    seconds: dict[bool, float],
    *,
    aimed: float,
    index: int,
    count: int,
) -> list[Case]:
    rng, directory = place.random(1, index), place.copy()
    moments: list[str] = []
    fault = None
    for _ in range(count * 5):
        command = bool(rng.random() < COMMANDS)
        process = place.processes().begin(directory, "train", "config.yaml", STEPS, command=command)
        moment = ""
        if len(moments) < count:
            aim = bool(rng.random() < aimed)
            moment = _kill(process, directory / "run", rng, seconds[command], aimed=aim)
        outcome = process.wait()
        if "damaged" in outcome.log:
            fault = f"a kill left a checkpoint that counts as damaged: {last_line(outcome)}"
            break
        if outcome.code == -signal.SIGKILL:
            moments.append(moment)
            continue
        fault = completion(outcome, start="started again, it")
        if fault is not None or len(moments) == count:
            break
        # It ended before its kill: its bits count, and another run takes the kills that are left.
        fault = reference.differences(run_bits(directory / "run"))
        if fault is not None:
            break
        shutil.rmtree(directory / "run")
    if fault is None:
        fault = reference.differences(run_bits(directory / "run"))
    fault = cleared(directory, fault)
    return [
        Case(part, f"run {index + 1}, kill {k + 1} ({what})", fault)
        for k, what in enumerate(moments or ["none struck"])
    ]


def _kill(
    process: Running, run: Path, rng: np.random.Generator, seconds: float, *, aimed: bool
) -> str:
    """Kills at a random moment, or during a save; returns the moment in words."""
    delay = float(rng.uniform(0, seconds))
    if aimed:
        # From the first file of a save on, or from its checksums on, which come last.
        begun = rng.random() < 0.5
        pattern = "*tmp*" if begun else "*tmp*/SHA256SUMS"
        extra = float(rng.uniform(0, 0.08 if begun else 0.01))
        wanted = int(rng.integers(1, 5))
        seen: set[str] = set()
        while process.poll() is None and len(seen) < wanted:
            seen |= {str(path) for path in (run / "checkpoints").glob(pattern)}
            time.sleep(0.001)
        time.sleep(extra)
    else:
        process.wait_until(delay)
    process.send(signal.SIGKILL)
    lines = process.log.read_text(errors="replace").splitlines()
    where = next(
        (line for line in reversed(lines) if re.match("step|saving|resum|load|compil", line)),
        "start-up",
    )
    return f"{time.monotonic() - process.began:.2f} s, {where[:30]}"


# The words of each verb, and where it leaves what does not depend on the machine's speed.
VERBS: dict[str, tuple[tuple[str, ...], str]] = {
    "train": (("train", "config.yaml", STEPS), "run"),
    "regenerate": (
        (*ANSWERS, *("--batch-size", "2", "--max-new-tokens", "60", "--temperature", "0.7")),
        "answers.jsonl",
    ),
    "prompts": (
        (
            *("prompts", "own.jsonl", "--target", "target", "--count", "40"),
            *("--batch-size", "16", "--max-new-tokens", "40", "--temperature", "1"),
        ),
        "own.jsonl",
    ),
    "capture": (("capture", "config.yaml", "states"), "states"),
    "evaluate": (
        (
            *("evaluate", "trained", "prompts.jsonl"),
            *("--limit", "4", "--max-new-tokens", "40", "--timed", "0"),
        ),
        "trained/evaluation.json",
    ),
    "report": (("report", "trained"), "trained/report.html"),
    "generate": (("generate", "trained", "a b c", "--max-new-tokens", "100"), ""),
}


def signals(place: Place, count: int) -> Iterator[Case]:
    """One SIGTERM or SIGINT at a random moment of a verb; then the same words again, to the end."""
    trained = place.copy()
    filling = place.filling
    outcome = filling.run(trained, "train", "config.yaml")
    assert outcome.code == DONE, outcome.log
    (trained / "run").rename(trained / "trained")
    undisturbed: dict[str, object] = {}
    seconds: dict[str, float] = {}
    for verb, (words, name) in VERBS.items():
        filling.run(place.copy(trained), *words)
        directory = place.copy(trained)
        outcome = place.processes().run(directory, *words, command=True)
        assert outcome.code == DONE, outcome.log
        undisturbed[verb], seconds[verb] = left(directory, name, outcome), outcome.seconds

    def case(index: int, verb: str) -> Case:
        return _signalled(place, trained, index, verb, undisturbed[verb], seconds[verb])

    yield from all_cases("signals", in_turn(VERBS, count, case), count)


def _signalled(
    place: Place, trained: Path, index: int, verb: str, undisturbed: object, seconds: float
) -> Case:
    rng, directory = place.random(2, index), place.copy(trained)
    number = signal.Signals(rng.choice([signal.SIGTERM, signal.SIGINT]))
    delay = float(rng.uniform(0.02, seconds))
    words, where = VERBS[verb]
    process = place.processes().begin(directory, *words, command=True)
    process.wait_until(delay)
    struck = process.send(number)
    sent = time.monotonic()
    outcome = process.wait()
    fault = interruption(outcome, seconds=time.monotonic() - sent) if struck else crash(outcome)
    python = not outcome.log and outcome.code in (-number, 1, INTERRUPTED)
    if fault is not None and struck and delay < 0.3 and python:
        fault = None  # before the first line of the package: Python's own start, nothing was begun
    if fault is None and outcome.code == INTERRUPTED:
        again = place.processes().run(directory, *words)
        fault = completion(again, start="the same command then")
        if fault is None:
            found = difference(undisturbed, left(directory, where, again))
            fault = found and f"the same command then leaves something else: {found}"
    name = f"{number.name} {delay:.2f} s into {verb}, code {outcome.code}"
    return Case("signals", name, cleared(directory, fault))
