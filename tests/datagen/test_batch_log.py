"""An unfinished file of answers, cut and damaged at every byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from disk import files_end_at

from domino_jax.base.errors import InputError
from domino_jax.datagen.batch_log import BatchLog, log_of

BATCHES = [[{"prompt_line": 2, "finished": True}, {"prompt_line": 1, "finished": False}]]
BATCHES += [[{"prompt_line": 3, "finished": True}]]
GENERATOR = {"seed": 0}


def opened(path: Path) -> BatchLog:
    def read(record: dict[str, Any]) -> tuple[int, bool]:
        return record["prompt_line"], record["finished"]

    return BatchLog(path, read, kind="an answer", generator=GENERATOR)


def write(path: Path) -> list[int]:
    """Both batches; the lengths at which something was whole."""
    whole = []
    with opened(path) as log:
        whole.append(path.stat().st_size)
        for batch in BATCHES:
            log.add(batch)
            whole.append(path.stat().st_size)
    return whole


def test_a_log_lies_beside_a_file_that_may_be_written(tmp_path: Path) -> None:
    place = tmp_path / "answers.jsonl"
    assert log_of(place) == tmp_path / "answers.jsonl.partial"
    place.touch()
    with pytest.raises(InputError, match="already there; remove it to make it again"):
        log_of(place)
    # Who reads it would unpack lines that nobody packed.
    with pytest.raises(InputError, match=r"is not written packed; give a name without \.gz"):
        log_of(tmp_path / "answers.jsonl.gz")


def test_batch_log_cut_anywhere_goes_on_from_the_last_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand times would take seconds
    path = tmp_path / "answers.partial"
    whole = write(path)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        with opened(path) as log:
            kept = sum(length >= end for end in whole[1:])
            assert log.finished == {
                one["prompt_line"]: one["finished"] for batch in BATCHES[:kept] for one in batch
            }
            for batch in BATCHES[kept:]:
                log.add(batch)
        assert path.read_bytes() == content


def test_batch_log_with_any_bit_flipped_takes_no_wrong_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.partial"
    write(path)
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            with opened(path) as log:
                # Where its attestation is no more one, the last batch is answered again.
                assert log.finished == {1: False, 2: True}
        except InputError as error:
            assert str(error).startswith(f"{path}:") and len(str(error)) < 500
            refused += 1
    assert refused > len(content) // 2


def test_batch_log_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.partial"
    for content in (b'{"prompt_line": 1, "finished": true}\n', b"x", b"\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not unfinished answers as this version writes them"):
            opened(path)
        assert path.read_bytes() == content


def test_publish_leaves_the_answers_alone(tmp_path: Path) -> None:
    path, answers = tmp_path / "answers.partial", tmp_path / "answers.jsonl"
    write(path)
    with opened(path) as log:
        log.publish(answers)
    header, *written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert header["generator"] == GENERATOR and "tokenizers" in header["versions"]
    assert written == [one for batch in BATCHES for one in batch]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["answers.jsonl"]


def test_a_full_disk_keeps_the_batches_before(tmp_path: Path) -> None:
    path = tmp_path / "answers.partial"
    whole = write(path)
    content = path.read_bytes()
    path.write_bytes(content[: whole[1]])
    with opened(path) as log:
        full = pytest.raises(OSError, match=r"File too large: '.*answers.partial'")
        with files_end_at(whole[1] + 7), full:  # a few bytes of the batch are taken
            log.add(BATCHES[1])
        assert path.read_bytes() == content[: whole[1]]
        log.add(BATCHES[1])
    assert path.read_bytes() == content


def test_batch_log_writes_through_no_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (tmp_path / "answers.partial").symlink_to(other)
    with pytest.raises(InputError, match=r"answers\.partial: a symbolic link, .*; remove the link"):
        opened(tmp_path / "answers.partial")
    assert not other.exists()
