"""Directories that appear whole or not at all, and what a full disk says, whoever was writing.

A process may end at any moment, and a disk may be full at any byte. So a directory is written
beside its place and renamed, and what libraries raise when a write fails (safetensors an error of
its own, ArrayRecord a RuntimeError, tokenizers an Exception) becomes an OSError that names the
place which the user gave. No jax here: whoever answers a signal tidies up before jax is there.

    .draft.1f0c9a7e/config.json model.safetensors  --  renamed to  draft/
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from domino_jax.strict import InputError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # writing resumes once there is room
_WRITE_ERRORS = (*NO_ROOM, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)

_unfinished: set[Path] = set()


def check_new(path: Path) -> None:
    """Raises `InputError` unless a directory may be written there: nothing is, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already there and not an empty directory; give a new one")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Gives a new directory beside its place, and renames it to its place once the body has ended.

    Args:
        path: not there yet, or an empty directory.
    Raises:
        InputError: something else is there.
        OSError: something could not be written; it names `path`, and nothing is left beside it.
    """
    check_new(path)
    # Beside its place and not among temporary files: a rename works within one file system only.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    _unfinished.add(beside)
    try:
        with _errors_name(path, beside):
            beside.mkdir(parents=True)
            yield beside
            beside.replace(path)
    finally:
        # Removed, then forgotten: a signal in between still finds what there is to remove.
        shutil.rmtree(beside, ignore_errors=True)
        _unfinished.discard(beside)


def remove_unfinished() -> None:
    """Removes what bodies of `whole_directory` have written so far: the process is about to end."""
    for beside in list(_unfinished):
        shutil.rmtree(beside, ignore_errors=True)


def write_error(error: Exception, path: Path) -> OSError:
    """The OSError of a failed write that a library raised as something else.

    Args:
        error: what it raised; the system's own words stand somewhere in its message.
        path: what was being written.
    """
    # The libraries' own errors have no number: the system's words are all that is left of it.
    for number in _WRITE_ERRORS:
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number), str(path))
    words = " ".join(str(error).split())
    return OSError(errno.EIO, f"could not be written: {words[:200]}", str(path))


@contextmanager
def _errors_name(path: Path, beside: Path) -> Iterator[None]:
    """Lets a failed write below `beside` name the place that the user knows."""
    try:
        yield
    except OSError as error:
        # Of another file, such as one that the body reads: it names its place already.
        if error.filename is not None and not Path(error.filename).is_relative_to(beside):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
