"""Sampled output has the target's distribution."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from scipy.stats import chi2, chisquare, ncx2
from toy_models import TARGET, answers, draft_config, drawn_from, models

from domino_jax.decoding import speculate
from domino_jax.decoding.acceptance import accept_sampled
from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.filters import filtered
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight

# The statistic is Pearson's; `power` is the chance to notice the stated fault at the
# 0.1 % level.
SIGNIFICANCE = 1e-3


ROWS = 200_000


def distributions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """q for one position and p for two, over five tokens, far apart."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5), size=2)


def first_tokens(rule: Any, q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Counts of the first committed token when one token is drafted from q and the rule decides."""
    drafted = jax.random.categorical(jax.random.key(3), jnp.log(q), shape=(ROWS, 1)).astype(
        jnp.int32
    )
    accepted, following = rule(
        jax.random.key(4),
        drafted,
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), (ROWS, 1, 5)),
        jnp.broadcast_to(jnp.asarray(p, jnp.float32), (ROWS, 2, 5)),
    )
    return np.bincount(np.where(accepted > 0, drafted[:, 0], following), minlength=5)


def resample_from_p(
    key: jax.Array, drafted: jax.Array, q: jax.Array, p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A wrong rule: after a refusal it draws from p instead of the positive part of p - q."""
    accepted, _ = accept_sampled(key, drafted, q, p)
    return accepted, jax.random.categorical(jax.random.key(5), jnp.log(p[:, 0]), axis=-1).astype(
        jnp.int32
    )


@pytest.mark.parametrize("seed", range(3))
def test_accepted_tokens_follow_the_target_s_distribution(seed: int) -> None:
    q, p = distributions(seed)
    assert (
        chisquare(first_tokens(accept_sampled, q, p), ROWS * p[0] / p[0].sum()).pvalue
        > SIGNIFICANCE
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_rule_fails_the_same_test(seed: int) -> None:
    q, p = distributions(seed)
    kept = np.minimum(p[0], q)
    wrong = kept + (1 - kept.sum()) * p[0]
    noncentrality = ROWS * np.sum((wrong - p[0]) ** 2 / p[0])
    power = ncx2.sf(chi2.isf(SIGNIFICANCE, df=4), df=4, nc=noncentrality)
    assert power > 0.999
    assert (
        chisquare(first_tokens(resample_from_p, q, p), ROWS * p[0] / p[0].sum()).pvalue
        < SIGNIFICANCE
    )


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    _, p = distributions(0)
    drafted = jax.random.categorical(jax.random.key(0), jnp.log(p[0]), shape=(1000, 1)).astype(
        jnp.int32
    )
    q = jnp.broadcast_to(jnp.asarray(p[:1], jnp.float32), (1000, 1, 5))
    target = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (1000, 2, 5))
    accepted, _ = accept_sampled(jax.random.key(1), drafted, q, target)
    assert int(jnp.sum(accepted)) == 1000


@pytest.mark.parametrize("seed", range(3))
def test_filtered_tokens_follow_the_target_s_filtered_distribution(seed: int) -> None:
    """Each keeps tokens that the other does not; p / q and p - q have zeros in both places."""
    q, p = distributions(seed)
    q = drawn_from(q, top_k=3, top_p=None)
    p = np.stack([drawn_from(one, top_k=None, top_p=0.8) for one in p])
    assert np.any((q > 0) & (p[0] == 0))
    counts, kept = first_tokens(accept_sampled, q, p), p[0] > 0
    assert not counts[~kept].any()
    assert chisquare(counts[kept], ROWS * p[0][kept]).pvalue > SIGNIFICANCE


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of sequences are not filled up to 64 tokens each."""
    monkeypatch.setattr(speculate, "PROMPT_BUCKET", 2)


TRIPLES = np.array(list(itertools.product(range(7), repeat=3)), np.int32)
PROMPT = np.array([1, 2], np.int32)
SEQUENCES, TEMPERATURE = 8192, 1.5


def sampled(target_params: Any, *, seed: int = 11, **options: Any) -> np.ndarray:
    """Three tokens of each sequence that the whole loop answers with."""
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, temperature=TEMPERATURE, **options)
    state = answers(decoder, weights, [PROMPT] * SEQUENCES, 3, seed=seed)
    assert int(jnp.sum(state.verifications)) < 2 * SEQUENCES, "nothing was ever accepted"
    return np.asarray(state.tokens[:, 2:5])


def sampled_triples(target_params: Any, **options: Any) -> np.ndarray:
    """How often each triple is what the whole loop answers with."""
    found = sampled(target_params, **options)
    return np.bincount(found @ [49, 7, 1], minlength=len(TRIPLES))


def expected_triples(
    target_params: Any, *, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The same by the product of the target's own conditionals, each filtered."""
    sequences = jnp.concatenate([jnp.broadcast_to(PROMPT, (len(TRIPLES), 2)), TRIPLES], axis=1)

    @jax.jit
    def probabilities(sequences: jax.Array) -> jax.Array:
        hidden = Target(TARGET).apply({"params": target_params}, sequences).hidden
        logits = vocabulary_logits(hidden, lm_head_weight(target_params)) / TEMPERATURE
        return jax.nn.softmax(logits, axis=-1)

    whole = np.asarray(probabilities(sequences), np.float64)
    expected = np.full(len(TRIPLES), float(SEQUENCES))
    for number, triple in enumerate(TRIPLES):
        for place, token in enumerate(triple):
            drawn = drawn_from(whole[number, place + 1], top_k=top_k, top_p=top_p)
            expected[number] *= drawn[token]
    return expected


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of Pearson's test; 0 where something was counted that cannot be."""
    if counts[expected == 0].any():
        return 0.0
    # The statistic wants five expected counts a cell: the rest is pooled.
    cells = [(count, mean) for count, mean in zip(counts, expected, strict=True) if mean >= 5]
    rest = expected[expected < 5].sum()
    if rest > 0:
        cells.append((counts[expected < 5].sum(), rest))
    found, means = np.array(cells).T
    return float(chisquare(found, means * found.sum() / means.sum()).pvalue)


@pytest.mark.pitfall(
    "a sampled token that equals the mask token is dropped",
    seen="decoding/speculate.py: another token committed in its place",
)
@pytest.mark.parametrize("use_head", [True, False])
def test_sampled_sequences_follow_the_target_s_distribution(
    target_params: Any, use_head: bool
) -> None:
    """Whole loop: three sampled tokens against the product of the target's own conditionals."""
    counts = sampled_triples(target_params, use_head=use_head)
    assert p_value(counts, expected_triples(target_params)) > SIGNIFICANCE


FILTERS = [{"top_k": 4, "top_p": 0.9}, {"top_k": 3}, {"top_p": 0.8}]


@pytest.mark.parametrize("filters", slow_after(1, FILTERS), ids=str)
def test_filtered_sequences_follow_the_filtered_distribution(
    target_params: Any, filters: dict[str, Any]
) -> None:
    expected = expected_triples(target_params, **filters)
    assert 0 < np.sum(expected > 0) < len(TRIPLES)
    assert p_value(sampled_triples(target_params, **filters), expected) > SIGNIFICANCE


def left_out_of_the_target(logits: jax.Array, **filters: Any) -> jax.Array:
    """A wrong filter: of the draft and the first token, but not of what verifies, [B, P + 1, V]."""
    return logits if logits.ndim == 3 else filtered(logits, **filters)


def of_the_whole_block(logits: jax.Array, **filters: Any) -> jax.Array:
    """A wrong filter: what the first place keeps is kept in all places of a block."""
    if logits.ndim < 3:
        return filtered(logits, **filters)
    return jnp.where(filtered(logits[:, :1], **filters) > -jnp.inf, logits, -jnp.inf)


@pytest.mark.parametrize(
    ("wrong", "filters"),
    slow_after(1, [(left_out_of_the_target, FILTERS[1]), (of_the_whole_block, FILTERS[2])]),
)
def test_a_wrong_filter_fails_the_same_test(
    target_params: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, filters: dict[str, Any]
) -> None:
    monkeypatch.setattr(speculate, "filtered", wrong)
    jax.clear_caches()  # of the program with the right filter
    counts = sampled_triples(target_params, **filters)
    jax.clear_caches()
    assert p_value(counts, expected_triples(target_params, **filters)) < SIGNIFICANCE


def test_the_same_seed_samples_the_same_tokens(target_params: Any) -> None:
    first, again, other = (sampled(target_params, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
