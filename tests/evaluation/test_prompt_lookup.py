"""The floor is what prompt look-up gives, counted as decoding counts."""

import numpy as np
import pytest
from stand_in import own_answer as answer

from domino_jax.evaluation.prompt_lookup import LONGEST, look_up, proposed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1]),  # three tokens stood before
        ([5, 3, 7, 3, 8, 3], [8, 3]),  # one did, twice: the latest place counts
        ([1, 2, 8, 4, 2, 9, 1, 2], [8, 4]),  # the longer run beats the later place
        ([1, 2, 3], []),
        ([4], []),
        ([6, 6], [6]),  # no more than the text has
    ],
)
def test_what_stood_before_is_proposed(text: list[int], expected: list[int]) -> None:
    assert proposed(text, 2)[-1] == expected


def test_every_beginning_of_a_text_is_searched_as_a_loop_would() -> None:
    def searched(text: list[int]) -> list[int]:
        for length in range(min(LONGEST, len(text) - 1), 0, -1):
            for begin in range(len(text) - length - 1, -1, -1):
                if text[begin : begin + length] == text[-length:]:
                    return text[begin + length : begin + length + 4]
        return []

    text = np.random.default_rng(0).integers(0, 5, 300).tolist()
    assert proposed(text, 4) == [searched(text[: place + 1]) for place in range(len(text))]


@pytest.mark.parametrize(
    ("prompt", "tokens", "drafted", "verifications"),
    [
        # 1 costs nothing. After "4 1" comes 2, 3, 4 (from the prompt's 1), then 9 is the target's
        # own; nothing stood before 9, so 1 is too; then 2, 3 are proposed and kept, and it ends.
        ([1, 2, 3, 4], [1, 2, 3, 4, 9, 1, 2, 3], [0, 1, 1, 1, 0, 0, 1, 1], 3),
        ([1, 2], [3, 4, 5, 6], [0, 0, 0, 0], 3),  # nothing repeats
        ([1, 2], [3], [0], 0),
    ],
)
def test_verifications_are_those_of_a_cycle_by_hand(
    prompt: list[int], tokens: list[int], drafted: list[int], verifications: int
) -> None:
    found = look_up(np.array(prompt, np.int32), answer(*tokens), proposals=3)
    assert found.drafted.tolist() == drafted
    assert (found.committed, found.verifications) == (len(tokens) - 1, verifications)
