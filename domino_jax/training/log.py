"""What a run has logged is read by programs that train nothing: no jax here.

metrics.jsonl    {"step": 10, "split": "train", "loss": ...}    what the seed determines
timing.jsonl     {"step": 10, "split": "train", ...}            times, speeds, memory

Each checkpoint holds the bytes and the sha256 of `metrics.jsonl` at its save (`LogMark`), so a
changed line is found in a run with a checkpoint. Nothing verifies `timing.jsonl`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError, require
from domino_jax.base.files import LINE_BYTES, checksum_of, file_sha256, read_json, read_lines
from domino_jax.base.parse import parse_json
from domino_jax.training.checkpoint_names import CHECKPOINTS, DRAFT, METADATA, RUN, saved_steps

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


@dataclass(frozen=True)
class LogMark:
    """Length of `metrics.jsonl` in bytes at a save, and the sha256 of those bytes in hex."""

    bytes: int
    sha256: str


def log_notice(directory: Path) -> str | None:
    """Compares `metrics.jsonl` with the newest checkpoint of its run.

    Args:
        directory: of the run.
    Returns:
        A line that begins with the file's name, for a log that was changed or continued after the
        save. None for an equal log, or where the log or a checkpoint is missing.
    Raises:
        InputError: the file cannot be read.
    """
    path = directory / METRICS
    # The checkpoint first: a run that is training appends to the log, then saves.
    saved = _newest_mark(directory)
    if saved is None or not path.exists():
        return None
    step, mark = saved
    found = file_sha256(path, first=mark.bytes)
    if found != mark.sha256:
        return (
            f"{METRICS}: its first {mark.bytes} bytes have sha256 {found[:12]}, expected "
            f"{mark.sha256[:12]} of checkpoint {step}: the file has changed; restore it"
        )
    if path.stat().st_size > mark.bytes:
        return f"{METRICS}: the lines that follow checkpoint {step} are not verified"
    return None


def _newest_mark(directory: Path) -> tuple[int, LogMark] | None:
    """The newest step whose records are undamaged, and the mark of the log in them."""
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
    for number, line in read_lines(path):
        source = f"{path}:{number}"
        require(len(line) <= LINE_BYTES, f"{source}: more than {LINE_BYTES} bytes")
        if line.endswith(b"\n"):
            record = parse_json(line, source=source, nonfinite=True)
            # Its type and not `isinstance`, to which true is an integer.
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise InputError(f"{source}: expected a record with its step, found {line[:80]!r}")
            records.append(record)
    return records


def read_timing(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's `timing.jsonl` that can be read; nothing depends on them."""
    path = directory / TIMING
    if not path.is_file():
        return
    for _, line in read_lines(path):
        with contextlib.suppress(InputError):
            record = parse_json(line, source=str(path), nonfinite=True)
            sound = isinstance(record, dict) and type(record.get("step", 0)) is int
            if sound and line.endswith(b"\n"):
                yield record
