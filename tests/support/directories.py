"""What lies in a directory, at any depth."""

from pathlib import Path


def leftovers(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
