"""Names inside a run directory, for programs with jax and without.

run/checkpoints/40/draft/metadata  run/metadata  SHA256SUMS
"""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
DRAFT, RUN = "draft", "run"  # items of a checkpoint
METADATA = "metadata"  # where Orbax puts JSON; as a file it is read within bounds


def saved_steps(directory: Path) -> list[int]:
    """The steps below a directory of checkpoints, newest first.

    Unfinished ones have other names.
    """
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    numbers = [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,18}", name)]
    return sorted(numbers, reverse=True)
