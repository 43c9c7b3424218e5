"""Results of the benchmarks as lines of JSON, with date, revision, machine and versions.

A figure without them cannot be compared a month later. Nothing here imports jax: the process that
lets two sides take turns must not hold a part of their device.
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
    """Prints one result as a line of JSON and appends it to a file.

    Args:
        path: the file, made where it is missing; None for none.
        figures: by name.
        device: holds `platform` and `device` kind as jax calls them, of what was measured.
    """
    hardware = {name: device[name] for name in ("platform", "device")}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **tree_state(revision()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "hardware": {**hardware, "cores": os.cpu_count(), "processor": processor()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "figures": figures,
    }
    line = json.dumps(result)
    print(line, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


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
