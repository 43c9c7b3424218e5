"""Files: whole or as they were, read within bounds."""

import os
import stat
from pathlib import Path

import pytest

from domino_jax.files import file_sha256, read_json, read_text, sha256_lines, write_whole
from domino_jax.strict import InputError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
    ],
)
def test_read_json_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_json(tmp_path / "config.json")


def test_write_whole_leaves_what_was_there_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "old\n")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["config.yaml"]


def test_write_whole_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_read_text_refuses_what_is_no_small_text_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "large").write_text("x" * 11)
    (tmp_path / "odd").write_bytes(b"\xff")
    for name, message in (
        ("pipe", "not a regular file"),
        ("large", "11 bytes, expected at most 10"),
        ("odd", "not UTF-8 text: invalid start byte at byte 0"),
        ("none", "No such file"),
        ("", "directory|regular file"),
    ):
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / name, limit=10)


def test_sha256_lines_are_those_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    lines = sha256_lines(tmp_path, ["b", "a"])
    assert lines.splitlines()[0] == f"{file_sha256(tmp_path / 'a')}  a" and lines.splitlines()[1].endswith("  b")
    assert file_sha256(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
