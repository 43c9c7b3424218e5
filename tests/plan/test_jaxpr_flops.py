"""FLOPs of a traced program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from domino_jax.base.scopes import HEAD, TARGET
from domino_jax.plan.jaxpr_flops import OTHER, flops_by_stage, products
from domino_jax.sharding import make_mesh, split_over_batch

ONE = 2 * 8 * 8 * 8  # a product of two 8 x 8 matrices


def square(x: jax.Array) -> jax.Array:
    return x @ x


def counted(function, *, platform: str = "gpu", trip_count: int = 1) -> dict[str, float]:
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    return flops_by_stage(products(traced, platform=platform, unknown_trip_count=trip_count))


def test_products_belong_to_the_innermost_stage_and_loops_count_their_turns() -> None:
    def step(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            with jax.named_scope(HEAD):
                return square(carry), None

        with jax.named_scope(TARGET):
            x, _ = jax.lax.scan(body, square(x), None, length=3)
        return square(x)

    assert counted(step) == {TARGET: ONE, HEAD: 3 * ONE, OTHER: ONE}


def test_a_gradient_belongs_to_its_stage() -> None:
    def step(x: jax.Array) -> jax.Array:
        with jax.named_scope(TARGET):
            return (x @ jnp.ones((8, 8))).sum()

    assert counted(jax.value_and_grad(step)) == {TARGET: 2 * ONE}


def test_a_loop_of_unknown_length_takes_the_bound() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: square(x), x)

    assert counted(step, trip_count=7) == {OTHER: 7 * ONE}


@pytest.mark.parametrize(("platform", "times"), [("cpu", 1), ("tpu", 2), ("gpu", 3)])
def test_a_choice_by_platform_is_the_planned_one(platform: str, times: int) -> None:
    def step(x: jax.Array) -> jax.Array:
        branches = {"cpu": square, "tpu": lambda x: square(square(x))}
        return jax.lax.platform_dependent(x, **branches, default=lambda x: x @ square(square(x)))

    assert counted(step, platform=platform) == {OTHER: times * ONE}


def test_another_choice_is_its_dearest_branch() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)

    assert counted(step) == {OTHER: 2 * ONE}


def test_what_each_device_does_counts_for_all_devices() -> None:
    with jax.set_mesh(make_mesh(fsdp=8)):
        step = split_over_batch(lambda x: (x @ jnp.ones((8, 8)), x.sum()), by_row=(True,))
        assert counted(step) == {OTHER: ONE}


@pytest.mark.parametrize(("dtype", "float32"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_products_tell_their_type(dtype, float32: bool) -> None:
    traced = jax.jit(square).trace(jax.ShapeDtypeStruct((8, 8), dtype))
    (product,) = products(traced, platform="tpu", unknown_trip_count=1)
    assert (product.flops, product.times, product.float32) == (ONE, 1, float32)
    assert product.path.endswith("/dot_general")
