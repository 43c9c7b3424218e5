"""Files: whole or as they were, read within bounds."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from domino_jax.files import damage, read_json, read_text, write_checksums, write_whole
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


def saved(directory: Path) -> Path:
    (directory / "params").mkdir(parents=True)
    (directory / "params" / "d").write_bytes(b"numbers")
    (directory / "empty").write_bytes(b"")
    write_checksums(directory)
    return directory


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    directory = saved(tmp_path / "10")
    assert damage(directory) is None
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=directory, check=True)
    (directory / "later").write_text("x")
    assert damage(directory, unlisted=["later"]) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("params/d", b"numbert", "params/d does not match its checksum"),
        ("params/d", b"number", "params/d does not match its checksum"),
        ("empty", b"x", "empty does not match its checksum"),
        ("params/d", None, "params/d is missing"),
        ("params/e", b"", "params/e is not listed in SHA256SUMS"),
        ("SHA256SUMS", None, "SHA256SUMS: No such file"),
        ("SHA256SUMS", b"", "empty is not listed in SHA256SUMS"),
        ("SHA256SUMS", b"\xff", "SHA256SUMS: not UTF-8"),
    ],
)
def test_damage_names_the_file(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    directory = saved(tmp_path)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    assert words in (damage(directory) or "nothing")


def test_every_flipped_bit_is_damage(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    for name in ("params/d", "SHA256SUMS"):
        whole = (directory / name).read_bytes()
        for place in range(len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << (place % 8)
            (directory / name).write_bytes(flipped)
            assert damage(directory) is not None, (name, place)
        (directory / name).write_bytes(whole)
    assert damage(directory) is None
