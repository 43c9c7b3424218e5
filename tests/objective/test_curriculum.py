"""The curriculum weight against the reference, as a number and as a traced schedule."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.objective.curriculum import get_lambda_base, lambda_base_schedule

STARTS = (1.0, 0.5, 0.0, 1.5, -0.5)
RATIOS = (1.0, 0.5, 0.07, 0.0)
TOTALS = (0, 1, 7, 40)


def test_get_lambda_base_equals_the_reference_on_a_grid() -> None:
    from nemo_automodel.components.speculative.dflash import domino_core

    for step, total, start, ratio in itertools.product(range(43), TOTALS, STARTS, RATIOS):
        assert get_lambda_base(step, total, start, ratio) == domino_core.get_lambda_base(
            step, total, start, ratio
        )
    assert get_lambda_base(3, 40) == domino_core.get_lambda_base(3, 40)


@pytest.mark.parametrize("total", TOTALS)
def test_lambda_base_schedule_equals_get_lambda_base(total: int) -> None:
    for start, ratio in itertools.product(STARTS, RATIOS):
        schedule = lambda_base_schedule(total, lambda_start=start, decay_ratio=ratio)
        expected = [get_lambda_base(step, total, start, ratio) for step in range(43)]
        # In float32 the weight is exact to one rounding of a number near 1.
        np.testing.assert_allclose(
            jax.jit(jax.vmap(schedule))(jnp.arange(43)), expected, rtol=1e-6, atol=2e-7
        )


def test_lambda_base_schedule_is_traced_once_for_all_steps() -> None:
    schedule = jax.jit(lambda_base_schedule(8))
    for step in range(6):
        found = schedule(jnp.asarray(step))
        chex.assert_shape(found, ())
        chex.assert_type(found, jnp.float32)
        np.testing.assert_allclose(found, get_lambda_base(step, 8), rtol=1e-6)
    assert schedule._cache_size() == 1
