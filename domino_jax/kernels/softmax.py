"""The largest of a row of logits, its place and the sum of exponentials, in one pass.

One reduction carries all three, on each part of a split vocabulary first:

    logits [V]       v0 v1 v2 | v3 v4 v5 | ..    one part a device
    triples          (largest, total, place) of each part, then merged into one
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.argmax import argmax
from domino_jax.sharding import axis_size


class SoftmaxSums(NamedTuple):
    """Of rows of logits [..., V], what makes a softmax of them.

    `maximum` and `total`, the sum of `exp(logit - largest)`, float32 [...], and `argmax` int32
    [...], the first place of the largest.
    """

    maximum: jax.Array
    total: jax.Array
    argmax: jax.Array


def definition(logits: jax.Array) -> SoftmaxSums:
    """One after the other; what a CPU does best too, with its own way to find the place."""
    maximum = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - maximum[..., None]), axis=-1)
    return SoftmaxSums(maximum, total, argmax(logits))


def in_one_pass(logits: jax.Array) -> SoftmaxSums:
    """A reduction that carries all three; exact up to the order of the sum.

    Source: online normalizer calculation for softmax (arXiv:1805.02867).
    """
    # Each device of a split vocabulary makes its own three, which are merged last: these are
    # gathered, the logits never.
    parts = axis_size("vocab")
    parts = parts if logits.shape[-1] % parts == 0 else 1
    logits = logits.reshape(*logits.shape[:-1], parts, -1)
    argmax = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    argmax += logits.shape[-1] * jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 2)
    sums = SoftmaxSums(logits, jnp.ones_like(logits), argmax)
    # The start must change nothing, even merged with itself: lowest minus lowest is 0, where minus
    # infinity would give NaN. Its place comes after all others, so that it never is the first.
    start = SoftmaxSums(
        maximum=jnp.float32(jnp.finfo(jnp.float32).min),
        total=jnp.float32(0),
        argmax=jnp.int32(jnp.iinfo(jnp.int32).max),
    )

    def merge(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left = SoftmaxSums(*left)
        right = SoftmaxSums(*right)
        maximum = jnp.maximum(left.maximum, right.maximum)
        left_total = left.total * jnp.exp(left.maximum - maximum)
        right_total = right.total * jnp.exp(right.maximum - maximum)
        total = left_total + right_total
        # On a tie the lower place, since a reduction merges in any order.
        above = left.maximum > right.maximum
        tie = left.maximum == right.maximum
        first = above | (tie & (left.argmax < right.argmax))
        return maximum, total, jnp.where(first, left.argmax, right.argmax)

    for axis in (logits.ndim - 1, logits.ndim - 2):
        sums = SoftmaxSums(*jax.lax.reduce(tuple(sums), tuple(start), merge, (axis,)))
    return sums


def softmax_sums(logits: jax.Array) -> SoftmaxSums:
    """`SoftmaxSums` of float32 [..., V]; not differentiable."""
    return jax.lax.platform_dependent(logits, cpu=definition, default=in_one_pass)
