"""Sampled output has the target's distribution."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, chisquare, ncx2
from toy_models import PROMPTS, TARGET, answers, draft_config, models

from domino_jax.decoding.acceptance import accept_sampled
from domino_jax.decoding.speculate import make_decoder
from domino_jax.kernels.products import vocabulary_logits
from domino_jax.target.model import Target, lm_head_weight

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


@pytest.mark.pitfall(
    "a sampled token that equals the mask token is dropped",
    seen="decoding/speculate.py: another token committed in its place",
)
@pytest.mark.parametrize("use_head", [True, False])
def test_sampled_sequences_follow_the_target_s_distribution(
    target_params: Any, use_head: bool
) -> None:
    """Whole loop: three sampled tokens against the product of the target's own conditionals."""
    rows, temperature, prompt = 8192, 1.5, np.array([1, 2], np.int32)
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, use_head=use_head, temperature=temperature)
    state = answers(decoder, weights, [prompt] * rows, 3, seed=11)
    found = np.asarray(state.tokens[:, 2:5])
    assert int(jnp.sum(state.verifications)) < 2 * rows, "nothing was ever accepted"

    triples = np.array(list(itertools.product(range(7), repeat=3)), np.int32)
    sequences = jnp.concatenate([jnp.broadcast_to(prompt, (len(triples), 2)), triples], axis=1)
    hidden = Target(TARGET).apply({"params": target_params}, sequences).hidden
    logs = jax.nn.log_softmax(
        vocabulary_logits(hidden, lm_head_weight(target_params)) / temperature, axis=-1
    )
    steps = jnp.take_along_axis(logs[:, 1:4], jnp.asarray(triples)[..., None], axis=-1)[..., 0]
    expected = np.asarray(jnp.exp(jnp.sum(steps, axis=1)), np.float64) * rows
    counts = np.array([np.sum(np.all(found == triple, axis=1)) for triple in triples])
    frequent = (
        expected >= 5
    )  # Pearson's statistic wants five expected counts a cell: the rest is pooled
    counts = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(expected[frequent], expected[~frequent].sum())
    assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > SIGNIFICANCE


def test_the_same_seed_samples_the_same_tokens(target_params: Any) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, temperature=1.0)
    first, again, other = (
        np.asarray(answers(decoder, weights, PROMPTS, 12, seed=seed).tokens) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
