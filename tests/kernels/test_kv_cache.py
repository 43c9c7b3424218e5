"""The cache against plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded import normal

from domino_jax.kernels import causal_attention
from domino_jax.kernels import kv_cache as kernel
from domino_jax.kernels.kv_cache import Cache


@pytest.mark.parametrize("batch", [1, 3])
def test_write_equals_loops(batch: int) -> None:
    held = Cache(normal(batch, 2, 6, 4), normal(batch, 2, 6, 4, seed=2))
    new = (normal(batch, 2, 2, 4, seed=1), normal(batch, 2, 2, 4, seed=3))
    start = np.array([3, 0, 4][:batch], np.int32)
    found = jax.jit(kernel.write)(held, *new, start)
    for before, run, after in zip(held, new, found, strict=True):
        expected = before.copy()
        for b, kv, t in np.ndindex(batch, 2, 2):
            expected[b, kv, start[b] + t] = run[b, kv, t]
        np.testing.assert_array_equal(after, expected)


def test_write_keeps_the_type_of_the_cache() -> None:
    zeros, ones = jnp.zeros((1, 1, 4, 2), jnp.bfloat16), jnp.ones((1, 1, 4, 2))
    written = kernel.write(Cache(zeros, zeros), ones, ones, jnp.zeros(1, int))
    chex.assert_trees_all_equal(written, Cache(*[jnp.ones((1, 1, 4, 2), jnp.bfloat16)] * 2))
    assert written.keys.dtype == jnp.bfloat16


@pytest.mark.parametrize("batch", [1, 3])
def test_cached_attention_sees_up_to_each_position_and_nothing_stale(batch: int) -> None:
    length, cache_len, start = 2, 7, np.array([3, 0, 5][:batch], np.int32)
    q = normal(batch, 4, length, 6)
    keys, values = (normal(batch, 2, length, 6, seed=seed) for seed in (1, 2))
    held = Cache(*(normal(batch, 2, cache_len, 6, seed=seed) for seed in (3, 4)))
    found, cache = jax.jit(kernel.cached_attention)(q, keys, values, held, start)
    chex.assert_trees_all_equal(cache, kernel.write(held, keys, values, start))
    for b in range(batch):
        for t in range(length):
            seen = start[b] + t + 1
            one = (np.asarray(x)[b : b + 1, :, :seen] for x in cache)
            expected = causal_attention.definition(
                q[b : b + 1, :, t : t + 1], *one, mask=np.ones((1, 1, seen), bool)
            )
            np.testing.assert_allclose(found[b, :, t], expected[0, :, 0], rtol=1e-5, atol=1e-6)
