"""Damaged and misplaced files: neither may change a result without a message.

Each kind of file that a verb reads is broken in each way that disks and people break files. Part
`damage` breaks bytes and names; `places` also exchanges whole files and changes digits, which
leaves each file readable; `logs` changes what a report shows:

    group        broken                                   read by
    checkpoint   any file or directory of a step          train (resumed), export, generate
    run          whatever else lies in the run            train (resumed)
    target       weights, tokenizer, template, config     train (resumed), generate
    rows         training and held-out conversations      train (resumed)
    states       manifest and shards of a capture         train (from the start), capture
    draft        an exported checkpoint                   import, train with draft.init_from
    partial      an unfinished file of answers            regenerate (resumed)
    steps        a step under another step's number       train (resumed), export, generate
    shards       shards exchanged, doubled, of another    train (from the start), capture
                 target's capture
    digits       digits of a manifest or of a record      train, capture, export
    cache        the target's answers in the user's cache evaluate --replay
    evaluation   evaluation.json                          report, evaluate --append
    log          metrics.jsonl, timing.jsonl, config.yaml report, train (resumed)

Each ends in one of these ways: restored from an earlier checkpoint or from its source with a
message, harmless (all bits at the end are those of an undisturbed process), or refused in one line.
A report may also carry on with a notice on the page and on stderr.
"""

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
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
from safetensors.numpy import load_file, save_file

SHARD_BYTES = 8000  # of the captures whose shards are exchanged
REAL_COMMANDS = 20  # of the cases, spread evenly: the others have imported jax before
STEPS = override(train__steps=16)
FEW = override(train__steps=4)
SAID = re.compile("damaged|aside|is gone|incomplete|cut off|not used|changed| again", re.IGNORECASE)

# A report shows a notice on the log; it does not verify the other two files.
NOTICED = re.compile("metrics.jsonl: ")
UNVERIFIED = ("timing.jsonl", "config.yaml")

TRAIN = ("train", "config.yaml", STEPS)
_STATES = ("data.train=null", "data.hidden_states=states")
OFFLINE = ("train", "config.yaml", FEW, "run_dir=offline", *_STATES)
STARTED = ("train", "config.yaml", FEW, "run_dir=started", "draft.init_from=draft")
EXPORT = ("export", "run", "exported", "--dtype", "float32")
IMPORT = ("import", "draft", "imported", "--target", "target")
GENERATE = ("generate", "run", "a b c", "--max-new-tokens", "24")
CAPTURE = ("capture", "config.yaml", "states")
REGENERATE = (*ANSWERS, *("--batch-size", "2", "--max-new-tokens", "24", "--temperature", "0.7"))
SHARDED = ("train", "config.yaml", FEW, "run_dir=sharded", "data.train=null",
           "data.hidden_states=shards")  # fmt: skip
RECAPTURE = ("capture", "config.yaml", "shards")
_MEASURED = ("--limit", "3", "--max-new-tokens", "8", "--timed", "0", "--replay")
EVALUATE = ("evaluate", "run", "prompts.jsonl", *_MEASURED)
APPEND = ("evaluate", "run", "heldout.jsonl", *_MEASURED, "--append")
REPORT = ("report", "run")

# Where they leave something, for a comparison bit for bit; elsewhere what they print.
LEAVE = {
    TRAIN: "run",
    OFFLINE: "offline",
    STARTED: "started",
    EXPORT: "exported",
    IMPORT: "imported",
    CAPTURE: "states",
    REGENERATE: "answers.jsonl",
    SHARDED: "sharded",
    RECAPTURE: "shards",
    EVALUATE: "run/evaluation.json",
    APPEND: "run/evaluation.json",
    REPORT: "run/report.html",
}
Readers = dict[str, tuple[tuple[tuple[str, ...], ...], int]]
# The words that read each group, and how often a group is drawn.
DAMAGE: Readers = {
    "checkpoint": ((TRAIN, TRAIN, TRAIN, EXPORT, GENERATE), 48),
    "run": ((TRAIN,), 14),
    "target": ((TRAIN, GENERATE), 12),
    "rows": ((TRAIN,), 8),
    "states": ((OFFLINE, OFFLINE, CAPTURE), 8),
    "draft": ((IMPORT, STARTED), 6),
    "partial": ((REGENERATE,), 4),
}
PLACES: Readers = {
    "steps": ((TRAIN, TRAIN, EXPORT, GENERATE), 4),
    "shards": ((SHARDED, SHARDED, RECAPTURE), 4),
    "digits": ((SHARDED, RECAPTURE, TRAIN, EXPORT), 4),
    "cache": ((EVALUATE,), 4),
}
LOGS: Readers = {"evaluation": ((REPORT, REPORT, APPEND), 6), "log": ((REPORT, TRAIN), 4)}


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
    yield from _broken("damage", DAMAGE, place, count)


def misplaced(place: Place, count: int) -> Iterator[Case]:
    """Exchanges whole files and changes digits; every file still can be read."""
    yield from _broken("places", PLACES, place, count)


def logs(place: Place, count: int) -> Iterator[Case]:
    """Changes logs and evaluations, which a report shows."""
    yield from _broken("logs", LOGS, place, count)


def _broken(part: str, groups: Readers, place: Place, count: int) -> Iterator[Case]:
    undisturbed = _undisturbed(place, groups)
    names = [name for name, (_, share) in groups.items() for _ in range(share)]
    order = [names[number] for number in place.random(3).permutation(len(names))]

    def case(index: int, group: str) -> Case:
        command = index % max(count // REAL_COMMANDS, 1) == 0
        words = groups[group][0]
        return _case(
            part, place, undisturbed, index=index, group=group, readers=words, command=command
        )

    yield from all_cases(part, in_turn(order, count, case), count)


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
    assert filling.run(base, *EVALUATE).code == DONE
    _captured(place, base, "shards", "target")
    weights = shutil.copytree(base / "target", base / "other_target") / "model.safetensors"
    save_file({name: 1.5 * array for name, array in load_file(weights).items()}, weights)
    _captured(place, base, "other_shards", "other_target")
    return base


def _captured(place: Place, directory: Path, name: str, target: str) -> None:
    """A capture in shards of a few rows each; the command writes shards of 250 MB."""
    program = (
        "from domino_jax.datagen import capture\n"
        f"capture.capture.__kwdefaults__['shard_bytes'] = {SHARD_BYTES}\n"
        "from domino_jax.cli import main\n"
        "main()\n"
    )
    words = ("capture", "config.yaml", name, f"target={target}")
    subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=directory,
        env=place.filling.environment,
        check=True,
        capture_output=True,
    )
    count = len(list((directory / name).glob("*.arrayrecord")))
    assert count > 3, f"{count} shards, expected several of equal lengths"


def _stopped(process: Running, line: str) -> None:
    """Interrupts a process once it has written a line."""
    while process.poll() is None and line not in process.log.read_text():
        time.sleep(0.002)
    process.send(signal.SIGTERM)
    process.wait()


def _undisturbed(place: Place, groups: Readers) -> Undisturbed:
    filling, base = place.filling, stopped_place(place)
    steps = sorted(
        int(path.name) for path in (base / "run" / "checkpoints").iterdir() if path.name.isdigit()
    )
    undisturbed, earlier = {}, {}
    asked = {words for readers, _ in groups.values() for words in readers}
    for words in asked:
        directory = place.copy(base)
        outcome = filling.run(directory, *words)
        assert outcome.code == DONE, f"{words}: {outcome.log}"
        undisturbed[words] = left(directory, LEAVE.get(words, ""), outcome)
        earlier[words] = []
    for words in asked & {EXPORT, GENERATE}:
        directory = place.copy(base)
        for step in reversed(steps[1:]):
            shutil.rmtree(directory / "run" / "checkpoints" / str(step))
            shutil.rmtree(directory / "exported", ignore_errors=True)
            outcome = filling.run(directory, *words)
            assert outcome.code == DONE, f"{words}: {outcome.log}"
            earlier[words].append(left(directory, LEAVE.get(words, ""), outcome))
    return Undisturbed(base, steps[-1], undisturbed, earlier)


def _case(
    part: str,
    place: Place,
    undisturbed: Undisturbed,
    *,
    index: int,
    group: str,
    readers: tuple[tuple[str, ...], ...],
    command: bool,
) -> Case:
    rng, directory = place.random(4, index), place.copy(undisturbed.place)
    words = readers[int(rng.integers(len(readers)))]
    broken, how = _break(directory, group, words, rng)
    outcome = place.processes().run(directory, *words, command=command)
    differences = None
    if outcome.code == DONE:
        try:
            differences = _differences(undisturbed, words, directory, outcome, broken)
        except Exception as error:  # orbax has no exception of its own for a damaged checkpoint
            read = f"{type(error).__name__}: {str(error)[:100]}"
            differences = f"what it leaves cannot be read: {read}"
    said = bool(SAID.search(outcome.log))
    kind, fault = damage(outcome, differences=differences, said=said)
    if fault is None and kind == "harmless" and words == TRAIN and group in ("checkpoint", "run"):
        fault = _silence(undisturbed, outcome, directory, broken)
    name = f"{index}: {broken.relative_to(directory)} {how}, read by {words[0]}"
    return Case(part, name, cleared(directory, fault), kind)


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


def _break(
    directory: Path, group: str, words: tuple[str, ...], rng: np.random.Generator
) -> tuple[Path, str]:
    """Breaks a file of a group; returns its path and the way in words."""
    if group == "steps":
        return _misplaced_step(directory, rng)
    if group == "shards":
        return _misplaced_shard(directory, rng)
    if group == "digits":
        files = [directory / "shards" / "manifest.json"]
        if words not in (SHARDED, RECAPTURE):
            newest = max(_steps(directory), key=lambda path: int(path.name))
            files = [newest / item / "metadata" for item in ("draft", "run")]
            files.append(directory / "run" / "newest_checkpoint.json")
        return _other_digit(files[int(rng.integers(len(files)))], rng)
    if group == "cache":
        (answers,) = (directory / "cache").rglob("answers/*.json")
        return _other_digit(answers, rng) if rng.random() < 0.7 else break_something([answers], rng)
    if group == "evaluation":
        return _other_digit(directory / "run" / "evaluation.json", rng)
    if group == "log":
        files = [directory / "run" / name for name in ("metrics.jsonl", *UNVERIFIED)]
        return _other_digit(files[int(rng.integers(len(files)))], rng)
    return break_something(_candidates(directory, group, rng), rng)


def _steps(directory: Path) -> list[Path]:
    return [path for path in (directory / "run" / "checkpoints").iterdir() if path.name.isdigit()]


def _misplaced_step(directory: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """Puts an earlier step in the place of the newest, or under a later number."""
    *earlier, newest = sorted(_steps(directory), key=lambda path: int(path.name))
    step = earlier[int(rng.integers(len(earlier)))]
    way = int(rng.integers(3))
    if way == 0:
        return _exchange(newest, step)
    if way == 1:
        shutil.rmtree(newest)
    name = newest.name if way == 1 else str(rng.integers(20, 99))
    shutil.copytree(step, newest.with_name(name))
    return newest.with_name(name), f"is a copy of {step.name}"


def _misplaced_shard(directory: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """Exchanges two shards, doubles one, or takes one of another target's capture."""
    shards = sorted((directory / "shards").glob("*.arrayrecord"))
    first, second = (shards[number] for number in rng.permutation(len(shards))[:2])
    way = int(rng.integers(3))
    if way == 0:
        return _exchange(first, second)
    source = second if way == 1 else directory / "other_shards" / first.name
    shutil.copyfile(source, first)
    return first, f"is a copy of {source.relative_to(directory)}"


def _exchange(first: Path, second: Path) -> tuple[Path, str]:
    third = first.with_name("exchanged")
    first.rename(third)
    second.rename(first)
    third.rename(second)
    return first, f"exchanged with {second.name}"


def _other_digit(path: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """Changes one digit of a text file into another."""
    content = bytearray(path.read_bytes())
    digits = [index for index, byte in enumerate(content) if chr(byte).isdigit()]
    at = digits[int(rng.integers(len(digits)))]
    was = int(chr(content[at]))
    content[at] = ord(str((was + int(rng.integers(1, 10))) % 10))
    path.write_bytes(content)
    before = content[max(at - 24, 0) : at].decode(errors="replace")
    return path, f"with {chr(content[at])} for {was} after {before!r}"


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
    undisturbed: Undisturbed,
    words: tuple[str, ...],
    directory: Path,
    outcome: Outcome,
    broken: Path,
) -> str | None:
    if words == REPORT and (NOTICED.search(outcome.log) or broken.name in UNVERIFIED):
        return None
    found = left(directory, LEAVE.get(words, ""), outcome)
    expected = undisturbed.left[words]
    if SAID.search(outcome.log) and found in undisturbed.earlier[words]:
        return None
    if isinstance(found, Bits) and "metrics.jsonl is gone" in outcome.log:
        found = dataclasses.replace(found, metrics=expected.metrics)  # a lost log is no lost state
    return difference(expected, found)
