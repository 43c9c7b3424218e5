"""Names in the checkpoints of a run directory. No jax here: `domino report` reads them without it.

run/checkpoints/40/draft/metadata  run/metadata  SHA256SUMS
"""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
DRAFT, RUN = "draft", "run"  # items of a checkpoint
METADATA = "metadata"  # file of an item that Orbax stores as JSON


def saved_steps(directory: Path) -> list[int]:
    """The steps below a directory of checkpoints, newest first.

    Unfinished ones have other names.
    """
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    numbers = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,18}", name)]
    return sorted(numbers, reverse=True)
