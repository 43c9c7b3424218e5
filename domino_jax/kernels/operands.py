"""The arrays that every implementation of block attention takes and saves.

Queries that look at the same keys lie together: of one key-value head and block, group by group.

    queries [..., G*K, head_dim]     g0 k0, g0 k1, .., g1 k0, g1 k1, ..    for one head and block n
    own keys [..., K, head_dim]      k0, k1, ..                            of the same block
    context [..., S, head_dim]       j0, j1, j2, ..                        of all blocks of a row
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)


class ContextSpan(NamedTuple):
    """The context positions j that a query of a block sees, `first <= j < end`.

    Both int32 [B, N, Q]; Q is 1 where all queries of a block see the same, and K for `first` with a
    window.
    """

    first: jax.Array
    end: jax.Array


class Operands(NamedTuple):
    """What looks at the same keys lies together, so that every product is a plain one.

    `queries` [B, KV, N, G*K, head_dim]; `keys` and `values` [B, KV, S, head_dim] of the context,
    `own_keys` and `own_values` [B, KV, N, K, head_dim] of the blocks.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    own_keys: jax.Array
    own_values: jax.Array


class Saved(NamedTuple):
    """What the backward pass reads: operands, span, merged output and its one log-sum-exp.

    `out` [B, KV, N, G*K, head_dim], `log_sum` float32 [B, KV, N, G*K, 1].
    """

    operands: Operands
    span: ContextSpan
    out: jax.Array
    log_sum: jax.Array
