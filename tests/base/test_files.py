"""Files: whole or as they were, read within bounds; directories likewise."""

import errno
import gzip
import json
import os
import stat
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from disk import files_end_at

from domino_jax.base.errors import InputError
from domino_jax.base.files import (
    check_new,
    checked_file,
    count_lines,
    damage,
    read_json,
    read_lines,
    read_own_json,
    read_text,
    remove_unfinished,
    whole_directory,
    whole_file,
    write_checksums,
    write_error,
    write_json,
    write_whole,
)
from domino_jax.formats.gguf import open_gguf
from domino_jax.formats.safetensors import open_safetensors


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_json),
        ("config.json", lambda path: checked_file(path.parent, path.name)),
        ("rows.jsonl", lambda path: next(read_lines(path))),
        ("rows.jsonl.gz", lambda path: next(read_lines(path))),
        ("model.gguf", lambda path: open_gguf(path)),
        ("model.safetensors", lambda path: open_safetensors(path.parent)),
    ],
)
def test_a_git_lfs_pointer_is_no_file(tmp_path: Path, name: str, read: Any) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name}: a git-lfs pointer, expected the file itself; run `git lfs pull` in "
        "its repository"
    )
    (tmp_path / "notes").write_text(f" {POINTER}")  # text about one
    assert read_text(tmp_path / "notes").strip() == POINTER.strip()


def test_write_whole_leaves_what_was_there_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "old\n")
    with files_end_at(2), pytest.raises(OSError, match="File too large"):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["config.yaml"]


def test_write_whole_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_temporary_file_follows_no_link_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("config.yaml.new", "config.yaml.tmp", ".config.yaml.tmp"):
        (tmp_path / name).symlink_to(other)
    write_whole(tmp_path / "config.yaml", "text\n")
    assert other.read_text() == "mine" and (tmp_path / "config.yaml").read_text() == "text\n"
    # Even the random name, had somebody guessed it.
    monkeypatch.setattr("domino_jax.base.files._temporary", lambda path: tmp_path / "guessed")
    (tmp_path / "guessed").symlink_to(other)
    with pytest.raises(OSError, match=r"File exists: '.*config.yaml'"):
        write_whole(tmp_path / "config.yaml", "changed\n")
    assert other.read_text() == "mine" and (tmp_path / "config.yaml").read_text() == "text\n"
    # A link in the place itself is replaced, and what it points to stays.
    (tmp_path / "linked").symlink_to(other)
    monkeypatch.undo()
    write_whole(tmp_path / "linked", "text\n")
    assert other.read_text() == "mine" and not (tmp_path / "linked").is_symlink()


def test_an_error_of_another_file_names_that_file(tmp_path: Path) -> None:
    missing, path = tmp_path / "missing", tmp_path / "config.yaml"
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        missing.read_bytes()
    assert caught.value.filename == str(missing) and not names(tmp_path)


def test_own_json_keeps_every_value(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    tree = {"b": (1, 2.5, 1e-7), "a": {10: None, 9: True}, "text": "ä\ud800\n", "1.0": 1.0}
    write_json(path, tree, indent=1)
    assert list(json.loads(path.read_text()))[-1] == "sha256"
    found = read_own_json(path, remedy="write it again")
    assert found == {**tree, "b": [1, 2.5, 1e-7], "a": {"10": None, "9": True}}
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_own_json(path, remedy="write it again") == found
    with pytest.raises(ValueError, match="reserved"):
        write_json(path, {"sha256": "x"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"tau": float("nan")})
    assert read_own_json(path, remedy="write it again") == found


def test_no_changed_byte_of_own_json_changes_a_value(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    tree = {"tau": 2.531, "sets": {"x": [1, True, None, "a\nb"]}}
    write_json(path, tree, indent=1)
    whole = path.read_bytes()
    read = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            assert read_own_json(path, remedy="write it again") == tree, place
            read += 1  # other white space
        except InputError as error:
            assert "\n" not in str(error)
    assert read < 20
    path.write_bytes(whole.replace(b"2.531", b"2.631"))
    with pytest.raises(InputError, match=r"own\.json: changed .* expected '.*'; write it again"):
        read_own_json(path, remedy="write it again")
    path.write_text("{}")
    with pytest.raises(InputError, match=r"no key 'sha256', expected the hash .*; write it again"):
        read_own_json(path, remedy="write it again")


def test_read_text_refuses_what_is_no_small_text_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "large").write_text("x" * 11)
    (tmp_path / "odd").write_bytes(b"\xff")
    refused = {"pipe": "not a regular file", "large": "11 bytes, expected at most 10"}
    refused |= {"odd": "not UTF-8 text: invalid start byte at byte 0", "none": "No such file"}
    for name, message in (refused | {"": "directory|regular file"}).items():
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


@pytest.mark.pitfall(
    "a flipped bit in a checkpoint trains on in silence",
    seen="base/files.py: missing and new files alone looked for",
)
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


def test_read_lines_counts_and_cuts_what_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"ab\n\n123456789012\nabc\nend")
    lines = [b"ab\n", b"\n", b"12345", b"abc\n", b"end"]
    assert list(read_lines(tmp_path / "x", limit=4)) == list(enumerate(lines, start=1))
    os.mkfifo(tmp_path / "pipe")
    refused = {"pipe": "not a regular file", "none": "No such file", "a\0": "null"}
    for name, message in refused.items():
        with pytest.raises(InputError, match=message):
            next(read_lines(tmp_path / name))


def test_read_lines_unpacks_gzip(tmp_path: Path) -> None:
    text = b"ab\n\n123456789012\nabc\nend"
    (tmp_path / "x.jsonl").write_bytes(text)
    plain = list(read_lines(tmp_path / "x.jsonl", limit=4))
    # Several members one behind the other are one text, also for gzip's own tools.
    members = gzip.compress(text[:5]) + gzip.compress(text[5:])
    for packed in (gzip.compress(text), members):
        (tmp_path / "x.jsonl.gz").write_bytes(packed)
        assert list(read_lines(tmp_path / "x.jsonl.gz", limit=4)) == plain
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b""))
    assert list(read_lines(tmp_path / "x.jsonl.gz")) == []


def test_damaged_gzip_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    lines = [b"%d %d\n" % (number, number**7) for number in range(40)]
    whole = gzip.compress(b"".join(lines), mtime=0)
    damaged = [whole[:end] for end in range(1, len(whole))]
    # Not the header's flags, time and system: most of their bits say nothing of the text.
    for place in [0, 1, 2, *range(10, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        damaged.append(bytes(flipped))
    damaged += [b"".join(lines), whole + b"rest"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.jsonl\.gz: damaged, or not gzip: .+") as caught:
            list(read_lines(path))
        assert "\n" not in str(caught.value)


def test_a_file_that_packs_well_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\n" * 2**19 + b"x" * 2**19)
    assert path.stat().st_size * 500 < 2**20
    tracemalloc.start()
    try:
        lines = sum(1 for _ in read_lines(path, limit=2**12))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines == count_lines(path) == 2**19 + 1 and peak < 2**20


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
        leads_out = r"out\.json: a link out of its directory, to .*secret; .*copy it"
        with pytest.raises(InputError, match=leads_out):
            checked_file(directory, "out.json")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match="No such file"):
        checked_file(tmp_path, "gone")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_whole_directory_appears_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with whole_directory(place) as beside:
            (beside / "file").write_text("text")
            assert not place.exists() or not names(place)
        assert names(place) == ["file"] and names(place.parent) in (["deep"], ["empty", "new"])


def test_whole_directory_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    place = tmp_path / "draft"
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*draft'$") as caught,
        whole_directory(place) as beside,
    ):
        (beside / "file").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(beside / "file"))
    assert caught.value.errno == errno.ENOSPC and not names(tmp_path)
    # Of something else, which only happened to be read inside, the name stays.
    with pytest.raises(FileNotFoundError, match=r"'.*elsewhere'$"), whole_directory(place):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(KeyError), whole_directory(place):
        raise KeyError
    assert not names(tmp_path)
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "mine").write_text("")
    with (
        pytest.raises(InputError, match="draft: already there and not an empty directory"),
        whole_directory(place),
    ):
        raise AssertionError
    assert names(place) == ["mine"]


def test_a_directory_is_renamed_to_a_name_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (Path(), Path("..")):
        with pytest.raises(InputError, match="expected the name of a new directory"):
            check_new(place)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    for place in (Path("link"), Path("dangling")):  # to which no directory can be renamed
        with pytest.raises(InputError, match="already there and not an empty directory"):
            check_new(place)
    check_new(Path("empty"))


def test_remove_unfinished_is_for_a_process_that_ends(tmp_path: Path) -> None:
    # What a body has written is gone; the body, which a real process would not end, cannot
    # publish it.
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "draft") as beside:
        (beside / "file").write_text("half")
        remove_unfinished()
        assert not beside.exists()
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "page.html") as file:
        assert names(tmp_path)
        file.write(b"half")
        remove_unfinished()
        assert not names(tmp_path)
    with pytest.raises(KeyError), whole_file(tmp_path / "page.html"):
        raise KeyError
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("write() failed: Disk quota exceeded; writing x; at byte 57344", errno.EDQUOT),
        ("RESOURCE_EXHAUSTED: Error writing local file: [Read-only file system]", errno.EROFS),
        ("something else\nin two lines", errno.EIO),
    ],
)
def test_write_error_reads_what_libraries_say(said: str, number: int) -> None:
    error = write_error(RuntimeError(said), Path("states"))
    assert isinstance(error, OSError) and (error.errno, error.filename) == (number, "states")
    assert "\n" not in (error.strerror or "")
