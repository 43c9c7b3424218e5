"""Where the harness works: a tiny target, rows, runs, and what is compared of them, bit for bit.

Everything lies in one directory and is named relatively in it, so that a copy of the directory is
the same place with the same words on the command line:

    target/  rows.jsonl  heldout.jsonl  prompts.jsonl  config.yaml      made once
    run/  states/  draft/  answers.jsonl                                by the verbs
"""

import hashlib
import itertools
import json
import logging
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from array_record.python.array_record_data_source import ArrayRecordDataSource
from faults_process import Outcome, Processes
from tiny import run_config, write_conversations, write_target

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax misses files that items never have
_WORKERS = ThreadPoolExecutor(2)  # for all parts: each thread has its own server of processes
STATE_ITEMS = ("params", "optimizer", "ema")
ANSWERS = ("regenerate", "prompts.jsonl", "answers.jsonl", "--target", "target")
# The window of metrics lies across saves, and both across evaluations.
SETTINGS: dict[str, Any] = {
    "optimizer": {"ema_decay": 0.9},
    "train": {
        "steps": 24,
        "log_every": 5,
        "eval_every": 7,
        "checkpoint_every": 4,
        "keep_checkpoints": 3,
    },
}


@dataclass(frozen=True)
class Case:
    """One fault and what came of it: `fault` says what did not hold, None where all did."""

    part: str
    name: str
    fault: str | None
    outcome: str = ""


Work = tuple[str, Callable[[], list[Case]]]  # a name for it, and what gives its cases


@dataclass(frozen=True)
class Bits:
    """A run's newest state and log; `arrays` has dtype, shape and hash of the state's leaves."""

    step: int
    arrays: dict[str, str] = field(repr=False)
    metrics: bytes = field(repr=False)

    def differences(self, other: "Bits") -> str | None:
        """What differs from an undisturbed run, None where nothing does."""
        found = []
        if self.step != other.step:
            found.append(f"step {other.step} instead of {self.step}")
        names = self.arrays.keys() | other.arrays.keys()
        arrays = sorted(name for name in names if self.arrays.get(name) != other.arrays.get(name))
        if arrays:
            found.append(f"{len(arrays)} of {len(names)} arrays of the state, {arrays[0]} first")
        if self.metrics != other.metrics:
            ours, theirs = self.metrics.splitlines(), other.metrics.splitlines()
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            first = same.index(False) if False in same else len(same)
            found.append(
                f"metrics.jsonl from line {first + 1} on "
                f"({len(theirs)} lines, expected {len(ours)})"
            )
        return "; ".join(found) or None


def run_bits(run: Path) -> Bits:
    """Reads the newest checkpoint of a run and its log, without the package that wrote them."""
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    step = max(steps)
    arrays = {}
    for item in STATE_ITEMS:
        directory = (run / "checkpoints" / str(step) / item).resolve()
        if directory.is_dir():
            for path, leaf in jax.tree_util.tree_leaves_with_path(_tree(directory)):
                array = np.asarray(leaf)
                digest = hashlib.sha256(array.tobytes()).hexdigest()
                arrays[item + jax.tree_util.keystr(path)] = f"{array.dtype} {array.shape} {digest}"
    log = run / "metrics.jsonl"  # an imported draft has none
    return Bits(step, arrays, log.read_bytes() if log.exists() else b"")


def restored(directory: Path) -> list[np.ndarray]:
    """The arrays of one item of a checkpoint."""
    return jax.tree.leaves(_tree(directory))


def _tree(directory: Path) -> Any:
    with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layout over devices is not asked for
        metadata = reader.metadata(directory).item_metadata
        if metadata is None:
            raise ValueError(f"{directory.name} of the last checkpoint has no metadata")
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return reader.restore(directory, restore_args=arguments)


def directory_bits(directory: Path) -> dict[str, str]:
    """sha256 of every file of a directory, or of one file, by relative path."""
    files = [path for path in (directory, *directory.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def left(directory: Path, name: str, outcome: Outcome) -> object:
    """What a command leaves at `name`, for a comparison bit for bit; "" for what it prints."""
    path = directory / name
    if not name:
        return outcome.out
    if (path / "checkpoints").is_dir():
        return run_bits(path)
    if (path / "manifest.json").is_file():
        # Every captured row as it is read: padding of shards is not.
        shards = sorted(map(str, path.glob("*.arrayrecord")))
        records = ArrayRecordDataSource(shards)
        hashes = [hashlib.sha256(records[number]).hexdigest() for number in range(len(records))]
        return [(path / "manifest.json").read_text(), *hashes]
    return directory_bits(path)


def difference(expected: object, found: object) -> str | None:
    """What differs between two results of `left`, None where nothing does."""
    if found == expected:
        return None
    if isinstance(expected, Bits) and isinstance(found, Bits):
        return expected.differences(found)
    return "other files or words"


class Place:
    """A directory with a tiny target, and the processes that work on copies of it.

    Attributes:
        directory: of everything; the caller removes it.
        base: what is copied for a case.
        filling: processes for undisturbed work.
    """

    def __init__(self, directory: Path, *, seed: int) -> None:
        self.directory, self.seed = directory, seed
        self.base = directory / "base"
        self._cache = directory / "programs"
        self._local = threading.local()
        # They also fill the cache of compiled programs; one at a time, never killed.
        self.filling = Processes(cache=self._cache, fill_cache=True)
        self._all = [self.filling]
        self._count, self._lock = 0, threading.Lock()
        (self.base / "target").mkdir(parents=True)
        write_target(self.base / "target")
        paths = {"train": "rows.jsonl", "eval": "heldout.jsonl"}
        run_config(self.base, Path("target"), run_dir="run", data=paths, **SETTINGS)
        write_conversations(self.base / "prompts.jsonl", 12, seed=5, answers=False)

    def processes(self) -> Processes:
        """Those of this thread."""
        if not hasattr(self._local, "processes"):
            self._local.processes = Processes(cache=self._cache)
            self._all.append(self._local.processes)
        return self._local.processes

    def copy(self, source: Path | None = None) -> Path:
        """A copy of the base, or of another place, for one case."""
        with self._lock:
            self._count += 1
            directory = self.directory / f"case-{self._count}"
        shutil.copytree(source or self.base, directory)
        return directory

    def random(self, *numbers: int) -> np.random.Generator:
        """The choices of one case; the same seed makes the same ones."""
        return np.random.default_rng([self.seed, *numbers])

    def close(self) -> None:
        for processes in self._all:
            processes.close()


def override(**fields: Any) -> str:
    """One KEY=VALUE word: `override(train__steps=8)`."""
    ((name, value),) = fields.items()
    return f"{name.replace('__', '.')}={json.dumps(value)}"


def cleared(directory: Path, fault: str | None) -> str | None:
    """Removes the directory of a case that held; the fault of another one names it."""
    if fault is not None:
        return f"{fault} ({directory.name})"
    shutil.rmtree(directory)
    return None


def in_turn(names: Iterable[str], count: int, case: Callable[[int, str], Case]) -> Iterator[Work]:
    """Works of one case each, `count` of them, for one name after another."""
    for index, name in enumerate(itertools.islice(itertools.cycle(names), count)):
        yield name, lambda index=index, name=name: [case(index, name)]


def all_cases(part: str, works: Iterable[Work], total: int) -> Iterator[Case]:
    """Runs works on both workers and passes on their cases as they end.

    A work that raises is the harness's own failure and counts as a case that did not hold.
    """
    began, done = time.monotonic(), 0
    names = {_WORKERS.submit(work): name for name, work in works}
    try:
        for future in as_completed(names):
            try:
                cases = future.result()
            except Exception as error:
                failed = f"the harness failed: {type(error).__name__}: {error}"
                cases = [Case(part, names[future], failed)]
            for case in cases:
                done += 1
                held = f"held {case.outcome}".rstrip()
                if case.fault is not None:
                    held = f"DID NOT HOLD: {case.fault}"
                place = f"{part} {done}/{total} ({time.monotonic() - began:.0f} s)"
                print(f"{place}  {case.name}: {held}", file=sys.stderr, flush=True)
                yield case
    finally:
        for future in names:  # what Ctrl-C found waiting
            future.cancel()
