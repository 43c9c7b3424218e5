"""Scaling by a weight and the sum of its gradient, in the form of every platform."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.kernels import scale

SHAPES = [(5,), (3, 5), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_equals_its_definition_in_values_and_gradients(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, weights, weight = (
        rng.standard_normal(s).astype(np.float32) for s in (shape, shape, shape[-1:])
    )

    def run(scaled):
        return jax.value_and_grad(
            lambda x, w: jnp.sum(jnp.sin(scaled(x, w)) * weights), argnums=(0, 1)
        )(x, weight)

    chex.assert_trees_all_close(run(scale.scaled), run(scale.definition), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [scale._sum_over_rows, scale._sum_as_product])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_form_sums_the_gradient_of_the_weight(
    implementation: Any, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    x, gradient, weight = (
        rng.standard_normal(s).astype(np.float32) for s in (shape, shape, shape[-1:])
    )
    expected = jax.vjp(scale.definition, x, weight)[1](gradient)[1]
    chex.assert_trees_all_close(implementation(gradient, x), expected, rtol=1e-5, atol=1e-6)
