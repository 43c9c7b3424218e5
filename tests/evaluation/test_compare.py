"""Greedy outputs are held against the target's own, and a fault does not pass for a tie."""

from dataclasses import astuple, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toy_models
from stand_in import own_answer as answer

from domino_jax.base.errors import InputError
from domino_jax.decoding.decoder import Weights
from domino_jax.evaluation.compare import Difference, compare, next_logits
from domino_jax.target.decoder import Target

TARGET = Target(toy_models.TARGET)
PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2, 3], [1, 2, 3, 4, 5])]


@pytest.fixture
def weights(target_params: Any) -> Weights:
    return Weights(target_params)


def test_compare_reports_the_first_difference_with_its_logit_gap(weights: Weights) -> None:
    found = compare(
        weights, TARGET, PROMPTS, [answer(4, 5, 6), answer(0, 1)], [answer(4, 2, 6), answer(0, 1)]
    )
    assert (found.tokens_compared, found.tokens_equal) == (4, 3)
    (difference,) = found.differences
    assert (difference.prompt, difference.position) == (0, 1)
    assert (difference.plain_token, difference.speculative_token) == (5, 2)
    hidden = TARGET.apply({"params": weights.target}, jnp.array([[1, 2, 3, 4]])).hidden[0, -1]
    logits = weights.target["lm_head"] @ hidden
    assert difference.logit_gap == pytest.approx(float(abs(logits[5] - logits[2])), rel=1e-4)
    np.testing.assert_allclose(
        next_logits(TARGET, weights.target, np.array([1, 2, 3, 4])), logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("left", "right"), [((4, 5), (4, 5, 6)), ((4, 5, 6), (4, 5))])
def test_compare_takes_a_missing_token_for_a_difference(
    weights: Weights, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    found = compare(weights, TARGET, PROMPTS[:1], [answer(*left)], [answer(*right)])
    assert (found.tokens_compared, found.tokens_equal) == (3, 2)
    assert found.differences[0].logit_gap is None and -1 in astuple(found.differences[0])
    assert not found.lossless


@pytest.mark.parametrize(("dtype", "lossless"), [("float32", False), ("bfloat16", True)])
def test_a_tie_is_as_wide_as_the_type_is_coarse(
    weights: Weights, dtype: str, lossless: bool
) -> None:
    target = replace(TARGET, cfg=replace(TARGET.cfg, dtype=dtype))
    found = compare(weights, target, PROMPTS[:1], [answer(4, 5)], [answer(4, 5)])
    assert found.lossless
    apart = replace(found, differences=(Difference(0, 1, 5, 9, logit_gap=0.1),))
    assert apart.lossless == lossless


def test_a_gap_that_is_not_finite_is_an_error(weights: Weights) -> None:
    head = weights.target["lm_head"].at[2].set(jnp.nan)
    bad = weights._replace(target={**weights.target, "lm_head": head})
    with pytest.raises(InputError, match="the target's logits are not finite"):
        compare(bad, TARGET, PROMPTS[:1], [answer(4, 5, 6)], [answer(4, 2, 6)])
