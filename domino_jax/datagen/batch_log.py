"""Unfinished answers in batches, each attested, so that a second start loses and changes none.

With a temperature the answer to a prompt depends on its batch, so a second start must resume where
a batch ended. But a process may be killed between any two bytes, and a disk may be full at any of
them; and a damaged answer must not become training data. So a line after each batch attests it:

    {"sha256": of nothing}
    {"generator": {...}, "versions": {...}}
    {"sha256": of all lines before this one}
    {"messages": ..., "prompt_line": 3, ...}
    {"messages": ..., "prompt_line": 8, ...}
    {"sha256": of all lines before this one}

Whatever follows the last such line is dropped and answered again. No jax here.
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from domino_jax.base.errors import InputError, require
from domino_jax.base.files import open_appending, read_lines, whole_file
from domino_jax.base.parse import parse_json
from domino_jax.data.template import GENERATOR, settings_text

# Token ids depend on them; a later start may have others.
PACKAGES = ("domino-jax", "jax", "transformers", "tokenizers")
# No header and no record begins so: their first keys are "generator" and "messages".
_ATTESTS = b'{"sha256": '


def log_of(path: Path) -> Path:
    """Where the lines of a new file wait until they are all there: `PATH.partial`.

    Raises:
        InputError: the file is there already, or is called packed.
    """
    if path.exists():
        raise InputError(f"{path}: already there; remove it to make it again")
    # Who reads such a file unpacks it, and these lines are written as they are.
    if path.suffix == ".gz":
        raise InputError(f"{path}: is not written packed; give a name without .gz")
    return path.with_name(path.name + ".partial")


class BatchLog:
    """An unfinished file of answers, or of prompts.

    Attributes:
        finished: of the batches that earlier starts wrote, by the key of a record, whether each
            answer ended by itself.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[dict[str, Any]], tuple[Any, bool] | None],
        *,
        kind: str,
        generator: Mapping[str, Any],
    ) -> None:
        """Opens the file, or makes it.

        Args:
            path: the file; what is not attested is cut off its end.
            read: gives a record's key and whether it ended by itself; None for what is no record.
                Raises `InputError` for a record of another start.
            kind: what a record is, for messages.
            generator: the settings of this start, which the header holds.
        Raises:
            InputError: a record of another start, a link, or a changed file.
            OSError: it cannot be opened or written.
        """
        self.finished: dict[Any, bool] = {}
        self._path, self._read_record = path, read
        self._kind, self._generator = kind, generator
        self._digest = hashlib.sha256()
        self._length = 0
        self._headed = False
        if path.exists():
            self._read()
        # Unbuffered: what a full disk refused is dropped, not tried again when the file is closed.
        # Appending: every write goes to the file's end, also after a batch was cut off it.
        self._file: BinaryIO = open_appending(path, buffering=0)
        self._file.truncate(self._length)
        if self._length == 0:
            self.add([])  # so that a file without a batch shows whose it is
        if not self._headed:
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            self.add([{GENERATOR: generator, "versions": versions}])

    def __enter__(self) -> "BatchLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Adds a batch; it is on disk when this returns.

        Raises:
            OSError: it could not be written; the batches before it are as they were.
        """
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        batch = "".join(lines).encode()
        # A copy: after a failed write the log's own digest still is that of the lines on disk.
        digest = self._digest.copy()
        digest.update(batch)
        left = batch = batch + _attestation(digest)
        try:
            while left:  # an unbuffered file may take a part; the next call tells why
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._length)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._digest.update(batch)
        self._length += len(batch)

    def publish(self, path: Path) -> None:
        """Writes the answers of all batches to their final place, whole, and removes the log.

        Raises:
            OSError: they could not be written; the log is as it was.
        """
        with self._path.open("rb") as file, whole_file(path) as whole:
            whole.writelines(line for line in file if not line.startswith(_ATTESTS))
        self._path.unlink()

    def _read(self) -> None:
        """Takes what is attested; `_length` is where it ends."""
        digest = hashlib.sha256()
        length = number = kept = 0
        first = b""
        nothing = _attestation(digest)
        for number, line in read_lines(self._path):
            first = first or line
            # Cut off before its line end, an attestation attests nothing: its batch is dropped.
            attests = line.startswith(_ATTESTS) and line.endswith(b"\n")
            if attests and line != _attestation(digest):
                raise InputError(
                    f"{self._path}:{number}: damaged: it does not attest the lines before it; "
                    "put a copy of the file back, or remove it to start again"
                )
            digest.update(line)
            length += len(line)
            if attests:
                kept, self._length, self._digest = number, length, digest.copy()
        # Part of the first line is a start that was killed while it wrote it; anything else without
        # an attestation is a file of somebody else, which opening it would cut to nothing.
        if self._length == 0 and (number > 1 or not nothing.startswith(first)):
            raise InputError(
                f"{self._path}: not unfinished answers as this version writes them; "
                "move the file away to start again"
            )
        # Only now: before it is attested, a line may be damaged in any way.
        for number, line in itertools.islice(read_lines(self._path), kept):
            if not line.startswith(_ATTESTS):
                self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            record = parse_json(line, source=None, nonfinite=True)
            require(isinstance(record, dict), f"not {self._kind}")
            if not self._headed:
                made_with = record.get(GENERATOR)
                header = isinstance(made_with, dict) and "messages" not in record
                require(header, f"not the header of a file of {self._kind}")
                differs = settings_text(made_with) != settings_text(self._generator)
                require(not differs, f"made with {made_with}, not {self._generator}")
                self._headed = True
                return
            known = self._read_record(record)
            if known is None:
                raise InputError(f"not {self._kind}")
            key, finished = known
            require(key not in self.finished, f"{self._kind} that the file has already")
        except InputError as error:
            raise InputError(
                f"{self._path}:{number}: {error}; remove the file to start again"
            ) from error
        self.finished[key] = finished


def _attestation(digest: Any) -> bytes:
    return _ATTESTS + json.dumps(digest.hexdigest()).encode() + b"}\n"
