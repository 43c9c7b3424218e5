"""Paths of outputs: directories of this machine that can be made and written. No jax here."""

import os
from pathlib import Path

from domino_jax.base.errors import InputError, require


def check_output_directory(key: str, directory: str | Path) -> None:
    """Raises `InputError` for a directory that cannot be made or written; `key` names it."""
    check_local(directory, source=f"{key}: {directory}")
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise InputError(f"{key}: {directory}: {existing} is not a directory; give another {key}")
    # To write a directory is not enough: a file in it is reached only if it may be entered.
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{key}: {directory}: {existing} may not be written by this user; give another {key}"
        )


def check_local(path: str | Path, *, source: str) -> None:
    """Raises `InputError` for an address; `source` begins the message."""
    # As a path, gs://bucket/run would be a directory `gs:` of this machine.
    address = "".join(Path(path).parts[:1]).endswith(":")
    require(not address, f"{source}: an address; expected a directory of this machine")


def nearest_existing(path: str | Path) -> Path:
    """The path, or the first directory above it that exists."""
    absolute = Path(path).absolute()
    return next(found for found in (absolute, *absolute.parents) if found.exists())
