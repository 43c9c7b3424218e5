"""Files: written whole or not at all, read within bounds, and known by their hashes.

A process may end at any moment, and a file that somebody else wrote may be anything. So what a run
relies on is written beside its place and renamed, and what it reads is a regular file of a bounded
size, parsed within bounded depth. No other module opens a small file by itself. No jax here.

    run/config.yaml.new  -- written, flushed to disk --  renamed to  run/config.yaml
"""

import hashlib
import json
import os
import stat
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from domino_jax.strict import InputError

CHECKSUMS = "SHA256SUMS"
TEXT_BYTES = 2**26  # of a file that is parsed as a whole: settings, manifests, tokenizers' side files


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text beside its place, flushes it to disk and renames it; the mode follows the umask.

    Raises:
        OSError: it could not be written; what stood there is as it was, and nothing is left beside it.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_text(path: Path, *, limit: int = TEXT_BYTES) -> str:
    """The text of a small regular file.

    Raises:
        InputError: not there, not a regular file, larger than `limit` bytes, or not UTF-8.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: not a regular file")
            if status.st_size > limit:
                raise InputError(f"{path}: {status.st_size} bytes, expected at most {limit}")
            return file.read().decode("utf-8")
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: as `read_text`, or it is not one; the message names the file.
    """
    tree = parse_json(read_text(path), place=str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def parse_json(text: str | bytes, *, place: str) -> Any:
    """Parses JSON of somebody else.

    Raises:
        InputError: not valid JSON, or nested beyond what a parser can hold.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def write_checksums(directory: Path) -> None:
    """Writes SHA256SUMS over every file below a directory; `sha256sum --check SHA256SUMS` reads it.

    Raises:
        InputError: a file cannot be read.
        OSError: SHA256SUMS cannot be written.
    """
    names = _files_below(directory)
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        hashes = threads.map(lambda name: file_sha256(directory / name), names)
        lines = [f"{digest}  {name}\n" for name, digest in zip(names, hashes, strict=True)]
    write_whole(directory / CHECKSUMS, "".join(lines))


def damage(directory: Path, *, unlisted: Container[str] = ()) -> str | None:
    """What is wrong with the files below a directory that `write_checksums` was called on.

    Args:
        directory: which should hold SHA256SUMS.
        unlisted: names of files that came later, relative to the directory.
    Returns:
        A few words that name the first file in question, or None where every file is as it was.
    """
    listed = {}
    try:
        for line in read_text(directory / CHECKSUMS).splitlines():
            digest, _, name = line.partition("  ")
            listed[name] = digest
    except InputError as error:
        return str(error)
    found = {name for name in _files_below(directory) if name not in unlisted}
    for name in sorted(listed.keys() ^ found):
        return f"{name} is {'missing' if name in listed else f'not listed in {CHECKSUMS}'}"

    def sound(name: str) -> bool:
        try:
            return file_sha256(directory / name) == listed[name]
        except InputError:
            return False

    names = sorted(listed)
    with ThreadPoolExecutor() as threads:
        for name, whole in zip(names, threads.map(sound, names), strict=True):
            if not whole:
                return f"{name} does not match its checksum"
    return None


def _files_below(directory: Path) -> list[str]:
    """Names of all files but SHA256SUMS itself, relative to a directory, sorted."""
    paths = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != CHECKSUMS)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
