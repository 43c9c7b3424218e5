"""What a run has logged is read by programs that train nothing: no jax here.

metrics.jsonl    {"step": 10, "split": "train", "loss": ...}    what the seed determines
timing.jsonl     {"step": 10, "split": "train", ...}            times, speeds, memory
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError, require
from domino_jax.base.files import LINE_BYTES, read_lines
from domino_jax.base.parse import parse_json

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
LOG_BYTES = 2**32  # a log grows as long as its run; other files that are read whole do not


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
            if isinstance(record, dict) and line.endswith(b"\n"):
                yield record
