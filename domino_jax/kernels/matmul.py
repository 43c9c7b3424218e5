"""Products with weights stored [out, in].

Training multiplies thousands of rows by each, which every compiler does well. Verifying a drafted
block multiplies K of them: its price is reading the weight, if the product is laid out for that.

    many rows               x [rows, in] . W^T [in, out]      = [rows, out]
    few rows, on a CPU      W [out, in]  . x^T [in, 2^n]      = [out, 2^n], transposed and cut
"""

import functools
import math

import jax
import jax.numpy as jnp

# Up to so many rows a product costs what reading its weight costs.
FEW_ROWS = 16


def definition(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight.T`, [..., in] and [out, in] -> [..., out]; `dtype` as in `linear`."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)


def _as_columns(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """For a CPU: the weight as the left factor, which XLA streams faster than as the right one."""
    with jax.named_scope("cpu_few_rows"):
        rows = math.prod(x.shape[:-1])
        # Its kernels are for 2, 4, 8 or 16 columns.
        padding = (1 << (rows - 1).bit_length()) - rows
        columns = jnp.pad(x.reshape(rows, -1), ((0, padding), (0, 0)))
        product = jnp.einsum("oi,ri->or", weight, columns, preferred_element_type=dtype)
        # Without the barrier XLA would transpose the product again.
        product = jax.lax.optimization_barrier(product).T[:rows]
        return product.reshape(*x.shape[:-1], -1)


def _has_few_rows(x: jax.Array) -> bool:
    return 1 < math.prod(x.shape[:-1]) <= FEW_ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    if not _has_few_rows(x):
        return definition(x, weight, dtype)
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_as_columns, dtype=dtype),
        default=functools.partial(definition, dtype=dtype),
    )


def _product_forward(
    x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight, dtype), (x, weight)


def _product_backward(
    dtype: jnp.dtype | None, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # In the type of the operands: a float32 cotangent would make float32 products, at a fraction of
    # the speed.
    x, _ = saved
    _, vjp = jax.vjp(definition, *saved)
    return vjp(cotangent.astype(x.dtype))


_product.defvjp(_product_forward, _product_backward)


def linear(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ weight.T`.

    Args:
        x: [..., in].
        weight: [out, in], of the type of `x`.
        dtype: of the result and of its sums; the type of `x` when not given.
    Returns:
        [..., out]. Gradients are products in the type of `x`.
    """
    # A result of another type has a cotangent of that type, which only `_product` casts back.
    if _has_few_rows(x) or dtype not in (None, x.dtype):
        return _product(x, weight, dtype)
    return definition(x, weight, dtype)


def vocabulary_logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """Logits in float32 whatever the compute dtype, [..., D] and [V, D] -> [..., V]."""
    return linear(hidden, weight.astype(hidden.dtype), dtype=jnp.float32)
