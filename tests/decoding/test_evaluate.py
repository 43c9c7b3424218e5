"""The evaluation's figures follow from the answers; no difference between outputs is hidden."""

from dataclasses import astuple, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, target_config
from tiny import Heard

from domino_jax.decoding.evaluate import Difference, compare, evaluate, next_logits
from domino_jax.decoding.generate import Answer
from domino_jax.decoding.speculate import Weights, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.target.model import Target

CONFIG = draft_config(num_target_layers=4, target_layer_ids=(0, 2))
TARGET = Target(target_config(CONFIG))
PROMPTS = [np.arange(1, 1 + count, dtype=np.int32) for count in (3, 5, 70)]


@pytest.fixture(scope="module")
def weights() -> Weights:
    target = nn.meta.unbox(TARGET.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    draft = nn.meta.unbox(init_variables(DraftModel(CONFIG), jax.random.key(1)))["params"]
    return Weights(jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, target), draft)


def answer(
    *tokens: int, committed: int = 1, verifications: int = 1, seconds: float = 1.0
) -> Answer:
    ids = np.array(tokens, np.int32)
    return Answer(ids, np.zeros(len(ids), bool), False, committed, verifications, seconds)


def test_evaluate_counts_and_finds_equal_outputs(weights: Weights) -> None:
    heard = Heard()
    decoder = make_decoder(TARGET, DraftModel(CONFIG))
    figures = evaluate(decoder, weights, PROMPTS, max_new_tokens=10, reporter=heard)
    assert heard.lines == ["prompts 1/3", "prompts 2/3", "prompts 3/3"] and figures.prompts == 3
    compared = figures.comparison
    assert compared is not None and compared.lossless and compared.differences == ()
    # Head on and off.
    assert figures.tokens == 30 and compared.tokens_compared == compared.tokens_equal == 60
    assert figures.tau == pytest.approx(27 / figures.verifications)
    assert figures.tau_head_off is not None and figures.tau_head_off >= 1
    assert figures.speed_up == pytest.approx(
        figures.tokens_per_second / figures.tokens_per_second_plain
    )
    # Flat, and what readers of `evaluation.json` know.
    assert set(figures.as_json()) == {
        *("prompts", "tau", "tau_head_off", "tokens", "verifications", "speed_up"),
        *("tokens_per_second", "tokens_per_second_plain", "tokens_per_second_head_off"),
        *("tokens_compared", "tokens_equal", "differences", "tie", "lossless"),
    }


def test_evaluate_has_no_head_off_without_a_head(weights: Weights) -> None:
    config = replace(CONFIG, head=None, shift_label=False, pure_draft_prefix_len=0)
    draft = nn.meta.unbox(init_variables(DraftModel(config), jax.random.key(1)))["params"]
    decoder = make_decoder(TARGET, DraftModel(config))
    figures = evaluate(decoder, weights._replace(draft=draft), PROMPTS[:1], max_new_tokens=4)
    assert figures.tau_head_off is None and figures.tau >= 1
    assert "tau_head_off" not in figures.as_json()


def test_evaluate_compares_no_samples(weights: Weights) -> None:
    decoder = make_decoder(TARGET, DraftModel(CONFIG), temperature=1.0)
    figures = evaluate(decoder, weights, PROMPTS[:1], max_new_tokens=4)
    assert figures.comparison is None and "lossless" not in figures.as_json()


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


@pytest.mark.parametrize(("dtype", "lossless"), [("float32", False), ("bfloat16", True)])
def test_a_tie_is_as_wide_as_the_type_is_coarse(
    weights: Weights, dtype: str, lossless: bool
) -> None:
    target = replace(TARGET, cfg=replace(TARGET.cfg, dtype=dtype))
    found = compare(weights, target, PROMPTS[:1], [answer(4, 5)], [answer(4, 5)])
    assert found.lossless
    apart = replace(found, differences=(Difference(0, 1, 5, 9, logit_gap=0.1),))
    assert apart.lossless == lossless


def test_a_wrong_verifier_is_noticed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that takes whatever is drafted gives a high tau and is not lossless."""

    def take_all(drafted: jax.Array, choices: jax.Array) -> Any:
        return jnp.full(drafted.shape[0], drafted.shape[1], jnp.int32), choices[:, -1]

    monkeypatch.setattr("domino_jax.decoding.speculate.accept_greedy", take_all)
    jax.clear_caches()
    figures = evaluate(
        make_decoder(TARGET, DraftModel(CONFIG)), weights, PROMPTS, max_new_tokens=10
    )
    jax.clear_caches()
    compared = figures.comparison
    assert compared is not None and not compared.lossless
    assert compared.tokens_equal < compared.tokens_compared
