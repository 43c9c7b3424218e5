"""The cache of keys and values; one operation both writes and reads it.

    slots of a row    0 1 2 3 4 5 6 7     a pass over T = 2 tokens from position 4 writes 4 and 5,
    holding           p p p p n n s s     and its queries see 0..4 and 0..5: past, new, never stale

Rewinding is implicit: a slot at or after a pass's first position is overwritten or masked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.config.model import DecoderShape
from domino_jax.kernels import causal_attention


class Cache(NamedTuple):
    """Keys and values of one layer, both [B, KV, S, head_dim]; slot j holds position j of a row."""

    keys: jax.Array
    values: jax.Array


def _written(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    new = new.astype(cache.dtype)
    # A vmap of the update becomes a scatter, which costs more than the slice that one row needs.
    if cache.shape[0] == 1:
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, start[0], 0))

    def written(row: jax.Array, run: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, run, (0, at, 0))

    return jax.vmap(written)(cache, new, start)


def write(cache: Cache, keys: jax.Array, values: jax.Array, start: jax.Array) -> Cache:
    """The cache with a further run of positions in each row.

    Args:
        cache: of S slots.
        keys: [B, KV, T, head_dim], T <= S.
        values: like `keys`.
        start: int32 [B], where each row's run begins; `start + T <= S` must hold.
    Returns:
        The cache with the run at `start .. start + T - 1` of each row, in its own type.
    """
    return Cache(_written(cache.keys, keys, start), _written(cache.values, values, start))


def cached_attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, cache: Cache, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Writes a run of positions and attends from it to everything up to each of them.

    Args:
        q: [B, H, T, head_dim].
        keys: [B, KV, T, head_dim] of the same positions, KV divides H.
        values: like `keys`.
        cache: of S slots, which hold every earlier position.
        start: int32 [B], the first position of each row's run; `start + T <= S` must hold.
    Returns:
        [B, H, T, head_dim] in the type of `q`, and the cache with the run.
    """
    # Written first: the run sees itself in the cache, as it sees everything before it.
    cache = write(cache, keys, values, start)
    positions = start[:, None] + jnp.arange(q.shape[2])
    mask = jnp.arange(cache.keys.shape[2]) <= positions[:, :, None]
    return causal_attention.definition(q, *cache, mask=mask), cache


def empty_cache(cfg: DecoderShape, *, batch: int, cache_len: int) -> Cache:
    """One layer's cache of zeros, [batch, KV, slots, head_dim] twice in the compute dtype."""
    # Zeros, and not whatever is there: a masked slot has the weight 0, but 0 times NaN is NaN.
    shape = (batch, cfg.num_key_value_heads, cache_len, cfg.head_dim)
    return Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
