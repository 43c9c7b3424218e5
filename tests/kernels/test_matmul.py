"""Products with stored weights, of many rows and of few."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded import normal

from domino_jax.kernels.matmul import linear


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 5), (3, 4), (16,), (17,), (2, 3, 7)])
def test_project_equals_a_plain_product(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape, 6), normal(9, 6, seed=1)
    weights = normal(*shape, 9, seed=2)
    np.testing.assert_allclose(jax.jit(linear)(x, weight), x @ weight.T, rtol=1e-5, atol=1e-6)
    found = jax.jit(jax.grad(lambda x, w: jnp.sum(linear(x, w) * weights), argnums=(0, 1)))(
        x, weight
    )
    expected = (weights @ weight, weights.reshape(-1, 9).T @ x.reshape(-1, 6))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    half = jax.eval_shape(
        functools.partial(linear, dtype=jnp.float32), x.astype(jnp.bfloat16), weight
    )
    assert half.dtype == jnp.float32
