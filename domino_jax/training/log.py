"""What a run has logged is read by programs that train nothing: no jax here.

metrics.jsonl    {"step": 10, "split": "train", "loss": ...}    what the seed determines
timing.jsonl     {"step": 10, "split": "train", ...}            times, speeds, memory
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.base.files import read_text
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
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(InputError):
            record = parse_json(line, source=str(path), nonfinite=True)
            if isinstance(record, dict) and line.endswith("\n"):
                yield record
