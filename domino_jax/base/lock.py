"""Locks: a run, a capture, a file of answers or an export has one writing process at a time.

Two processes that write one run directory remove each other's checkpoints, and two that write one
file of answers mix their lines. So a verb locks its output before it imports jax:

    run/.lock              inside a directory that is filled in place: a run, a capture
    .answers.jsonl.lock    next to a file, or to a directory that is renamed into place

    {"host": "n7", "pid": 4711, "started": "2026-12-02T10:11:12+00:00", "command": "domino train"}

The system lock (flock) ends with its process, also by `kill -9`: the next process on that host
removes the file and creates its own. On a shared file system flock may not reach other hosts. So
the record of another host always refuses, until a person removes the file. Where a file system has
no flock, the file alone is the lock. No jax here.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from domino_jax.base.errors import InputError, from_dict, one_line
from domino_jax.base.output_paths import check_local
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
class _LockFile:
    """An open lock file; the system lock ends when its descriptor is closed."""

    path: Path
    descriptor: int
    created: bool  # by this process

    def record(self) -> bytes:
        return os.pread(self.descriptor, _RECORD_BYTES, 0)

    def is_current(self) -> bool:
        """Whether the path still leads to the open file."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False


class _Busy(NamedTuple):
    """The owner of a lock, in words, and the remedy if it is gone."""

    found: str
    remedy: str


# Locks of this process, each with the directories that were made for it.
_acquired: dict[_LockFile, list[Path]] = {}
# One thread at a time removes lock files: an unlocked file may belong to another process already.
_removing = threading.Lock()


def lock_inside(directory: str | Path, *, command: str) -> AbstractContextManager[None]:
    """Locks a directory for the time of the body.

    A missing directory is made, and removed again if it is empty at the end.

    Args:
        directory: a run or a capture.
        command: of this process, for the record.
    Raises:
        InputError: another process has the lock.
        OSError: the lock file cannot be written; names `directory`.
    """
    return _locked(Path(directory) / LOCK, Path(directory), command)


def lock_beside(
    path: str | Path, *, command: str, waits: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """Locks a file, or a directory that is renamed into place, for the time of the body.

    Missing parents are made, and removed again if they are empty at the end.

    Args:
        path: of the output, which may be missing. Two names of its parent share the lock.
        command: of this process, for the record.
        waits: receives one line and makes this call wait for the owner instead of raising.
    Raises:
        InputError: `path` is an address, or another process has the lock.
        OSError: the lock file cannot be written; names `path`.
    """
    check_local(path, source=str(path))
    output = Path(path)
    # A last part that is a link is replaced, not followed; "." and ".." have no name of their own.
    named = output if output.name not in ("", "..") else Path(os.path.realpath(output))
    file = Path(os.path.realpath(named.parent)) / f".{named.name}{LOCK}"
    return _locked(file, output, command, waits)


def release_all() -> None:
    """Removes the lock files of this process, which is about to end."""
    with _removing:
        while _acquired:
            _remove(*_acquired.popitem())


@contextmanager
def _locked(
    file: Path, output: Path, command: str, waits: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Locks `output` by a lock file for the time of the body."""
    made: list[Path] = []
    waiting = False
    until = time.monotonic() + RECORD_SECONDS
    try:
        while not isinstance(lock := _attempt(file, made, command, until=until), _LockFile):
            if lock is not None:
                if waits is None:
                    raise InputError(
                        f"{output}: {lock.found}; wait until it ends, or stop it{lock.remedy}"
                    )
                if not waiting:
                    waits(one_line(f"{output}: {lock.found}; waiting until it ends{lock.remedy}"))
                waiting, until = True, time.monotonic() + RECORD_SECONDS
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        _remove_empty(made)
        if isinstance(error, PermissionError) and os.path.lexists(file):
            raise InputError(
                f"{output}: this user may not read or remove the lock file {file}; if its process "
                "is gone, let its owner remove it"
            ) from error
        if isinstance(error, OSError):  # of the lock file, which the user has not named
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
    try:
        yield
    finally:
        with _removing:
            if _acquired.pop(lock, None) is not None:
                _remove(lock, made)
        os.close(lock.descriptor)


def _attempt(
    file: Path, made: list[Path], command: str, *, until: float
) -> _LockFile | _Busy | None:
    """Takes a lock, or finds its owner.

    Args:
        file: the lock file.
        made: receives the directories that are made.
        command: for the record.
        until: time up to which another process may lack its record or remove the directory.
    Returns:
        The lock, its record written; its owner; None if the lock file is about to change.
    """
    early = time.monotonic() < until
    try:
        _make(file.parent, made)
        lock = _opened(file)
    except FileNotFoundError:  # an owner that ended has removed the directory
        if early:
            return None
        raise
    try:
        if early and not lock.created and not lock.record():
            return None
        free = _flock(lock.descriptor)
        if not lock.is_current():  # unlocked, but removed by its owner
            return None
        if lock.created and free is not False:
            _acquired[lock] = made
            _write(lock, command)
            return lock
        record = lock.record()
        owner = _owner(record)
        foreign = owner is not None and owner.host != os.uname().nodename
        if free and (not record or (owner is not None and not foreign)):
            # Of a process that was killed. Removed under its lock, as an owner removes its own.
            lock.path.unlink()
            return None
    finally:
        if lock not in _acquired:
            os.close(lock.descriptor)
    found = f"another process writes it, and {file} does not name it"
    if owner is not None:
        found = (
            f"another process writes it: `{owner.command}`, process {owner.pid} on {owner.host}, "
            f"since {owner.started}"
        )
    # A system lock that a process of this host has ends with it; any other file may be left over.
    running = free is False and not foreign
    return _Busy(found, "" if running else f"; if that process is gone, remove {file}")


def _opened(file: Path) -> _LockFile:
    """Opens a lock file, or creates it."""
    # A link could make this process overwrite any file of the user; a pipe could block it.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    create = flags | os.O_RDWR | os.O_CREAT | os.O_EXCL
    while True:
        with suppress(FileExistsError):
            return _LockFile(file, os.open(file, create, 0o666), True)
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
                return _LockFile(file, descriptor, False)
            os.close(descriptor)
        raise InputError(f"{file}: not a regular file, expected a lock file; remove it")


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


def _write(lock: _LockFile, command: str) -> None:
    """Writes the record of this process."""
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(os.uname().nodename, os.getpid(), started, command)
    text = json.dumps(dataclasses.asdict(owner)) + "\n"
    try:
        os.pwrite(lock.descriptor, text.encode(), 0)
        os.fsync(lock.descriptor)  # after a power failure an empty file would name no owner
    except OSError:
        with _removing:
            _remove(lock, _acquired.pop(lock, []))
        raise


def _owner(record: bytes) -> Owner | None:
    """The owner in a record; None where it is damaged."""
    try:
        return from_dict(Owner, parse_json(record, source=None), source="")
    except (InputError, AttributeError):  # of a list or a number
        return None


def _make(directory: Path, made: list[Path]) -> None:
    """Makes a directory and its parents; `made` receives those that were missing."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.append(path)


def _remove(lock: _LockFile, made: list[Path]) -> None:
    """Removes a lock file and the directories that were made for it, if they are empty."""
    with suppress(OSError):
        if lock.is_current():
            lock.path.unlink()
    _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    for directory in reversed(made):
        with suppress(OSError):
            directory.rmdir()
