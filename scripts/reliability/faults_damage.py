"""Damaged files: a disk or a person that breaks one must not change a result in silence.

Every kind that a verb reads is broken in every way that disks and people break files.

    group        broken                                   read by
    checkpoint   any file or directory of a step          train (resumed), export, generate
    run          whatever else lies in the run            train (resumed)
    target       weights, tokenizer, template, config     train (resumed), generate
    rows         training and held-out conversations      train (resumed)
    states       manifest and shards of a capture         train (from the start), capture
    draft        an exported checkpoint                   import, train with draft.init_from
    partial      an unfinished file of answers            regenerate (resumed)

Each ends in one of three ways: restored from an earlier checkpoint and said so, harmless (all bits
at the end are those of an undisturbed process), or refused in one line.
"""

import dataclasses
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
)
from faults_process import Outcome, Running
from faults_verdict import DONE, damage

REAL_COMMANDS = 20  # of the cases, spread evenly: the others have imported jax before
STEPS = override(train__steps=16)
FEW = override(train__steps=4)
SAID = re.compile("damaged|aside|is gone|incomplete|cut off", re.IGNORECASE)

TRAIN = ("train", "config.yaml", STEPS)
_STATES = ("data.train=null", "data.hidden_states=states")
OFFLINE = ("train", "config.yaml", FEW, "run_dir=offline", *_STATES)
STARTED = ("train", "config.yaml", FEW, "run_dir=started", "draft.init_from=draft")
EXPORT = ("export", "run", "exported", "--dtype", "float32")
IMPORT = ("import", "draft", "imported", "--target", "target")
GENERATE = ("generate", "run", "a b c", "--max-new-tokens", "24")
CAPTURE = ("capture", "config.yaml", "states")
REGENERATE = (*ANSWERS, *("--batch-size", "2", "--max-new-tokens", "24", "--temperature", "0.7"))

# Where they leave something, for a comparison bit for bit; elsewhere what they print.
LEAVE = {
    TRAIN: "run",
    OFFLINE: "offline",
    STARTED: "started",
    EXPORT: "exported",
    IMPORT: "imported",
    CAPTURE: "states",
    REGENERATE: "answers.jsonl",
}
# The words that read each group, and how often a group is drawn.
READERS: dict[str, tuple[tuple[tuple[str, ...], ...], int]] = {
    "checkpoint": ((TRAIN, TRAIN, TRAIN, EXPORT, GENERATE), 48),
    "run": ((TRAIN,), 14),
    "target": ((TRAIN, GENERATE), 12),
    "rows": ((TRAIN,), 8),
    "states": ((OFFLINE, OFFLINE, CAPTURE), 8),
    "draft": ((IMPORT, STARTED), 6),
    "partial": ((REGENERATE,), 4),
}


@dataclass(frozen=True)
class Undisturbed:
    """What the words leave where nothing is broken.

    Attributes:
        place: a run that was stopped, captured states, an export, an unfinished file of answers.
        newest: the step of the run's newest checkpoint.
        left: by the words, what they leave; for `export` and `generate` also by step, of earlier
            ones.
    """

    place: Path
    newest: int
    left: dict[tuple[str, ...], Any]
    earlier: dict[tuple[str, ...], list[Any]]


def damaged(place: Place, count: int) -> Iterator[Case]:
    """Breaks `count` places one at a time and starts a verb that reads them."""
    undisturbed = _undisturbed(place)
    groups = [name for name, (_, share) in READERS.items() for _ in range(share)]
    order = [groups[number] for number in place.random(3).permutation(len(groups))]

    def case(index: int, group: str) -> Case:
        command = index % max(count // REAL_COMMANDS, 1) == 0
        return _case(place, undisturbed, index, group, command=command)

    yield from all_cases("damage", in_turn(order, count, case), count)


def stopped_place(place: Place) -> Path:
    """A place with a run that was stopped in its middle, states, an export, unfinished answers."""
    base = place.directory / "stopped"
    if base.is_dir():
        return base
    shutil.copytree(place.base, base)
    filling = place.filling
    _stopped(filling.begin(base, *TRAIN), "saving checkpoint 12")
    assert filling.run(base, *CAPTURE).code == DONE
    assert filling.run(base, "export", "run", "draft", "--dtype", "float32").code == DONE
    _stopped(filling.begin(base, *REGENERATE), "answers 4/12")
    partial = base / "answers.jsonl.partial"
    assert partial.is_file(), "the answers were complete before they could be interrupted"
    return base


def _stopped(process: Running, line: str) -> None:
    """Interrupts a process once it has written a line."""
    while process.poll() is None and line not in process.log.read_text():
        time.sleep(0.002)
    process.send(signal.SIGTERM)
    process.wait()


def _undisturbed(place: Place) -> Undisturbed:
    filling, base = place.filling, stopped_place(place)
    steps = sorted(
        int(path.name) for path in (base / "run" / "checkpoints").iterdir() if path.name.isdigit()
    )
    undisturbed, earlier = {}, {}
    for words in {words for readers, _ in READERS.values() for words in readers}:
        directory = place.copy(base)
        outcome = filling.run(directory, *words)
        assert outcome.code == DONE, f"{words}: {outcome.log}"
        undisturbed[words] = left(directory, LEAVE.get(words, ""), outcome)
        earlier[words] = []
    for words in (EXPORT, GENERATE):
        directory = place.copy(base)
        for step in reversed(steps[1:]):
            shutil.rmtree(directory / "run" / "checkpoints" / str(step))
            shutil.rmtree(directory / "exported", ignore_errors=True)
            outcome = filling.run(directory, *words)
            assert outcome.code == DONE, f"{words}: {outcome.log}"
            earlier[words].append(left(directory, LEAVE.get(words, ""), outcome))
    return Undisturbed(base, steps[-1], undisturbed, earlier)


def _case(place: Place, undisturbed: Undisturbed, index: int, group: str, *, command: bool) -> Case:
    rng, directory = place.random(4, index), place.copy(undisturbed.place)
    readers = READERS[group][0]
    words = readers[int(rng.integers(len(readers)))]
    broken, how = break_something(_candidates(directory, group, rng), rng)
    outcome = place.processes().run(directory, *words, command=command)
    differences = None
    if outcome.code == DONE:
        try:
            differences = _differences(undisturbed, words, directory, outcome)
        except Exception as error:  # orbax has no exception of its own for a damaged checkpoint
            read = f"{type(error).__name__}: {str(error)[:100]}"
            differences = f"what it leaves cannot be read: {read}"
    said = bool(SAID.search(outcome.log))
    kind, fault = damage(outcome, differences=differences, said=said)
    if fault is None and kind == "harmless" and words == TRAIN and group in ("checkpoint", "run"):
        fault = _silence(undisturbed, outcome, directory, broken)
    name = f"{index}: {broken.relative_to(directory)} {how}, read by {words[0]}"
    return Case("damage", name, cleared(directory, fault), kind)


def _silence(
    undisturbed: Undisturbed, outcome: Outcome, directory: Path, broken: Path
) -> str | None:
    """An earlier state that was taken without a word though the newest one lay there."""
    resumed = re.search(r"resuming at step (\d+)", outcome.log)
    newest = directory / "run" / "checkpoints" / str(undisturbed.newest)
    if resumed is None:
        return "started from step 0 without a word"
    if int(resumed[1]) < undisturbed.newest and broken != newest:
        return f"took step {resumed[1]} instead of {undisturbed.newest} without a word"
    return None


def _candidates(directory: Path, group: str, rng: np.random.Generator) -> list[Path]:
    """What may be broken: files and directories, the newest step more often than the others."""
    run = directory / "run"
    if group == "checkpoint":
        steps = sorted(
            (path for path in (run / "checkpoints").iterdir() if path.name.isdigit()),
            key=lambda p: int(p.name),
        )
        step = steps[-1] if rng.random() < 0.8 else steps[int(rng.integers(len(steps)))]
        return [step, *sorted(step.rglob("*"))]
    if group == "run":
        steps = set((run / "checkpoints").iterdir())
        return sorted(
            path for path in run.rglob("*") if path not in steps and not steps & set(path.parents)
        )
    if group == "rows":
        return [directory / "rows.jsonl", directory / "heldout.jsonl"]
    if group == "partial":
        return [directory / "answers.jsonl.partial"]
    return sorted((directory / group).rglob("*"))


def break_something(candidates: list[Path], rng: np.random.Generator) -> tuple[Path, str]:
    """Breaks one of the candidates; which, and how."""
    path = candidates[int(rng.integers(len(candidates)))]
    if path.is_dir():
        shutil.rmtree(path)
        if rng.random() < 0.3:
            path.mkdir()
            return path, "emptied"
        return path, "removed"
    ways = list(WAYS)
    way = ways[int(rng.integers(len(ways)))]
    WAYS[way](path, rng)
    return path, way


def _rewrite(
    change: Callable[[bytearray, int, np.random.Generator], bytes],
) -> Callable[[Path, np.random.Generator], object]:
    """A way of breaking that changes a file's bytes at a random place of it."""

    def apply(path: Path, rng: np.random.Generator) -> None:
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content, int(rng.integers(max(len(content), 1))), rng))

    return apply


def _another_byte(content: bytearray, at: int, rng: np.random.Generator) -> bytes:
    content[at : at + 1] = rng.bytes(1)
    return content


def _flip(content: bytearray, at: int, rng: np.random.Generator) -> bytes:
    if content:
        content[at] ^= 1 << int(rng.integers(8))
    return content


def _zero(content: bytearray, at: int, rng: np.random.Generator) -> bytes:
    """As after a power cut: a part of the file was never written."""
    last = min(at + 512, len(content))
    content[at:last] = bytes(last - at)
    return content


def _repeat(content: bytearray, at: int, rng: np.random.Generator) -> bytes:
    """A line twice, or the bytes of a file without lines."""
    lines = bytes(content).splitlines(keepends=True) or [b"x"]
    number = int(rng.integers(len(lines)))
    return b"".join([*lines[: number + 1], *lines[number:]])


def _append(content: bytearray, at: int, rng: np.random.Generator) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 64)))


def _directory(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


WAYS: dict[str, Callable[[Path, np.random.Generator], object]] = {
    "with a bit flipped": _rewrite(_flip),
    "with another byte": _rewrite(_another_byte),
    "truncated": _rewrite(lambda content, at, rng: content[:at]),
    "with zeros": _rewrite(_zero),
    "with bytes appended": _rewrite(
        lambda content, at, rng: content + rng.bytes(int(rng.integers(1, 64)))
    ),
    "with a line twice": _rewrite(_repeat),
    "emptied": _rewrite(lambda content, at, rng: b""),
    "removed": lambda path, rng: path.unlink(),
    "made a directory": _directory,
}


def _differences(
    undisturbed: Undisturbed, words: tuple[str, ...], directory: Path, outcome: Outcome
) -> str | None:
    found = left(directory, LEAVE.get(words, ""), outcome)
    expected = undisturbed.left[words]
    if SAID.search(outcome.log) and found in undisturbed.earlier[words]:
        return None
    if isinstance(found, Bits) and "metrics.jsonl is gone" in outcome.log:
        found = dataclasses.replace(found, metrics=expected.metrics)  # a lost log is no lost state
    return difference(expected, found)
