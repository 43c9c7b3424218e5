"""A target's answers are decoded once, and never taken for those of something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import own_answer
from tiny import Heard

from domino_jax.base.files import write_json
from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.answer_cache import cached_answers, prompts_sha256

SET = {"prompts": 2, "vocab_size": 10}
IDENTITY = {"target": "abc", "max_new_tokens": 4, "dtype": "float32"}


def answers() -> list[Answer]:
    return [own_answer(5, 6, 7, stopped=True), own_answer(8)]


def never() -> list[Answer]:
    raise AssertionError("decoded again")


def test_answers_are_computed_once(tmp_path: Path) -> None:
    cached_answers(tmp_path / "answers", IDENTITY, answers, **SET)
    found = cached_answers(tmp_path / "answers", IDENTITY, never, **SET)
    for one, expected in zip(found, answers(), strict=True):
        np.testing.assert_array_equal(one.tokens, expected.tokens)
        assert one.tokens.dtype == np.int32 and not one.drafted.any()
        assert one.stopped == expected.stopped
        assert (one.committed, one.verifications) == (expected.committed, expected.verifications)


@pytest.mark.parametrize(
    "change", [{"target": "abd"}, {"max_new_tokens": 5}, {"dtype": "bfloat16"}]
)
def test_anything_else_is_another_set(tmp_path: Path, change: dict[str, object]) -> None:
    cached_answers(tmp_path, IDENTITY, answers, **SET)
    with pytest.raises(AssertionError, match="decoded again"):
        cached_answers(tmp_path, IDENTITY | change, never, **SET)


@pytest.mark.parametrize("damage", ["", "{}", '{"identity": {}}', "[1]", "\x00"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cached_answers(tmp_path, IDENTITY, answers, **SET)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    heard = Heard()
    assert len(cached_answers(tmp_path, IDENTITY, answers, reporter=heard, **SET)) == 2
    assert path.read_text() == whole
    (line,) = heard.lines
    assert line.startswith(str(path)) and line.endswith("the target's answers are decoded again")


@pytest.mark.parametrize("place", range(0, 250, 7))
def test_no_changed_byte_changes_an_answer(tmp_path: Path, place: int) -> None:
    cached_answers(tmp_path, IDENTITY, answers, **SET)
    (path,) = tmp_path.iterdir()
    changed = bytearray(path.read_bytes())
    changed[place % len(changed)] ^= 1
    path.write_bytes(changed)
    heard = Heard()
    found = cached_answers(tmp_path, IDENTITY, answers, reporter=heard, **SET)
    assert heard.lines and [one.tokens.tolist() for one in found] == [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": [[5, 4, 7], [8]]}, "changed after it was written"),
        ({"tokens": [[5, 6, 7], []]}, "answer 2 is not a list of token ids from 0 to 9"),
        ({"tokens": [[5, 999_999_999, -7], [8]]}, "answer 1 is not a list"),
        ({"tokens": [[5, 6, 10], [8]]}, "answer 1 is not a list"),
        ({"tokens": [[5, 6, 7.0], [True]]}, "answer 1 is not a list"),
        ({"tokens": [[5, 6, 7]]}, "1 answers and 2 stops, expected 2 of each"),
        ({"stopped": [True]}, "2 answers and 1 stops, expected 2 of each"),
        ({"stopped": [True, 0]}, "answer 2 is not"),
        ({"tokens": {}}, "expected lists `tokens` and `stopped`"),
        ({"identity": {"target": "abd"}}, "expected those of"),
    ],
)
def test_what_is_no_answer_of_the_target_is_not_used(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    cached_answers(tmp_path, IDENTITY, answers, **SET)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text()) | change
    if reason.startswith("changed"):
        path.write_text(json.dumps(record))
    else:  # the hash is that of the change: the second look at it
        del record["sha256"]
        write_json(path, record)
    heard = Heard()
    found = cached_answers(tmp_path, IDENTITY, answers, reporter=heard, **SET)
    assert [one.tokens.tolist() for one in found] == [[5, 6, 7], [8]]
    (line,) = heard.lines
    assert reason in line and line.endswith("; the target's answers are decoded again"), line


def test_a_place_that_cannot_be_written_is_told_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # not a directory, to root either
    heard = Heard()
    found = cached_answers(tmp_path / "file" / "answers", IDENTITY, answers, reporter=heard, **SET)
    assert len(found) == 2
    (line,) = heard.lines
    assert line.endswith("answers: Not a directory; the target's answers are not kept")


def test_prompts_are_told_apart_by_every_token() -> None:
    first = [np.array([1, 2]), np.array([3])]
    assert prompts_sha256(first) == prompts_sha256(first)
    assert prompts_sha256(first) != prompts_sha256([np.array([1]), np.array([2, 3])])
