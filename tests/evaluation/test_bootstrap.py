"""Intervals over prompts cover what they say, and pairs are kept together."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from domino_jax.evaluation.bootstrap import Gain, PerPrompt, gain, tau_interval


def drawn(rng: np.random.Generator, prompts: int) -> tuple[PerPrompt, PerPrompt]:
    """Two ways on the same prompts: the second needs a tenth more verifications, give or take."""
    committed = rng.integers(40, 64, prompts)
    first = rng.integers(20, 60, prompts)
    second = first * 1.1 + rng.integers(0, 3, prompts)
    return (
        PerPrompt(tuple(committed.tolist()), tuple(first.tolist())),
        PerPrompt(tuple(committed.tolist()), tuple(second.astype(int).tolist())),
    )


def test_the_interval_covers_the_true_tau_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    everybody, _ = drawn(rng, 100_000)
    covered = 0
    for _ in range(100):
        low, high = tau_interval(drawn(rng, 60)[0]) or (0, 0)
        covered += low <= everybody.tau <= high
    assert 88 <= covered <= 99


def test_a_paired_gain_is_known_better_than_either_tau() -> None:
    one, other = drawn(np.random.default_rng(1), 40)
    found = gain(one, other)
    assert found is not None
    assert found.ratio == pytest.approx(one.tau / other.tau)
    low, high = found.interval or (0, 0)
    assert 1 < low < found.ratio < high
    of_one = tau_interval(one) or (0, 0)
    assert (high - low) / found.ratio < (of_one[1] - of_one[0]) / one.tau / 3


def test_the_same_figures_give_the_same_interval() -> None:
    one, other = drawn(np.random.default_rng(2), 10)
    assert tau_interval(one) == tau_interval(one) and gain(one, other) == gain(one, other)


def test_one_prompt_has_no_interval() -> None:
    one = PerPrompt((9,), (4,))
    assert tau_interval(one) is None and gain(one, one) == Gain(1, None)


@pytest.mark.filterwarnings("error")
def test_answers_of_one_token_have_no_gain() -> None:
    """Nothing is committed and nothing verified: no ratio, and nothing that JSON cannot hold."""
    none = PerPrompt((0, 0), (0, 0))
    assert none.tau == 0 and tau_interval(none) == (0, 0) and gain(none, none) is None
    # Both draws of the second prompt are one of four: they have no ratio.
    one = PerPrompt((9, 0), (4, 0))
    assert gain(one, one) == Gain(1, None)
    json.dumps(asdict(Gain(1, None)) | {"interval": tau_interval(one)}, allow_nan=False)


def test_sets_of_different_prompts_are_not_paired() -> None:
    with pytest.raises(ValueError, match="2 prompts beside 1"):
        gain(PerPrompt((9, 9), (4, 4)), PerPrompt((9,), (4,)))
