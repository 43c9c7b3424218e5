"""A GGUF file of somebody else, opened once its header is known to describe what lies in the file.

The library maps the file and believes its counts: an array of 2**60 numbers is walked to its end,
past the end of the file. So the header is walked here first, part by part:

    magic, version, counts | key, type, value ... | name, shape, type, offset ... | tensors
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domino_jax.base.errors import InputError, shown, text_problem
from domino_jax.base.files import open_regular

if TYPE_CHECKING:
    import gguf

# By GGUFValueType, in numbers: the library that names them is imported only to open a file.
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ENTRIES = 2**22  # of one array, of the metadata or of tensors: vocabularies have 2**18
_NAME_BYTES = 2**16
_DIMENSIONS = 4  # of ggml


@dataclass(frozen=True)
class GgufSource:
    """An open GGUF file: its place for messages, its metadata and its tensors, still quantised."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: "list[gguf.ReaderTensor]"

    def need(self, key: str, kind: type) -> Any:
        """The value of a key that must be there and of this type."""
        value = self.optional(key, kind)
        if value is None:
            raise InputError(f"{self.path}: metadata {key} is 'missing'; a model needs it")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """The value of a key, of this type if it is there, else None."""
        value = self.metadata.get(key)
        # Not `isinstance`: true is an int in Python, and no number of layers.
        if value is not None and type(value) is not kind:
            raise InputError(
                f"{self.path}: metadata {key} is {shown(value)}; "
                f"a model needs it as {kind.__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{self.path}: metadata {key} is {value}; expected a finite number")
        if isinstance(value, str) and text_problem(value):
            raise InputError(f"{self.path}: metadata {key} {text_problem(value)}")
        return value

    def entries(self, key: str, kind: type) -> list[Any]:
        """A list that must be there, all of this type."""
        found = self.need(key, list)
        other = next((entry for entry in found if type(entry) is not kind), None)
        if other is not None:
            raise InputError(
                f"{self.path}: metadata {key} holds {shown(other)}; expected {kind.__name__}"
            )
        return found

    def token_id(self, role: str) -> int | None:
        """The id of the token of a role ("bos", "eos", ...), None when the file names none."""
        key = f"tokenizer.ggml.{role}_token_id"
        index = self.optional(key, int)
        count = len(self.need("tokenizer.ggml.tokens", list))
        if index is not None and not 0 <= index < count:
            raise InputError(f"{self.path}: {key} {index} is outside the {count} tokens")
        return index

    def token(self, role: str) -> str | None:
        """The text of that token."""
        index = self.token_id(role)
        return None if index is None else self.entries("tokenizer.ggml.tokens", str)[index]


def open_gguf(path: Path) -> GgufSource:
    """Opens a GGUF file and reads its metadata.

    Raises:
        InputError: not a regular file, not GGUF, or a header that describes more than the file
            holds.
    """
    import gguf

    with open_regular(path) as file:
        try:
            _Header(file, path.stat().st_size).check()
        except ValueError as error:
            raise InputError(f"{path}: not a readable GGUF file: {error}") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise InputError(f"{path}: not a readable GGUF file: {error}") from error
    return GgufSource(path, metadata, reader.tensors)


@dataclass(frozen=True)
class _Header:
    """A header under way: each method reads one part of it, and the next one what follows.

    All raise `ValueError` where a part leads out of the file, whose `size` is in bytes, or beyond
    the bounds above.
    """

    file: BufferedReader
    size: int

    def check(self) -> None:
        """Reads all of it."""
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        tensors, keys = self.count(), self.count()
        for _ in range(keys):
            self.text(_NAME_BYTES)
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text(_NAME_BYTES)
            self.tensor()

    def number(self, kind: str) -> int:
        """An integer, `kind` as `struct` spells its type."""
        width = struct.calcsize(kind)
        data = self.file.read(width)
        if len(data) < width:
            raise ValueError("it ends inside its header")
        return struct.unpack(f"<{kind}", data)[0]

    def count(self) -> int:
        """How many entries follow."""
        found = self.number("Q")
        if found > _ENTRIES:
            raise ValueError(f"{found} entries, expected at most {_ENTRIES}")
        return found

    def text(self, limit: int) -> None:
        """Text of at most `limit` bytes, behind its length."""
        length = self.number("Q")
        if length > limit:
            raise ValueError(f"text of {length} bytes, expected at most {limit}")
        self._skip(length)

    def value(self, kind: int) -> None:
        """A value of the metadata, `kind` by GGUFValueType."""
        if kind == _STRING:
            self.text(self.size)
        elif kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _ARRAY:
            entries, length = self.number("I"), self.count()
            if entries in _SCALAR_BYTES:
                self._skip(length * _SCALAR_BYTES[entries])
            elif entries == _STRING:
                for _ in range(length):
                    self.text(self.size)
            else:  # arrays of arrays too, which the format has and these models do not need
                raise ValueError(f"an array of type {entries}")
        else:
            raise ValueError(f"metadata of unknown type {kind}")

    def tensor(self) -> None:
        """Where a tensor lies: its shape, type and offset, behind its name."""
        dimensions = self.number("I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions, expected at most {_DIMENSIONS}")
        elements = math.prod(self.number("Q") for _ in range(dimensions))
        self.number("I")  # its type, which the library knows
        # The library multiplies dimensions in 64 bits, where a product may wrap to a small number.
        # No type takes less than an eighth of a byte for an element.
        if self.number("Q") > self.size or elements > 8 * self.size:
            raise ValueError("a tensor lies outside the file")

    def _skip(self, count: int) -> None:
        # Asked first: to seek beyond the end of a file is no error.
        if count > self.size - self.file.tell():
            raise ValueError("it ends inside its header")
        self.file.seek(count, 1)
