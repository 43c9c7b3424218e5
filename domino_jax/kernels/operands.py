"""What the forms of block attention share: their operands, what a query sees, what the backward pass reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)


class ContextSpan(NamedTuple):
    """The context positions j that a query of a block sees, `first <= j < end`.

    Both int32 [B, N, Q]; Q is 1 where all queries of a block see the same, and K for `first` with a window.
    """

    first: jax.Array
    end: jax.Array


class Operands(NamedTuple):
    """What looks at the same keys lies together, so that every product is a plain one.

    `queries` [B, KV, N, G*K, head_dim]; `keys` and `values` [B, KV, S, head_dim] of the context, `own_keys` and
    `own_values` [B, KV, N, K, head_dim] of the blocks.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    own_keys: jax.Array
    own_values: jax.Array


class Saved(NamedTuple):
    """What the backward pass reads: operands and span, and the merged output with its one log-sum-exp."""

    operands: Operands
    span: ContextSpan
    out: jax.Array
    log_sum: jax.Array
