"""What a run has logged is read by programs that train nothing: no jax here.

metrics.jsonl    {"step": 10, "split": "train", "loss": ...}    what the seed determines
timing.jsonl     {"step": 10, "split": "train", ...}            times, speeds, memory

Each checkpoint holds the bytes and the sha256 of `metrics.jsonl` at its save (`LogMark`), so a
changed line is found where a checkpoint is there. Nothing verifies `timing.jsonl`.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.base.files import checksum_of, file_sha256, open_regular, read_json, read_text
from domino_jax.base.parse import parse_json
from domino_jax.training.names import CHECKPOINTS, DRAFT, METADATA, RUN, saved_steps

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
LOG_BYTES = 2**32  # a log grows as long as its run; other files that are read whole do not


@dataclass(frozen=True)
class LogMark:
    """Where a log stands: the bytes of `metrics.jsonl` and their sha256, in hex."""

    bytes: int
    sha256: str


def log_notice(directory: Path) -> str | None:
    """What the newest checkpoint of a run cannot confirm of `metrics.jsonl`.

    Args:
        directory: the run's.
    Returns:
        A line that begins with the file's name; None where the whole file is as it was at the
        newest save, or where either is missing.
    Raises:
        InputError: the file cannot be read.
    """
    path = directory / METRICS
    # The checkpoint first: a run that is training appends to the log, then saves.
    saved = _newest_mark(directory)
    if saved is None or not path.exists():
        return None
    step, mark = saved
    with open_regular(path) as file:
        found = hashlib.sha256(file.read(mark.bytes)).hexdigest()
        longer = bool(file.read(1))
    if found != mark.sha256:
        return (
            f"{METRICS}: its first {mark.bytes} bytes have sha256 {found[:12]}, expected "
            f"{mark.sha256[:12]} of checkpoint {step}: the file has changed; put it back"
        )
    if longer:
        return f"{METRICS}: the lines that follow checkpoint {step} are not verified"
    return None


def _newest_mark(directory: Path) -> tuple[int, LogMark] | None:
    """The newest step whose records are undamaged, and where the log stood when it was saved."""
    names = [f"{item}/{METADATA}" for item in (DRAFT, RUN)]
    for step in saved_steps(directory / CHECKPOINTS):
        checkpoint = directory / CHECKPOINTS / str(step)
        # An imported draft has no record; a checkpoint may be removed while it is read.
        with contextlib.suppress(InputError, KeyError, TypeError):
            if any(file_sha256(checkpoint / x) != checksum_of(checkpoint, x) for x in names):
                continue
            draft, run = (read_json(checkpoint / name) for name in names)
            # Of an earlier version the record has no step; a directory may have been renamed.
            if draft.get("step", step) == step:
                return step, LogMark(**run["log"])
    return None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, none if there is no such file.

    A line cut off by a crash is left out.

    Raises:
        InputError: the file cannot be read, or a line of it is no record.
    """
    path = directory / METRICS
    if not path.exists():
        return []
    records = []
    lines = read_text(path, limit=LOG_BYTES).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            record = parse_json(line, source=f"{path}:{number}", nonfinite=True)
            # Its type and not `isinstance`, to which true is an integer.
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise InputError(
                    f"{path}:{number}: expected a record with its step, found {line[:80]!r}"
                )
            records.append(record)
    return records


def read_timing(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's `timing.jsonl` that can be read; nothing depends on them."""
    path = directory / TIMING
    if not path.is_file():
        return
    with open_regular(path) as file:
        text = file.read().decode("utf-8", "replace")
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(InputError):
            record = parse_json(line, source=str(path), nonfinite=True)
            sound = isinstance(record, dict) and type(record.get("step", 0)) is int
            if sound and line.endswith("\n"):
                yield record
