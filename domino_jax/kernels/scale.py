"""A norm's weight has a gradient that sums over all rows, whose terms a CPU would compute twice.

Scaling by a learned weight is the end of every norm:

    forward     x [.., D] * weight [D]
    backward    gradient * weight                    of x
                sum over rows of gradient * x        of the weight, [D]
"""

import jax
import jax.numpy as jnp


def definition(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x * weight` over the last axis, [..., D] and [D]."""
    return x * weight


def _sum_over_rows(gradient: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum((gradient * x).reshape(-1, x.shape[-1]), axis=0)


def _sum_as_product(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """For a CPU: a product with ones.

    XLA fuses into a plain sum what made its terms, and computes that twice.
    """
    with jax.named_scope("cpu_scale"):
        terms = (gradient * x).reshape(-1, x.shape[-1])
        ones = jnp.ones((1, terms.shape[0]), terms.dtype)
        # In place of a float32 sum, so no fewer bits than that has.
        return jnp.matmul(ones, terms, precision=jax.lax.Precision.HIGHEST)[0]


@jax.custom_vjp
def scaled(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x * weight` over the last axis, [..., D] and [D], float32 both."""
    return definition(x, weight)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return definition(x, weight), (x, weight)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    summed = jax.lax.platform_dependent(gradient, x, cpu=_sum_as_product, default=_sum_over_rows)
    return gradient * weight, summed


scaled.defvjp(_forward, _backward)
