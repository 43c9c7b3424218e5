"""Greedy outputs are held against the target's own, and a fault does not pass for a tie."""

from dataclasses import astuple, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, target_config

from domino_jax.decoding.decoder import Weights
from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.compare import Difference, compare, next_logits
from domino_jax.target.decoder import Target

CONFIG = draft_config(num_target_layers=4, target_layer_ids=(0, 2))
TARGET = Target(target_config(CONFIG))
PROMPTS = [np.arange(1, 1 + count, dtype=np.int32) for count in (3, 5)]


@pytest.fixture(scope="module")
def weights() -> Weights:
    target = nn.meta.unbox(TARGET.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    return Weights(jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, target))


def answer(
    *tokens: int, committed: int = 1, verifications: int = 1, seconds: float = 1.0
) -> Answer:
    ids = np.array(tokens, np.int32)
    return Answer(ids, np.zeros(len(ids), bool), False, committed, verifications, seconds)


def test_compare_reports_the_first_difference_with_its_logit_gap(weights: Weights) -> None:
    found = compare(
        weights,
        TARGET,
        PROMPTS[:2],
        [answer(4, 5, 6), answer(7, 8)],
        [answer(4, 9, 6), answer(7, 8)],
    )
    assert (found.tokens_compared, found.tokens_equal) == (4, 3)
    (difference,) = found.differences
    assert (difference.prompt, difference.position) == (0, 1)
    assert (difference.plain_token, difference.speculative_token) == (5, 9)
    hidden = TARGET.apply({"params": weights.target}, jnp.array([[1, 2, 3, 4]])).hidden[0, -1]
    logits = weights.target["lm_head"] @ hidden
    assert difference.logit_gap == pytest.approx(float(abs(logits[5] - logits[9])), rel=1e-4)
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
