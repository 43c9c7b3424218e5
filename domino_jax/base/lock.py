"""Locks: a run, a capture, a file of answers or an export has one writing process at a time.

Two processes that write one run directory remove each other's checkpoints, and two that write one
file of answers mix their lines. So a verb locks its output before it imports jax:

    run/.lock              inside a directory that is filled in place: a run, a capture
    .answers.jsonl.lock    beside a file, and beside a directory that is renamed into place

    {"host": "n7", "pid": 4711, "started": "2026-12-02T10:11:12+00:00", "command": "domino train"}

The system lock (flock) ends with its process, also by `kill -9`: the next process on that host
takes the file over. On a shared file system flock may not reach other hosts. So the record of
another host always refuses, until a person removes the file. No jax here.
"""

import dataclasses
import datetime
import errno
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from domino_jax.base.errors import InputError, from_dict, one_line, require
from domino_jax.base.parse import parse_json

LOCK = ".lock"  # name of the lock file inside a directory
RECORD_SECONDS = 1.0  # from the creation of a lock file to its record, at most
POLL_SECONDS = 0.05
_RECORD_BYTES = 4096
# EBADF: of a file that another user may not write, on NFS.
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)


@dataclass(frozen=True)
class Owner:
    """The record in a lock file."""

    host: str
    pid: int
    started: str
    command: str


@dataclass(frozen=True)
class _Busy:
    """A lock of another process: what was found, and what else to do than wait."""

    found: str
    remedy: str


@dataclass(frozen=True)
class _Held:
    """A lock of this process.

    Attributes:
        file: the lock file.
        descriptor: of the file; the system lock ends when it is closed.
        made: directories that were made for the file, outermost first.
    """

    file: Path
    descriptor: int
    made: list[Path]


# Lock files of this process, which `release_all` removes.
_held: dict[Path, _Held] = {}
# One thread at a time removes lock files: an unlocked file may belong to another process already.
_removing = threading.Lock()


@contextmanager
def lock_inside(directory: str | Path, *, key: str, command: str) -> Iterator[None]:
    """Locks a directory for the time of the body; a missing one is made.

    A directory that was made for the lock is removed again if it is empty at the end.

    Args:
        directory: a run or a capture.
        key: the name of `directory` in a configuration or a command, for messages.
        command: what this process does, for the record.
    Raises:
        InputError: as `check_place`, or another process has the lock.
        OSError: the lock file cannot be written; names `directory`.
    """
    check_place(key, directory)
    place = Path(directory)
    with _locked(place / LOCK, place, command=command, parents=True):
        yield


@contextmanager
def lock_beside(
    path: Path, *, command: str, parents: bool = False, waits: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Locks a file, or a directory that is renamed into place, for the time of the body.

    Args:
        path: need not be there. Two names of its parent share the lock.
        command: what this process does, for the record.
        parents: make missing parents; those that are empty at the end are removed again.
        waits: receives one line and makes this call wait for the owner instead of raising.
    Raises:
        InputError: `path` is an address, or another process has the lock.
        OSError: the lock file cannot be written; names `path`.
    """
    _check_local(path, source=str(path))
    # A last part that is a link is replaced, not followed; "." and ".." have no name of their own.
    named = path.name not in ("", "..")
    parent = os.path.realpath(path.parent if named else path / "..")
    name = path.name if named else Path(os.path.realpath(path)).name
    file = Path(parent) / f".{name}{LOCK}"
    with _locked(file, path, command=command, parents=parents, waits=waits):
        yield


def release_all() -> None:
    """Removes the lock files of this process, which is about to end."""
    with _removing:
        while _held:
            _remove(_held.popitem()[1])


def check_place(key: str, directory: str | Path) -> None:
    """Raises `InputError` for a directory that cannot be made or written; `key` names it."""
    _check_local(directory, source=f"{key}: {directory}")
    place = nearest_existing(directory)
    if not place.is_dir():
        raise InputError(f"{key}: {directory}: {place} is not a directory; give another {key}")
    # To write a directory is not enough: a file in it is reached only if it may be entered.
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"{key}: {directory}: {place} may not be written by this user; give another {key}"
        )


def _check_local(path: str | Path, *, source: str) -> None:
    # As a path, gs://bucket/run would be a directory `gs:` of this machine.
    address = "".join(Path(path).parts[:1]).endswith(":")
    require(not address, f"{source}: an address; expected a directory of this machine")


def nearest_existing(path: str | Path) -> Path:
    """The path, or the first directory above it that is there."""
    whole = Path(path).absolute()
    return next(there for there in (whole, *whole.parents) if there.exists())


@contextmanager
def _locked(
    file: Path,
    place: Path,
    *,
    command: str,
    parents: bool,
    waits: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Locks `place` by a lock file for the time of the body."""
    made: list[Path] = []
    said = False
    try:
        while isinstance(taken := _taken(file, made, command=command, parents=parents), _Busy):
            if waits is None:
                raise InputError(
                    f"{place}: {taken.found}; wait until it ends, or stop it{taken.remedy}"
                )
            if not said:
                waits(one_line(f"{place}: {taken.found}; waiting until it ends{taken.remedy}"))
            said = True
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        _remove_empty(made)
        if isinstance(error, PermissionError) and os.path.lexists(file):
            raise InputError(
                f"{place}: this user may not read or remove the lock file {file}; if its process "
                "is gone, let its owner remove it"
            ) from error
        if isinstance(error, OSError):  # of the lock file, which the user has not named
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise
    try:
        yield
    finally:
        with _removing:
            if _held.pop(file, None) is not None:
                _remove(taken)
        os.close(taken.descriptor)


def _taken(file: Path, made: list[Path], *, command: str, parents: bool) -> _Held | _Busy:
    """The lock, its record written, or its present owner.

    Args:
        file: the lock file.
        made: receives the directories that are made.
        command: for the record.
        parents: make missing directories.
    """
    until = time.monotonic() + RECORD_SECONDS
    while True:
        early = time.monotonic() < until
        try:
            if parents:
                _make(file.parent, made)
            descriptor, new = _opened(file)
        except FileNotFoundError:
            # An owner that ended may have removed the directory again.
            if parents and early:
                continue
            raise
        held = _Held(file, descriptor, made)
        try:
            busy = _examined(held, new=new, early=early)
            if busy is None:
                _held[file] = held
                _write(held, command)
                return held
        finally:
            if file not in _held or _held[file] is not held:
                os.close(descriptor)
        if busy is not _AGAIN:
            return busy
        time.sleep(POLL_SECONDS)


_AGAIN = _Busy("", "")  # the lock file is about to change


def _opened(file: Path) -> tuple[int, bool]:
    """A descriptor of a lock file, and whether this call created the file."""
    # A link could make this process overwrite any file of the user; a pipe could block it.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileExistsError):
            return os.open(file, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            try:
                descriptor = os.open(file, flags | os.O_RDWR)
            except PermissionError:  # of another user: its record can be read
                descriptor = os.open(file, flags)
        except FileNotFoundError:  # removed in between
            continue
        except OSError as error:
            if not (error.errno == errno.ELOOP or file.is_dir()):
                raise
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor, False
            os.close(descriptor)
        raise InputError(f"{file}: not a regular file, expected a lock file; remove it")


def _examined(held: _Held, *, new: bool, early: bool) -> _Busy | None:
    """Locks an opened lock file.

    Args:
        held: the file, opened.
        new: this process created it.
        early: the process that created it may still be about to write its record.
    Returns:
        None if the lock is free, `_AGAIN` if the file must be opened again, or its owner.
    """
    if not new and early and not _record(held):
        return _AGAIN
    free = _flock(held.descriptor)
    if not _is_there(held):  # unlocked, but removed by its owner
        return _AGAIN
    if new and free is not False:
        return None
    record = _record(held)
    owner = _owner(record)
    here = os.uname().nodename
    if free and (not record or (owner is not None and owner.host == here)):
        # Of a process that was killed. Removed under its lock, as an owner removes its own.
        held.file.unlink()
        return _AGAIN
    found = f"another process writes it, and {held.file} does not name it"
    if owner is not None:
        found = (
            f"another process writes it: `{owner.command}`, process {owner.pid} on {owner.host}, "
            f"since {owner.started}"
        )
    # Where the system lock is taken by this host, it ends with its process.
    certain = free is False and (owner is None or owner.host == here)
    return _Busy(found, "" if certain else f"; if that process is gone, remove {held.file}")


def _flock(descriptor: int) -> bool | None:
    """Whether the system lock was free, and now is taken; None on a file system without locks."""
    # Imported where it is used: the command answers signals before it imports anything slow.
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise


def _write(held: _Held, command: str) -> None:
    """Writes the record of this process."""
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(os.uname().nodename, os.getpid(), started, command)
    text = json.dumps(dataclasses.asdict(owner)) + "\n"
    try:
        os.pwrite(held.descriptor, text.encode(), 0)
        os.fsync(held.descriptor)  # after a power failure an empty file would name nobody
    except OSError:
        with _removing:
            _held.pop(held.file, None)
            _remove(held)
        raise


def _record(held: _Held) -> bytes:
    return os.pread(held.descriptor, _RECORD_BYTES, 0)


def _owner(record: bytes) -> Owner | None:
    """The owner in a record; None where it is damaged."""
    try:
        return from_dict(Owner, parse_json(record, source=None), source="")
    except (InputError, AttributeError):  # of a list or a number
        return None


def _is_there(held: _Held) -> bool:
    """Whether the name of a lock file still is that of the opened file."""
    try:
        return os.path.samestat(os.lstat(held.file), os.fstat(held.descriptor))
    except FileNotFoundError:
        return False


def _make(directory: Path, made: list[Path]) -> None:
    """Makes a directory and its parents; `made` receives those that were missing."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.append(path)


def _remove(held: _Held) -> None:
    """Removes a lock file and the directories that were made for it, if they are empty."""
    with suppress(OSError):
        if _is_there(held):
            held.file.unlink()
    _remove_empty(held.made)


def _remove_empty(made: list[Path]) -> None:
    for directory in reversed(made):
        with suppress(OSError):
            directory.rmdir()
