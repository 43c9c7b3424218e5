"""Files and directories: written whole or not at all, read within bounds, known by their hashes.

A process may end at any moment, a disk may be full at any byte, and a file that somebody else wrote
may be anything. So what a run relies on is written under a temporary name and renamed, what it
reads is a regular file of a bounded size, and the error of a library whose write fails (safetensors
has its own, ArrayRecord a RuntimeError, tokenizers an Exception) becomes an OSError that names the
path that the user gave. No other module does any of it. No jax here: the answer to a signal removes
temporary files before jax is imported.

    run/.config.yaml.5be11e90  -- written, flushed to disk --  renamed to  run/config.yaml
    .draft.1f0c9a7e/config.json model.safetensors  --          renamed to  draft/

A temporary name is random and created exclusively, so a planted link or file has no effect. A JSON
file whose values matter carries its own hash (`write_json`, `read_own_json`).
"""

import errno
import gzip
import hashlib
import json
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from domino_jax.base.errors import InputError, require, shown
from domino_jax.base.parse import ENTRIES, parse_json

CHECKSUMS = "SHA256SUMS"
OWN_HASH = "sha256"  # last key of a JSON file that `write_json` wrote
MANY_ENTRIES = 2**22  # of such a file where it lists rows of a capture or tokens of answers
# Of a file that is parsed as a whole: settings, manifests, tokenizers' side files.
TEXT_BYTES = 2**24
# Of one line of a JSONL file. A reader holds it several times: as bytes, as text, as values.
LINE_BYTES = 2**22
# What git leaves in the place of a large file until git-lfs fetches it.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK_BYTES = 2**20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # writing resumes once there is room
_WRITE_ERRORS = (*NO_ROOM, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)

_unfinished: set[Path] = set()


def _no_links(name: str, flags: int) -> int:
    """Opener for `open` that refuses a symbolic link as the last part of the name."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)  # the umask applies


def open_appending(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Opens a file that grows over several starts.

    Raises:
        InputError: the name is a symbolic link, which could lead to any file.
        OSError: it cannot be opened.
    """
    try:
        return open(path, "ab", buffering=buffering, opener=_no_links)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path}: a symbolic link, expected a file; remove the link") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file of the same directory; flushes and renames it after the body.

    The mode follows the umask.

    Raises:
        OSError: it could not be written; `path` is as it was, and no temporary file is left.
    """
    with whole_path(path) as temporary, open(temporary, "wb", opener=_no_links) as file:
        yield file


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Creates a temporary file, as `whole_file`, for a library that opens it by its path.

    Raises:
        OSError: as `whole_file`.
    """
    with _renamed(path) as temporary:
        with open(temporary, "xb", opener=_no_links):
            pass
        yield temporary
        with open(temporary, "rb", opener=_no_links) as file:
            # Before the rename, which may reach the disk earlier than the bytes do.
            os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text as a `whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, tree: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Writes a JSON object with its own hash as a `whole_file`.

    The last key, `OWN_HASH`, holds the sha256 of the other keys and values. Their order and the
    white space are not part of it. `read_own_json` verifies it.

    Raises:
        OSError: the file cannot be written.
        ValueError: a number is not finite, or the object has a key `OWN_HASH`.
    """
    if OWN_HASH in tree:
        raise ValueError(f"{path}: the key {OWN_HASH!r} is reserved for the file's own hash")
    # Parsed again: a reader finds lists and text where the object had tuples and numbers as keys.
    plain = json.loads(json.dumps(tree, allow_nan=False))
    plain[OWN_HASH] = _tree_sha256(plain)
    write_whole(path, json.dumps(plain, indent=indent) + "\n")


def read_own_json(path: Path, *, remedy: str, entries: int = ENTRIES) -> dict[str, Any]:
    """Reads a file that `write_json` wrote and verifies its hash.

    Args:
        path: of the file.
        remedy: what to do about a changed file, for the message.
        entries: see `parse_json`.
    Returns:
        The object without its hash.
    Raises:
        InputError: as `read_json`; the hash is missing, or it is another than that of the values.
    """
    tree = read_json(path, entries=entries)
    if OWN_HASH not in tree:
        raise InputError(f"{path}: no key {OWN_HASH!r}, expected the hash of its values; {remedy}")
    expected = tree.pop(OWN_HASH)
    found = _tree_sha256(tree)
    if found != expected:
        raise InputError(
            f"{path}: changed after it was written: its values have sha256 {found[:12]}, "
            f"expected {shown(expected)}; {remedy}"
        )
    return tree


def _tree_sha256(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file for reading; a pipe or a device, which may never answer, is refused.

    Raises:
        InputError: not there, not a regular file, a git-lfs pointer, or not readable, also within
            the body.
    """
    try:
        # A pipe that nobody writes is opened without waiting for a writer.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            require(stat.S_ISREG(os.fstat(file.fileno()).st_mode), f"{path}: not a regular file")
            if file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
                raise InputError(
                    f"{path}: a git-lfs pointer, expected the file itself; run `git lfs pull` in "
                    "its repository"
                )
            yield file
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def checked_file(directory: Path, name: str) -> Path:
    """The path of a file of a model's directory, once it is known to be a regular file of it.

    A link may stay inside the directory, or inside the model's own part of Hugging Face's cache,
    where every file is a link (`models--ORG--NAME/snapshots/REVISION/config.json` to
    `../../blobs`). Any other would let a directory from somewhere show files of this machine as its
    own.

    Raises:
        InputError: not there, not a regular file, or a link that leads out of the model.
    """
    path = directory / name
    with open_regular(path):
        pass
    home = directory.resolve()
    caches = [place for place in home.parents if place.name.startswith("models--")]
    found = path.resolve()
    if not any(found.is_relative_to(root) for root in (home, *caches)):
        raise InputError(
            f"{path}: a link out of its directory, to {found}; expected a file inside: "
            "copy it there, or give the directory that it lies in"
        )
    return path


def read_text(path: Path, *, limit: int = TEXT_BYTES) -> str:
    """The text of a small regular file.

    Raises:
        InputError: not there, not a regular file, larger than `limit` bytes, a quarter of them
            where it is not ASCII, or not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        require(size <= limit, f"{path}: {size} bytes, expected at most {limit}")
        # Bounded here too: the file may have grown since its size was asked.
        content = file.read(limit + 1)
        # One wide character makes a text of four bytes a character.
        narrow = limit // 4
        require(
            len(content) <= narrow or content.isascii(),
            f"{path}: {size} bytes that are not all ASCII, expected at most {narrow}",
        )
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error


def read_lines(path: Path, *, limit: int = LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """The lines of a regular file of any size with their numbers from 1, line ends included.

    A file named `.gz` is unpacked as it is read, so memory is bounded by `limit`. Of a line longer
    than `limit` bytes one byte more than that is given, without its end.

    Raises:
        InputError: as `open_regular`, it cannot be read, or it is packed and damaged.
    """
    with open_regular(path) as file:
        text = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        number, inside = 0, False  # of a line that is too long
        try:
            while line := text.readline(limit + 1):
                if not inside:
                    number += 1
                    yield number, line
                inside = len(line) > limit and not line.endswith(b"\n")
        # A bad header is an OSError.
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: damaged, or not gzip: {error}") from error


def count_lines(path: Path) -> int:
    """The number of lines of a regular file; see `read_lines`."""
    return sum(1 for _ in read_lines(path))


def read_json(path: Path, *, entries: int = ENTRIES) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: of the file.
        entries: see `parse_json`.
    Raises:
        InputError: as `read_text` and `parse_json`, or it is not an object; it names the file.
    """
    tree = parse_json(read_text(path), source=str(path), entries=entries)
    kind = type(tree).__name__
    require(isinstance(tree, dict), f"{path}: expected a JSON object, found {kind}")
    return tree


def file_sha256(path: Path, *, first: int | None = None) -> str:
    """sha256 of a file's bytes, or of so many first ones, in hex.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in read_chunks(path, first):
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(path: Path, first: int | None = None) -> Iterator[bytes]:
    """The bytes of a regular file in chunks, or so many first ones of them.

    Raises:
        InputError: as `open_regular`.
    """
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size if first is None else first
        while chunk := file.read(min(left, _CHUNK_BYTES)):
            yield chunk
            left -= len(chunk)


def write_checksums(directory: Path) -> None:
    """Writes SHA256SUMS over every file below a directory; `sha256sum --check SHA256SUMS` reads it.

    Raises:
        InputError: a file cannot be read.
        OSError: SHA256SUMS cannot be written.
    """
    names = _files_below(directory)
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        hashes = threads.map(file_sha256, [directory / name for name in names])
    lines = [f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True)]
    write_whole(directory / CHECKSUMS, "".join(lines))


def damage(directory: Path, *, unlisted: Container[str] | None = ()) -> str | None:
    """What is wrong with the files below a directory that `write_checksums` was called on.

    Args:
        directory: which should hold SHA256SUMS.
        unlisted: names of files that came later, relative to the directory; None where any may.
    Returns:
        A few words that name the first file in question, or None where every file is as it was.
    """
    try:
        listed = _listed(directory)
    except InputError as error:
        return str(error)
    found = set(_files_below(directory))
    if unlisted is None:
        found &= listed.keys()
    else:
        found = {name for name in found if name not in unlisted}
    differing = sorted(listed.keys() ^ found)
    if differing:
        name = differing[0]
        what = "missing" if name in listed else f"not listed in {CHECKSUMS}"
        return f"{name} is {what}"

    def sound(name: str) -> bool:
        try:
            return file_sha256(directory / name) == listed[name]
        except InputError:
            return False

    # Contents last: reading every byte is what costs, and a missing file needs none of it.
    names = sorted(listed)
    with ThreadPoolExecutor() as threads:
        for name, intact in zip(names, threads.map(sound, names), strict=True):
            if not intact:
                return f"{name} does not match its checksum"
    return None


def checksum_of(directory: Path, name: str) -> str | None:
    """The sha256 of a file in a directory's SHA256SUMS, in hex; None where it is not listed.

    Raises:
        InputError: SHA256SUMS cannot be read.
    """
    return _listed(directory).get(name)


def _listed(directory: Path) -> dict[str, str]:
    """The sha256 of each file that SHA256SUMS lists."""
    lines = read_text(directory / CHECKSUMS).splitlines()
    parts = (line.partition("  ") for line in lines)
    return {name: digest for digest, _, name in parts}


def _files_below(directory: Path) -> list[str]:
    """Names of all files but SHA256SUMS itself, relative to a directory, sorted."""
    paths = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != CHECKSUMS)


def check_new(path: Path) -> None:
    """Raises `InputError` unless a directory may be renamed there: nothing is, or an empty one."""
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected the name of a new directory, such as {path / 'new'}")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already there and not an empty directory; give a new one")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Makes a temporary directory of the same parent, and renames it after the body.

    Args:
        path: missing, or an empty directory.
    Raises:
        InputError: something else is there.
        OSError: something could not be written; it names `path`, and nothing is left.
    """
    check_new(path)
    with _renamed(path) as temporary:
        # Exclusive: fails where a link or anything else has the name.
        temporary.mkdir(parents=True)
        yield temporary


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to `path` after the body; nothing is left where either fails.

    Raises:
        OSError: of the body or the rename; names `path`, or another file that the body used.
    """
    temporary = _temporary(path)
    _unfinished.add(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        # Of another file, such as one that the body reads: the error names it.
        if error.filename is not None and not Path(error.filename).is_relative_to(temporary):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        # Removed, then forgotten: a signal in between still finds what there is to remove.
        _remove(temporary)
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Removes the files and directories that are half-written; the process is about to end."""
    for temporary in list(_unfinished):
        _remove(temporary)


def _temporary(path: Path) -> Path:
    """A hidden random name in the same directory; a rename works within one file system only."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _remove(path: Path) -> None:
    with suppress(OSError):  # the error of the write is the one to report
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
