"""Headers of GGUF files that lie."""

import struct
from pathlib import Path

import pytest
from directories import leftovers

from domino_jax.base.errors import InputError
from domino_jax.target.gguf import convert_gguf


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<IQQ", 3, 2**60, 0), "1152921504606846976 entries, expected at most"),
        (struct.pack("<IQQ", 3, 0, 2**60), "1152921504606846976 entries, expected at most"),
        (
            struct.pack("<IQQQ", 3, 0, 1, 2**63),
            "text of 9223372036854775808 bytes, expected at most 65536",
        ),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**60), "1152921504606846976 entries"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**20), "it ends inside its header"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "an array of type 9"),
        (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "metadata of unknown type 77"),
        (
            struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**62, 0, 0),
            "a tensor lies outside the file",
        ),
        (
            struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 1, 0, 2**62),
            "a tensor lies outside the file",
        ),
        (struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 2**31), "a tensor of 2147483648 dimensions"),
        (struct.pack("<IQQ", 1, 0, 0), "version 1, expected 2 or 3"),
        (struct.pack(">IQQ", 3, 0, 0), "version 50331648, expected 2 or 3"),
        (b"\3\0", "it ends inside its header"),
    ],
)
def test_a_gguf_header_that_lies_is_refused_at_once(
    tmp_path: Path, head: bytes, message: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + head)
    with pytest.raises(InputError, match=f"a.gguf: not a readable GGUF file: {message}"):
        convert_gguf(path, tmp_path / "model")
    assert leftovers(tmp_path) == ["a.gguf"]
