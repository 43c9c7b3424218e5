"""Files: written whole or not at all, read within bounds, and known by their hashes.

A process may end at any moment, and a file that somebody else wrote may be anything. So what a run
relies on is written beside its place and renamed, and what it reads is a regular file of a bounded
size, parsed within bounded depth. No other module opens a small file by itself. No jax here.

    run/config.yaml.new  -- written, flushed to disk --  renamed to  run/config.yaml
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Container, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from domino_jax.strict import InputError, shown

CHECKSUMS = "SHA256SUMS"
BESIDE = ".new"  # what the name of a file ends with until it is whole
# Of a file that is parsed as a whole: settings, manifests, tokenizers' side files.
TEXT_BYTES = 2**26
YAML_CHARACTERS = 2**20  # of settings, which people write; the parser takes seconds for as many
LINE_BYTES = 2**26  # of one line of a JSONL file
DEPTH = 64  # levels of mappings and lists
NUMBER_CHARACTERS = 64  # of a number as it is written


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text beside its place, flushes it to disk and renames it.

    The mode follows the umask.

    Raises:
        OSError: it could not be written; what stood there is as it was, nothing is left beside it.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # Before the rename, which may reach the disk earlier than the text does.
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; a pipe or a device, which may never answer, is refused.

    Raises:
        InputError: not there, not readable, or not a regular file.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (the caller closes it)
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path}: not a regular file")
    return file


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
    open_regular(path).close()
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
        InputError: not there, not a regular file, larger than `limit` bytes, or not UTF-8.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes, expected at most {limit}")
        try:
            # Bounded here too: the file may have grown since its size was asked.
            return file.read(limit + 1).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a regular file of any size with their numbers from 1, line ends included.

    Of a line longer than `LINE_BYTES` one byte more than that is given, without its end.

    Raises:
        InputError: as `open_regular`, or it cannot be read.
    """
    with open_regular(path) as file:
        try:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                yield number, line
                while len(line) > LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES + 1)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: as `read_text` and `parse_json`, or it is not an object; it names the file.
    """
    tree = parse_json(read_text(path), place=str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def parse_json(text: str | bytes, *, place: str | None, nonfinite: bool = False) -> Any:
    """Parses JSON of somebody else, within bounds.

    Args:
        text: the JSON.
        place: where it comes from, for the message; None where the caller says so.
        nonfinite: take NaN and Infinity, which are not JSON but which Python writes.
    Raises:
        InputError: not JSON, a key that is given twice in one object, a number beyond every float
            or of more than `NUMBER_CHARACTERS`, or more than `DEPTH` levels.
    """
    where = "" if place is None else f"{place}: "
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=float if nonfinite else _no_constant,
        )
    except RecursionError as error:  # in json's parser, before there is a value to look at
        raise InputError(f"{where}more than {DEPTH} levels of lists and mappings") from error
    except ValueError as error:
        raise InputError(f"{where}not valid JSON: {error}") from error
    if _deeper_than(value, DEPTH):
        raise InputError(f"{where}more than {DEPTH} levels of lists and mappings")
    return value


def parse_yaml(text: str, *, place: str) -> Any:
    """Parses YAML of somebody else, within bounds.

    Read are mappings, lists, text, numbers, true, false and null. Numbers are decimal and dates are
    text, as in YAML 1.2: `010` and `1:30` are not 8 and 90.

    Raises:
        InputError: not YAML, a key that is given twice, an alias, a tag, a number of more than
            `NUMBER_CHARACTERS`, more than `DEPTH` levels, or more than `YAML_CHARACTERS`.
    """
    if len(text) > YAML_CHARACTERS:
        raise InputError(
            f"{place}: {len(text)} characters of YAML, expected at most {YAML_CHARACTERS}"
        )
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(
            f"{place}: not valid YAML: {where}{error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex.

    Raises:
        InputError: it cannot be read.
    """
    with open_regular(path) as file:
        try:
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


def damage(directory: Path, *, unlisted: Container[str] | None = ()) -> str | None:
    """What is wrong with the files below a directory that `write_checksums` was called on.

    Args:
        directory: which should hold SHA256SUMS.
        unlisted: names of files that came later, relative to the directory; None where any may.
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
    found = set(_files_below(directory))
    found = (
        found & listed.keys()
        if unlisted is None
        else {name for name in found if name not in unlisted}
    )
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


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return mapping


def _whole_number(text: str) -> int:
    return int(_short(text))


def _number(text: str) -> float:
    number = float(_short(text))
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond every float")
    return number


def _short(text: str) -> str:
    if len(text) > NUMBER_CHARACTERS:
        raise ValueError(
            f"a number of {len(text)} characters, expected at most {NUMBER_CHARACTERS}"
        )
    return text


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and mappings lie in each other more than `depth` times, without recursion."""
    level = [value]
    for _ in range(depth + 1):
        holders = [item for item in level if isinstance(item, dict | list)]
        if not holders:
            return False
        level = [
            child
            for item in holders
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return True


class _BoundedLoader(yaml.SafeLoader):
    """The part of YAML that settings need.

    What it leaves out costs memory or says what nobody meant.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        # Nine lists of nine aliases, each of the list before, stand for 9**9 values.
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not read; write the value itself", event)
        if getattr(event, "tag", None) is not None:
            raise self._refusal(
                f"tags ({shown(event.tag)}) are not read; write the value alone", event
            )
        holder = isinstance(event, yaml.CollectionStartEvent)
        self.depth += holder
        if self.depth > DEPTH:
            raise self._refusal(f"more than {DEPTH} levels of lists and mappings", event)
        node = super().compose_node(parent, index)
        self.depth -= holder
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise self._refusal("a list or mapping as a key", key_node)
            if key in mapping:  # PyYAML would take the last of the two
                raise self._refusal(f"the key {shown(key)} is given twice", key_node)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_number(self, node: Any) -> int | float:
        if len(node.value) > NUMBER_CHARACTERS:
            found = f"a number of {len(node.value)} characters"
            raise self._refusal(f"{found}, expected at most {NUMBER_CHARACTERS}", node)
        kind = self.construct_yaml_int if node.tag == f"{_TAG}int" else self.construct_yaml_float
        return kind(node)

    @staticmethod
    def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_TAG = "tag:yaml.org,2002:"
# What plain text stands for; YAML 1.1's own spellings, less octal, hexadecimal, sexagesimal numbers
# and dates.
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_BoundedLoader.yaml_implicit_resolvers = {
    None: [(f"{_TAG}{kind}", re.compile(f"(?:{spelling})$")) for kind, spelling in _PLAIN.items()]
}
_BoundedLoader.yaml_constructors = {
    f"{_TAG}{kind}": constructor
    for kind, constructor in (
        *(
            (kind, getattr(yaml.SafeLoader, f"construct_yaml_{kind}"))
            for kind in ("null", "bool", "str", "seq", "map")
        ),
        *((kind, _BoundedLoader.construct_number) for kind in ("int", "float")),
    )
}
