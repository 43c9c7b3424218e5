"""A target's answers are decoded once, and never taken for those of something else."""

from pathlib import Path

import numpy as np
import pytest
from stand_in import own_answer
from tiny import Heard

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.answer_cache import cached_answers, prompts_sha256

IDENTITY = {"target": "abc", "max_new_tokens": 4, "dtype": "float32"}


def answers() -> list[Answer]:
    return [own_answer(5, 6, 7, stopped=True), own_answer(8)]


def never() -> list[Answer]:
    raise AssertionError("decoded again")


def test_answers_are_computed_once(tmp_path: Path) -> None:
    cached_answers(tmp_path / "answers", IDENTITY, answers)
    found = cached_answers(tmp_path / "answers", IDENTITY, never)
    for one, expected in zip(found, answers(), strict=True):
        np.testing.assert_array_equal(one.tokens, expected.tokens)
        assert one.tokens.dtype == np.int32 and not one.drafted.any()
        assert one.stopped == expected.stopped
        assert (one.committed, one.verifications) == (expected.committed, expected.verifications)


@pytest.mark.parametrize(
    "change", [{"target": "abd"}, {"max_new_tokens": 5}, {"dtype": "bfloat16"}]
)
def test_anything_else_is_another_set(tmp_path: Path, change: dict[str, object]) -> None:
    cached_answers(tmp_path, IDENTITY, answers)
    with pytest.raises(AssertionError, match="decoded again"):
        cached_answers(tmp_path, IDENTITY | change, never)


@pytest.mark.parametrize("damage", ["", "{}", '{"identity": {}}', "[1]", "\x00"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cached_answers(tmp_path, IDENTITY, answers)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    assert len(cached_answers(tmp_path, IDENTITY, answers)) == 2
    assert path.read_text() == whole


def test_a_place_that_cannot_be_written_is_told_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # not a directory, to root either
    heard = Heard()
    found = cached_answers(tmp_path / "file" / "answers", IDENTITY, answers, reporter=heard)
    assert len(found) == 2
    (line,) = heard.lines
    assert line.endswith("answers: Not a directory; the target's answers are not kept")


def test_prompts_are_told_apart_by_every_token() -> None:
    first = [np.array([1, 2]), np.array([3])]
    assert prompts_sha256(first) == prompts_sha256(first)
    assert prompts_sha256(first) != prompts_sha256([np.array([1]), np.array([2, 3])])
