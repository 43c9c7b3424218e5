"""Position weights and acceptance statistics against plain loops and NeMo."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.objective.loss import acceptance_stats, compute_accept_len, position_weights


@pytest.mark.pitfall(
    "gamma None silently off or on",
    seen="objective/loss.py: None read as 7; no decay whatever gamma is",
)
@pytest.mark.parametrize("gamma", [None, 0.0, -1.0, 0.5, 7.0])
def test_position_weights_equal_the_loop(gamma: float | None) -> None:
    mask = np.random.default_rng(0).choice([0.0, 0.25, 1.0], (2, 3, 6)).astype(np.float32)
    expected = np.zeros(mask.shape)
    for b, n, m in itertools.product(*map(range, mask.shape)):
        decay = np.exp(-m / gamma) if gamma is not None and gamma > 0 else 1.0
        expected[b, n, m] = decay * mask[b, n, m]
    found = position_weights(jnp.asarray(mask), gamma=gamma)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def random_predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    targets = rng.integers(0, 50, (4, 30, 6))
    predictions = np.where(rng.random(targets.shape) < 0.6, targets, targets + 1)
    valid = rng.random(targets.shape) < 0.7
    valid[0, :5] = False  # blocks without any supervised position
    valid[1, :5] = True
    return predictions, targets, valid


def slow_accept_len(predictions: np.ndarray, targets: np.ndarray, valid: np.ndarray) -> np.ndarray:
    lengths = np.zeros(valid.shape[:2])
    for b, n in itertools.product(*map(range, lengths.shape)):
        for k in range(valid.shape[2]):
            if valid[b, n, k] and predictions[b, n, k] != targets[b, n, k]:
                break
            lengths[b, n] += valid[b, n, k]
    return lengths


def test_compute_accept_len_equals_the_loop_and_nemo() -> None:
    import torch
    from nemo_automodel.components.speculative.dflash import core

    arrays = random_predictions()
    found = compute_accept_len(*map(jnp.asarray, arrays))
    chex.assert_type(found, jnp.float32)
    np.testing.assert_array_equal(found, slow_accept_len(*arrays))
    np.testing.assert_array_equal(
        found, core.compute_accept_len(*map(torch.tensor, arrays)).numpy()
    )
    assert len(np.unique(found)) > 4


def test_acceptance_stats_equal_the_loop_and_nemo() -> None:
    import torch
    from nemo_automodel.components.speculative.dflash import core

    arrays = random_predictions()
    used = arrays[2].any(axis=-1)
    found = acceptance_stats(*map(jnp.asarray, arrays))
    chex.assert_type(list(found), jnp.float32)
    total = (slow_accept_len(*arrays) + 1)[used].sum()
    assert not used.all()
    np.testing.assert_allclose(found, (total / used.sum(), total, used.sum()), rtol=1e-6)
    theirs = core.compute_acceptance_stats(*map(torch.tensor, arrays))
    np.testing.assert_allclose(found, [float(x) for x in theirs], rtol=1e-6)


def test_acceptance_stats_of_nothing_are_zero() -> None:
    ids = jnp.ones((2, 3, 4), jnp.int32)
    assert [float(x) for x in acceptance_stats(ids, ids, jnp.zeros(ids.shape, bool))] == [
        0.0,
        0.0,
        0.0,
    ]
