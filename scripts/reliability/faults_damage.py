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
import hashlib
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from faults_place import (
    ANSWERS,
    Bits,
    Case,
    Place,
    all_cases,
    cleared,
    directory_bits,
    override,
    run_bits,
)
from faults_process import Outcome, Running
from faults_verdict import DONE, damage

REAL_COMMANDS = 20  # of the cases, spread evenly: the others have imported jax before
STEPS = override(train__steps=16)
FEW = override(train__steps=4)
SAID = re.compile("damaged|aside|is gone|incomplete|cut off", re.IGNORECASE)

TRAIN = ("train", "config.yaml", STEPS)
OFFLINE = (
    "train",
    "config.yaml",
    FEW,
    "run_dir=offline",
    "data.train=null",
    "data.hidden_states=states",
)
STARTED = ("train", "config.yaml", FEW, "run_dir=started", "draft.init_from=draft")
EXPORT = ("export", "run", "exported", "--dtype", "float32")
IMPORT = ("import", "draft", "imported", "--target", "target")
GENERATE = ("generate", "run", "a b c", "--max-new-tokens", "24")
CAPTURE = ("capture", "config.yaml", "states")
REGENERATE = (*ANSWERS, *("--batch-size", "2", "--max-new-tokens", "24", "--temperature", "0.7"))

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
    left: dict[tuple[str, ...], object]
    earlier: dict[tuple[str, ...], list[object]]


def damaged(place: Place, count: int) -> Iterator[Case]:
    """Breaks `count` places one at a time and starts a verb that reads them."""
    undisturbed = _undisturbed(place)
    groups = [name for name, (_, share) in READERS.items() for _ in range(share)]
    order = place.random(3).permutation(len(groups))
    works = []
    for index in range(count):
        group = groups[order[index % len(groups)]]
        command = index % max(count // REAL_COMMANDS, 1) == 0
        works.append(
            (
                f"{index} {group}",
                lambda i=index, g=group, c=command: [_case(place, undisturbed, i, g, command=c)],
            )
        )
    yield from all_cases("damage", works, count)


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
    _stopped(filling.begin(base, *REGENERATE), "prompts 4/12")
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
    left, earlier = {}, {}
    for words in {words for readers, _ in READERS.values() for words in readers}:
        directory = place.copy(base)
        outcome = filling.run(directory, *words)
        assert outcome.code == DONE, f"{words}: {outcome.log}"
        left[words] = _left(directory, words, outcome)
        earlier[words] = []
    for words in (EXPORT, GENERATE):
        directory = place.copy(base)
        for step in reversed(steps[1:]):
            shutil.rmtree(directory / "run" / "checkpoints" / str(step))
            shutil.rmtree(directory / "exported", ignore_errors=True)
            outcome = filling.run(directory, *words)
            assert outcome.code == DONE, f"{words}: {outcome.log}"
            earlier[words].append(_left(directory, words, outcome))
    return Undisturbed(base, steps[-1], left, earlier)


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
            differences = (
                f"what it leaves cannot be read: {type(error).__name__}: {str(error)[:100]}"
            )
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


def _flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def _another_byte(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    path.write_bytes(content)


def _truncate(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(max(len(content), 1)))])


def _zero(path: Path, rng: np.random.Generator) -> None:
    """As after a power cut: a part of the file was never written."""
    content = bytearray(path.read_bytes())
    first = int(rng.integers(max(len(content), 1)))
    last = min(first + 512, len(content))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def _append(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 64))))


def _directory(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def _repeat(path: Path, rng: np.random.Generator) -> None:
    """A line twice, or the bytes of a file without lines."""
    lines = path.read_bytes().splitlines(keepends=True) or [b"x"]
    number = int(rng.integers(len(lines)))
    path.write_bytes(b"".join([*lines[: number + 1], *lines[number:]]))


WAYS: dict[str, Callable[[Path, np.random.Generator], object]] = {
    "with a bit flipped": _flip,
    "with another byte": _another_byte,
    "truncated": _truncate,
    "with zeros": _zero,
    "with bytes appended": _append,
    "with a line twice": _repeat,
    "emptied": lambda path, rng: path.write_bytes(b""),
    "removed": lambda path, rng: path.unlink(),
    "made a directory": _directory,
}


def _differences(
    undisturbed: Undisturbed, words: tuple[str, ...], directory: Path, outcome: Outcome
) -> str | None:
    left, expected = _left(directory, words, outcome), undisturbed.left[words]
    if left == expected:
        return None
    if SAID.search(outcome.log) and left in undisturbed.earlier[words]:
        return None
    if isinstance(left, Bits) and isinstance(expected, Bits):
        if "metrics.jsonl is gone" in outcome.log:  # a lost log is no lost state
            left = dataclasses.replace(left, metrics=expected.metrics)
        return expected.differences(left)
    return f"{words[0]} leaves something else"


def _left(directory: Path, words: tuple[str, ...], outcome: Outcome) -> object:
    """What the words leave, for a comparison bit for bit."""
    if words == GENERATE:
        return outcome.out
    if words == IMPORT:
        return run_bits(directory / "imported")
    name = {TRAIN: "run", OFFLINE: "offline", STARTED: "started"}.get(words)
    if name is not None:
        return run_bits(directory / name)
    if words == CAPTURE:
        return _records(directory / "states")
    return directory_bits(directory / ("exported" if words == EXPORT else "answers.jsonl"))


def _records(states: Path) -> list[str]:
    """The manifest and sha256 of every captured row, as it is read: padding of shards is not."""
    records = ArrayRecordDataSource([str(path) for path in sorted(states.glob("*.arrayrecord"))])
    hashes = [hashlib.sha256(records[number]).hexdigest() for number in range(len(records))]
    return [(states / "manifest.json").read_text(), *hashes]
