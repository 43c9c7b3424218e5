"""The place of the largest logit, by groups and plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.kernels import argmax


@pytest.mark.parametrize(
    "implementation", [argmax.definition, argmax._by_groups, jax.jit(argmax.argmax)]
)
@pytest.mark.parametrize("size", [1, 7, 12, 110, 49152])
def test_most_likely_is_the_first_of_the_largest(implementation, size: int) -> None:
    logits = (
        np.random.default_rng(size).integers(0, max(size // 3, 1), (2, 3, size)).astype(np.float32)
    )
    found = implementation(jnp.asarray(logits))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))


def test_no_gradient_flows_through_the_place() -> None:
    def total(logits: jax.Array) -> jax.Array:
        return jnp.sum(logits * argmax.argmax(logits))

    logits = jnp.array([[1.0, 3.0, 2.0]])
    np.testing.assert_array_equal(jax.grad(total)(logits), [[1.0, 1.0, 1.0]])
