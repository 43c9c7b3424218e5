"""Files: whole or as they were, read within bounds."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from domino_jax import files
from domino_jax.files import (
    checked_file,
    damage,
    read_json,
    read_lines,
    read_text,
    write_checksums,
    write_whole,
)
from domino_jax.parse import parse_json, parse_yaml
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


def test_write_whole_leaves_what_was_there_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_damage_names_the_file(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "a: {b: [1, 1_000, -2, 1.5, 1.0e-05, ~, yes, 'on', x]}",
            {"a": {"b": [1, 1000, -2, 1.5, 1e-5, None, True, "on", "x"]}},
        ),
        (
            "[2001-01-01, 2001-99-99, 0x10, 010, 1:30, 1e-3]",
            ["2001-01-01", "2001-99-99", "0x10", "010", "1:30", "1e-3"],
        ),
        ("", None),
        ("[" * 64 + "]" * 64, None),
    ],
)
def test_parse_yaml_reads_plain_values(text: str, value: Any) -> None:
    found = parse_yaml(text, place="f")
    assert found == value or text.startswith("[[")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is given twice"),
        ("x: {1: a, 1: b}", "the key 1 is given twice"),
        ("[" * 65 + "]" * 65, "column 65: more than 64 levels of lists and mappings"),
        ("[" * 3000, "more than 64 levels of lists and mappings"),
        ("a: &x [1]\nb: *x", r"aliases \(\*name\) are not read"),
        ("!!int a", "tags .* are not read"),
        ("!!python/object/apply:os.system [ls]", "tags .* are not read"),
        ("9" * 5000, "a number of 5000 characters, expected at most 64"),
        ("0." + "9" * 5000, "a number of 5002 characters, expected at most 64"),
        ("{[1]: 2}", "a list or mapping as a key"),
        ("a: [1,", "line 1, column 7: "),
        ("a\0", "special characters are not allowed"),
        ("#" * 2**21, "2097152 characters of YAML, expected at most 1048576"),
        ("a: 1\n---\nb: 2", "not valid YAML: line 2"),
    ],
)
def test_parse_yaml_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^f: .*{message}"):
        parse_yaml(text, place="f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ("[" * 65 + "]" * 65, "more than 64 levels of lists and mappings"),
        ('{"a":' * 100_000, "more than 64 levels of lists and mappings"),
        ("NaN", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ("1e400", "1e400 is beyond every float"),
        ("9" * 5000, "a number of 5000 characters, expected at most 64"),
        ("{", "not valid JSON: "),
    ],
)
def test_parse_json_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^f: .*{message}"):
        parse_json(text, place="f")


def test_parse_json_reads_the_bounds() -> None:
    assert (
        parse_json("[" * 64 + "]" * 64, place="f")
        and parse_json(f"{'9' * 64}", place="f") == 10**64 - 1
    )
    assert parse_json("[Infinity]", place="f", nonfinite=True) == [float("inf")]


def test_read_lines_counts_and_cuts_what_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", 4)
    (tmp_path / "x").write_bytes(b"ab\n\n123456789012\nabc\nend")
    assert list(read_lines(tmp_path / "x")) == [
        (1, b"ab\n"),
        (2, b"\n"),
        (3, b"12345"),
        (4, b"abc\n"),
        (5, b"end"),
    ]
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "not a regular file"),
        ("none", "No such file"),
        ("a\0", "null"),
    ):
        with pytest.raises(InputError, match=message):
            next(read_lines(tmp_path / name))


def test_a_link_may_stay_in_its_model(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("x")
    cache = tmp_path / "hub" / "models--o--n"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "1").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "other.json").symlink_to("config.json")
    (snapshot / "out.json").symlink_to(outside)
    (tmp_path / "linked").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "linked"):
        assert checked_file(directory, "config.json") and checked_file(directory, "other.json")
        with pytest.raises(
            InputError, match=r"out\.json: a link out of its directory, to .*secret; .*copy it"
        ):
            checked_file(directory, "out.json")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match="No such file"):
        checked_file(tmp_path, "gone")
