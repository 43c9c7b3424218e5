"""The place of the largest logit, which greedy decoding commits and a prediction is counted by.

On a CPU XLA's argmax is ten times slower than a maximum.

    logits    [ . . . . | . . 9 . | . . . . ]    on a CPU: in groups, whose largest are compared
    group                    1                   first, then the place inside the group that won
"""

import math

import jax
import jax.numpy as jnp


def definition(logits: jax.Array) -> jax.Array:
    """The first of the largest logits, [..., V] -> int32 [...]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _by_groups(logits: jax.Array) -> jax.Array:
    """For a CPU: the group that holds the largest logit first, then its place in there.

    XLA takes a maximum at the speed of memory there, but an argmax ten times slower.
    """
    size = logits.shape[-1]
    # Near the square root both argmaxes are short; a divisor, so that no group is filled up.
    groups = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if groups == 1:
        return definition(logits)
    with jax.named_scope("cpu_largest"):
        grouped = logits.reshape(*logits.shape[:-1], groups, size // groups)
        # The first of the groups that hold the largest, then the first in it: the first of all.
        group = jnp.argmax(jnp.max(grouped, axis=-1), axis=-1)
        inside = jnp.take_along_axis(grouped, group[..., None, None], axis=-2)[..., 0, :]
        return (group * (size // groups) + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def argmax(logits: jax.Array) -> jax.Array:
    """The first of the largest logits, [..., V] -> int32 [...]; no gradient flows through it."""
    logits = jax.lax.stop_gradient(logits)
    return jax.lax.platform_dependent(logits, cpu=_by_groups, default=definition)
