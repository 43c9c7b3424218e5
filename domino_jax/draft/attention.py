"""Attention of draft blocks over the context before their anchor and over themselves, without a dense mask.

The context is read tile by tile, and only where some query of a tile of blocks looks: anchors are sorted, so a tile
stops at its largest one. Scores live for one tile at a time, forward and backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.draft.mask import ContextSpan

# Rows of queries and columns of keys of one tile of scores, at most. Measured on CPU; small enough for its caches.
TILE_ROWS, TILE_KEYS = 768, 512
LOWEST = float(jnp.finfo(jnp.float32).min)


class ContextOutput(NamedTuple):
    """Attention over the context alone: `heads` float32 [..., head_dim], the logarithm of the softmax's sum [..., 1].

    A query that sees no context has zeros and `LOWEST / 2`.
    """

    heads: jax.Array
    log_sum: jax.Array


def block_attention(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    *,
    span: ContextSpan,
    causal: bool = False,
) -> jax.Array:
    """One joint softmax over the context and the query's own block: scores of width S + K, not S + N*K.

    Args:
        q: [B, H, N*K, head_dim].
        context: keys and values of the context, two [B, KV, S, head_dim].
        own: keys and values of the blocks, two [B, KV, N*K, head_dim].
        span: the context that each block, or each of its queries, sees (`context_span`).
        causal: whether a query sees only its own and earlier positions of its block.
    Returns:
        [B, H, N*K, head_dim] in the type of `q`; scores and softmax are float32.
    Source: DFlash (arXiv:2602.06036), section 4.2; equal to `grouped_attention` under `block_mask`.
    """
    batch, heads, queries, width = q.shape
    kv_heads, blocks = context[0].shape[1], span.end.shape[1]
    groups, size = heads // kv_heads, queries // blocks

    def by_block(x: jax.Array) -> jax.Array:  # [B, KV * x, N * K, head_dim] -> [B, KV, N, x * K, head_dim]
        x = x.reshape(batch, kv_heads, -1, blocks, size, width).swapaxes(2, 3)
        return x.reshape(batch, kv_heads, blocks, -1, width)

    # Whatever looks at the same keys lies together, so that every product is a plain one.
    rows, (own_keys, own_values) = by_block(q), map(by_block, own)
    near = jnp.einsum("bknrd,bkncd->bknrc", rows, own_keys, preferred_element_type=jnp.float32) * width**-0.5
    if causal:
        near = near.reshape(batch, kv_heads, blocks, groups, size, size)
        near = jnp.where(jnp.tri(size, dtype=bool), near, LOWEST).reshape(*rows.shape[:-1], size)

    far = context_attention(rows, *context, span, groups)
    # The own block is never empty, so the largest of both is a real score.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(near, axis=-1, keepdims=True), far.log_sum))
    near, far_sum = jnp.exp(near - largest), jnp.exp(far.log_sum - largest)
    out = jnp.einsum("bknrc,bkncd->bknrd", near.astype(q.dtype), own_values, preferred_element_type=jnp.float32)
    out = (out + far_sum * far.heads) / (far_sum + jnp.sum(near, axis=-1, keepdims=True))
    out = out.astype(q.dtype).reshape(batch, kv_heads, blocks, groups, size, width)
    return out.swapaxes(2, 3).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def context_attention(
    rows: jax.Array, keys: jax.Array, values: jax.Array, span: ContextSpan, groups: int
) -> ContextOutput:
    """Softmax attention of block queries over the part of the context that they see.

    Args:
        rows: [B, KV, N, G*K, head_dim], the queries of a block that share a key head together.
        keys: [B, KV, S, head_dim].
        values: [B, KV, S, head_dim].
        span: what each query sees.
        groups: G, query heads per key head.
    Returns:
        `ContextOutput` of [B, KV, N, G*K, ...]. The backward pass makes the scores again, tile by tile.
    Source: the online softmax of FlashAttention (arXiv:2205.14135).
    """
    return _forward(rows, keys, values, span, groups)[0]


class _Tile(NamedTuple):
    """Some blocks' queries [B, KV, rows, head_dim], the span of each row, and the key tiles from `begin` to `stop`."""

    queries: jax.Array
    first: jax.Array
    end: jax.Array
    begin: jax.Array
    stop: jax.Array


def _tiles(rows: jax.Array, span: ContextSpan, groups: int, tile_keys: int) -> _Tile:
    """All tiles, stacked in front; blocks that fill up the last one see nothing."""
    queries = _in_tiles(rows)
    first, end = (_in_tiles(_per_row(x, rows.shape[3], groups)) for x in span)
    seen = end > first
    begin = jnp.min(jnp.where(seen, first, jnp.iinfo(jnp.int32).max), axis=(1, 2, 3, 4)) // tile_keys
    stop = -(-jnp.max(jnp.where(seen, end, 0), axis=(1, 2, 3, 4)) // tile_keys)
    return _Tile(queries, first, end, begin, stop)


def _per_row(x: jax.Array, rows: int, groups: int) -> jax.Array:  # [B, N, 1 or K] -> [B, 1, N, G * K, 1]
    return jnp.tile(jnp.broadcast_to(x, (*x.shape[:2], rows // groups)), (1, 1, groups))[:, None, ..., None]


def _in_tiles(x: jax.Array) -> jax.Array:  # [B, KV, N, r, d] -> [tiles, B, KV, blocks * r, d]
    batch, heads, blocks, rows, width = x.shape
    size = max(min(TILE_ROWS // rows, blocks), 1)
    count = -(-blocks // size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - blocks), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, heads, count, size * rows, width), 2, 0)


def _from_tiles(x: jax.Array, blocks: int, rows: int) -> jax.Array:  # and back
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, rows, x.shape[-1])[:, :, :blocks]


def _key_tile(tile: _Tile, index: jax.Array, context: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Where a tile of keys begins, which of them each row sees, and the tile of each array [B, KV, S, head_dim]."""
    length = context[0].shape[2]
    size = min(TILE_KEYS, length)
    begin = jnp.minimum(index * size, length - size)  # the last one overlaps the one before
    columns = begin + jnp.arange(size, dtype=jnp.int32)
    seen = (jnp.maximum(tile.first, index * size) <= columns) & (columns < tile.end)  # [B, 1, rows, size]
    return begin, seen, *(jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2) for x in context)


def _add_at(sums: jax.Array, new: jax.Array, begin: jax.Array) -> jax.Array:  # [B, KV, head_dim, S] and a tile of it
    old = jax.lax.dynamic_slice_in_dim(sums, begin, new.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + new, begin, axis=3)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _forward(
    rows: jax.Array, keys: jax.Array, values: jax.Array, span: ContextSpan, groups: int
) -> tuple[ContextOutput, tuple]:
    scale = rows.shape[-1] ** -0.5
    shape = (*rows.shape[:2], _in_tiles(rows).shape[3])

    def of_tile(tile: _Tile) -> ContextOutput:
        def add(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            largest, total, out = carry
            _, seen, near_keys, near_values = _key_tile(tile, index, (keys, values))
            scores = jnp.where(seen, _product("bkrd,bksd->bkrs", tile.queries, near_keys) * scale, LOWEST)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - new), jnp.exp(largest - new)
            total = kept * total + jnp.sum(weights, axis=-1, keepdims=True)
            return new, total, kept * out + _product("bkrs,bksd->bkrd", weights.astype(rows.dtype), near_values)

        # Half the lowest: a row that sees nothing of a tile takes exp(LOWEST / 2) = 0 from it, not exp(0).
        start = (jnp.full((*shape, 1), LOWEST / 2), jnp.zeros((*shape, 1)), jnp.zeros((*shape, rows.shape[-1])))
        largest, total, out = jax.lax.fori_loop(tile.begin, tile.stop, add, start)
        some = jnp.where(total > 0, total, 1.0)
        return ContextOutput(out / some, largest + jnp.log(some))

    tiles = _tiles(rows, span, groups, min(TILE_KEYS, keys.shape[2]))
    out = jax.lax.map(of_tile, tiles)
    whole = jax.tree.map(lambda x: _from_tiles(x, *rows.shape[2:4]), out)
    return whole, (rows, keys, values, span, whole)


def _backward(groups: int, saved: tuple, cotangent: ContextOutput) -> tuple:
    rows, keys, values, span, out = saved
    scale = rows.shape[-1] ** -0.5
    # d loss / d score = weight * (d loss / d weight - slope).
    slope = jnp.sum(cotangent.heads * out.heads, axis=-1, keepdims=True) - cotangent.log_sum

    def of_tile(sums: tuple[jax.Array, jax.Array], item: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tile, log_sum, slope, heads = item
        # Turned round once here, and the sums at the end: XLA on CPU is slow where a product sums over first axes.
        turned_queries, turned_heads = (x.swapaxes(2, 3) for x in (tile.queries, heads))

        def add(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            queries_gradient, *gradients = carry
            begin, seen, near_keys, near_values = _key_tile(tile, index, (keys, values))
            scores = _product("bkrd,bksd->bkrs", tile.queries, near_keys) * scale
            weights = jnp.where(seen, jnp.exp(scores - log_sum), 0.0)
            slopes = weights * (_product("bkrd,bksd->bkrs", heads, near_values) - slope) * scale
            slopes, weights = slopes.astype(rows.dtype), weights.astype(rows.dtype)
            queries_gradient += _product("bkrs,bksd->bkrd", slopes, near_keys)
            new = (
                _product("bkdr,bkrs->bkds", turned_queries, slopes),
                _product("bkdr,bkrs->bkds", turned_heads, weights),
            )
            return queries_gradient, *(_add_at(x, x_new, begin) for x, x_new in zip(gradients, new, strict=True))

        start = (jnp.zeros(tile.queries.shape, jnp.float32), *sums)
        queries_gradient, keys_sum, values_sum = jax.lax.fori_loop(tile.begin, tile.stop, add, start)
        return (keys_sum, values_sum), queries_gradient

    tiles = _tiles(rows, span, groups, min(TILE_KEYS, keys.shape[2]))
    parts = (out.log_sum, slope, cotangent.heads.astype(rows.dtype))
    zeros = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
    sums, queries_gradient = jax.lax.scan(of_tile, (zeros, zeros), (tiles, *map(_in_tiles, parts)))
    queries_gradient = _from_tiles(queries_gradient, *rows.shape[2:4]).astype(rows.dtype)
    keys_gradient, values_gradient = (x.swapaxes(2, 3).astype(keys.dtype) for x in sums)
    return queries_gradient, keys_gradient, values_gradient, None


context_attention.defvjp(_forward, _backward)
