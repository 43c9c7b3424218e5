"""A figure without its machine, versions and revision says nothing a month later: they go together.

`--record FILE` of a benchmark appends one line of JSON for each result, so that old and new can be
compared by whatever reads JSON lines. Nothing here imports jax: the process that lets two sides
take turns must not hold a part of their device.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from domino_jax.evaluation.record import processor

PACKAGES = ("jax", "jaxlib", "numpy")
DIRTY, UNKNOWN = "-dirty", "unknown"


def add_record_option(parser: argparse.ArgumentParser) -> None:
    """The option `--record FILE`."""
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="append each result to FILE as a line of JSON, with date, revision and machine",
    )


def record(path: Path | None, figures: Mapping[str, Any], *, device: Mapping[str, str]) -> None:
    """Appends one result.

    Args:
        path: the file, made where it is missing; None records nothing.
        figures: what was printed, by name.
        device: `platform` and `device` kind as jax calls them, of what was measured.
    """
    if path is None:
        return
    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **tree_state(revision()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {**device, "cores": os.cpu_count(), "processor": processor()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def tree_state(described: str) -> dict[str, Any]:
    """`revision` and whether the checkout is `clean`, of what `revision()` says."""
    # A copy without its history cannot tell.
    clean = None if described == UNKNOWN else not described.endswith(DIRTY)
    return {"revision": described.removesuffix(DIRTY), "clean": clean}


def revision() -> str:
    """What git calls the checkout; "unknown" in a copy without its history."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
