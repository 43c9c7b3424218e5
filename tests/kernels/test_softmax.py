"""The one pass over a row of logits against its definition, whole and over a split vocabulary."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_cases import CASES

from domino_jax.kernels.softmax import definition, in_one_pass
from domino_jax.sharding import make_mesh


@pytest.mark.parametrize("seed", CASES)
def test_one_pass_equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(1, [4, 5, 700]))
    logits = rng.standard_normal(shape) * rng.choice([0.1, 10.0, 1e4])
    logits = np.round(logits, 1).astype(
        np.float32
    )  # so that the largest stands in several places at times
    found, expected = in_one_pass(jnp.asarray(logits)), definition(jnp.asarray(logits))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.argmax, expected.argmax)
    chex.assert_trees_all_equal_dtypes(found, expected)


def test_a_split_vocabulary_is_not_gathered() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)
    expected = definition(logits)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layout = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
    with jax.set_mesh(mesh):
        run = jax.jit(in_one_pass, in_shardings=layout)
        found, text = run(logits), run.lower(logits).compile().as_text()
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert "f32[2,64]" not in text


def test_what_is_not_finite_stays_so() -> None:
    logits = jnp.array([[0.0, jnp.nan, 1.0], [jnp.inf, 0.0, 1.0]])
    assert not np.any(np.isfinite(in_one_pass(logits).total + in_one_pass(logits).maximum))
