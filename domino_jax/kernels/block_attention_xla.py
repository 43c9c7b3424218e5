"""Block attention by tiles of plain products, which run on every platform, forward and backward.

Anchors are sorted: a tile of neighbouring blocks ends its walk over the context at its largest
anchor.

    key tiles    0   1   2   3   4     a walk ends where the tile's own queries say: a loop whose
    blocks 0-7   x   x   .   .   .     length the device only knows when it runs. Where that costs
    blocks 8-15  x   x   x   x   .     (a GPU waits for the answer), a tile of keys is the whole
                                       context and nothing is walked.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.operands import LOWEST, ContextSpan, Operands, Saved


@dataclass(frozen=True)
class TileSize:
    """The queries and the keys that one tile of scores has at most.

    `mib` bounds its float32 scores of all key-value heads. Each head of a group has queries of its
    own.
    """

    queries: int
    keys: int
    mib: int | None = None

    def within_memory(self, operands: Operands) -> "TileSize":
        """The same with no more queries than the MiB allow."""
        if self.mib is None:
            return self
        heads, length = operands.keys.shape[1:3]
        query_bytes = 4 * heads * min(self.keys, length)
        return replace(self, queries=min(self.queries, self.mib * 2**20 // query_bytes))


TILE = TileSize(queries=768, keys=512)  # a tile of scores, 1.5 MiB, stays in a core's cache
# For a GPU: the fewer launches the better, as far as memory goes; the backward pass holds twice as
# many scores. With Qwen3-8B's heads, S 3072, N 512 and K 16 that is 3 tiles and 5.
WHOLE_CONTEXT = TileSize(queries=2**30, keys=2**30, mib=1026)
WHOLE_CONTEXT_BACKWARD = replace(WHOLE_CONTEXT, mib=618)


class _Softmax(NamedTuple):
    """A softmax under way.

    Largest score and sum of exponentials [..., 1], weighted values [..., head_dim].
    """

    largest: jax.Array
    total: jax.Array
    out: jax.Array


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _own_scores(operands: Operands, causal: bool) -> jax.Array:  # [B, KV, N, G*K, K]
    scores = _product("bknrd,bkncd->bknrc", operands.queries, operands.own_keys)
    scores *= operands.queries.shape[-1] ** -0.5
    if not causal:
        return scores
    queries, size = scores.shape[-2:]
    # The queries of a block go through its positions once for each head of the group.
    seen = jnp.tile(jnp.tri(size, dtype=bool), (queries // size, 1))
    return jnp.where(seen, scores, LOWEST)


class _Tiles(NamedTuple):
    """The queries in tiles, [B * tiles, KV, queries, head_dim], and where each tile walks.

    `first` and `end` [B * tiles, 1, queries, 1] are the span of each, `sequence` [B * tiles] is the
    one of the batch that a tile belongs to, and `begin` to `stop` are the key tiles that some query
    of it sees.
    """

    queries: jax.Array
    first: jax.Array
    end: jax.Array
    sequence: jax.Array
    begin: jax.Array
    stop: jax.Array


def _tiles(operands: Operands, span: ContextSpan, size: TileSize) -> _Tiles:
    block_queries = operands.queries.shape[3]
    queries = _in_tiles(operands.queries, size)

    def per_query(x: jax.Array) -> jax.Array:  # [B, N, 1 or K] -> [B, 1, N, G * K, 1]
        return jnp.tile(x, (1, 1, block_queries // x.shape[2]))[:, None, ..., None]

    first, end = (_in_tiles(per_query(x), size) for x in span)
    tiles = queries.shape[0] // operands.queries.shape[0]
    sequence = jnp.arange(queries.shape[0]) // tiles
    keys = min(size.keys, operands.keys.shape[2])
    # Of this tile alone: a long sequence must not make the short ones of its batch walk its length.
    # One that sees nothing begins after its stop, so that its loop has no turn.
    seen = end > first
    lowest = jnp.where(seen, first, jnp.iinfo(jnp.int32).max)
    begin = jnp.min(lowest, axis=(1, 2, 3)) // keys
    highest = jnp.where(seen, end, 0)
    stop = -(-jnp.max(highest, axis=(1, 2, 3)) // keys)
    return _Tiles(queries, first, end, sequence, begin, stop)


# [B, KV, N, r, d] -> [B * tiles, KV, n * r, d]
def _in_tiles(x: jax.Array, size: TileSize) -> jax.Array:
    batch, heads, blocks, block_queries, width = x.shape
    tile_blocks = max(min(size.queries // block_queries, blocks), 1)
    count = -(-blocks // tile_blocks)
    # Blocks that fill up the last tile see nothing.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * tile_blocks - blocks), (0, 0), (0, 0)))
    tile_queries = tile_blocks * block_queries
    x = x.reshape(batch, heads, count, tile_queries, width).swapaxes(1, 2)
    return x.reshape(batch * count, heads, tile_queries, width)


# And back, to the axes of `like` [B, KV, N, r, _].
def _from_tiles(x: jax.Array, like: jax.Array) -> jax.Array:
    batch, heads, blocks, block_queries, _ = like.shape
    x = x.reshape(batch, -1, heads, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(batch, heads, -1, block_queries, x.shape[-1])[:, :, :blocks]


def _walk(
    tile: _Tiles, add: Callable[[Any, Any], Any], start: Any, *, operands: Operands, size: TileSize
) -> Any:
    """Adds up over the key tiles that a tile of queries sees.

    Over the one that is the whole context without a loop.
    """
    if size.keys >= operands.keys.shape[2]:
        return add(0, start)
    return jax.lax.fori_loop(tile.begin, tile.stop, add, start)


@dataclass(frozen=True)
class _KeyTile:
    """A tile of keys and values [KV, size, head_dim], where it begins, and the bound of each score.

    `bound` is [1, queries, size]. A score that its query does not see is bounded by the lowest
    number, any other by the highest. (A choice between scores and a constant would have XLA write
    out that constant for a whole tile of all heads.)
    """

    begin: jax.Array
    bound: jax.Array
    keys: jax.Array
    values: jax.Array


def _key_tile(tile: _Tiles, index: jax.Array, operands: Operands, size: TileSize) -> _KeyTile:
    _, heads, length, width = operands.keys.shape
    count = min(size.keys, length)
    # A slice cannot reach past the end, so the last tile overlaps the one before. The keys that
    # both hold are counted there: `seen` asks for columns of this tile alone.
    begin = jnp.minimum(index * count, length - count)
    columns = begin + jnp.arange(count, dtype=jnp.int32)
    seen = (jnp.maximum(tile.first, index * count) <= columns) & (columns < tile.end)

    def part(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (tile.sequence, 0, begin, 0), (1, heads, count, width))[0]

    bound = jnp.where(seen, -LOWEST, LOWEST)
    return _KeyTile(begin, bound, part(operands.keys), part(operands.values))


def forward(
    operands: Operands, span: ContextSpan, *, causal: bool, size: TileSize
) -> tuple[jax.Array, jax.Array]:
    """The online softmax over the own block and then over tiles of the context.

    It begins with the own block, which is never empty.

    Returns:
        The output [B, KV, N, G*K, head_dim] and the log-sum-exp of its scores, float32 [..., 1].
    Source: FlashAttention (arXiv:2205.14135).
    """
    size = size.within_memory(operands)
    scale = operands.queries.shape[-1] ** -0.5
    dtype = operands.queries.dtype
    near = _own_scores(operands, causal)
    largest = jnp.max(near, axis=-1, keepdims=True)
    weights = jnp.exp(near - largest)
    out = _product("bknrc,bkncd->bknrd", weights.astype(dtype), operands.own_values)
    own = _Softmax(largest, jnp.sum(weights, axis=-1, keepdims=True), out)

    def of_tile(item: tuple[_Tiles, _Softmax]) -> tuple[jax.Array, jax.Array]:
        tile, own = item

        def add(index: jax.Array, carry: _Softmax) -> _Softmax:
            key_tile = _key_tile(tile, index, operands, size)
            scores = _product("krd,ksd->krs", tile.queries, key_tile.keys) * scale
            scores = jnp.minimum(scores, key_tile.bound)
            largest = jnp.maximum(carry.largest, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - largest)
            kept = jnp.exp(carry.largest - largest)
            total = kept * carry.total + jnp.sum(weights, axis=-1, keepdims=True)
            out = _product("krs,ksd->krd", weights.astype(dtype), key_tile.values)
            return _Softmax(largest, total, kept * carry.out + out)

        softmax = _walk(tile, add, own, operands=operands, size=size)
        # Queries that fill up a tile hold nothing, and are cut off below.
        total = jnp.where(softmax.total > 0, softmax.total, 1.0)
        out = (softmax.out / total).astype(dtype)
        return out, softmax.largest + jnp.log(total)

    tiles = _tiles(operands, span, size)
    own_tiles = jax.tree.map(lambda x: _in_tiles(x, size), own)
    out, log_sum = jax.lax.map(of_tile, (tiles, own_tiles))
    return _from_tiles(out, operands.queries), _from_tiles(log_sum, operands.queries)


# Gradients of the context's keys and values, summed over tiles of queries.
_ContextSums = tuple[jax.Array, jax.Array]


def _add_tile(
    sums: _ContextSums,
    item: tuple[_Tiles, jax.Array, jax.Array, jax.Array],
    *,
    operands: Operands,
    size: TileSize,
    transposed: bool,
) -> tuple[_ContextSums, jax.Array]:
    """The sums with a tile of queries added, and the gradient of those queries.

    `item` is the tile, the log-sum-exp of its scores, its sum of cotangent times output, and its
    cotangent, [KV, queries, _] each.
    """
    tile, log_sum, slope, cotangent = item
    scale = tile.queries.shape[-1] ** -0.5
    dtype = tile.queries.dtype
    axis = 3 if transposed else 2  # of the positions in the sums
    by_query = tile.queries
    by_output = cotangent
    if transposed:
        with jax.named_scope("cpu_transposed"):
            by_query = tile.queries.swapaxes(1, 2)
            by_output = cotangent.swapaxes(1, 2)
    equation = "kdr,krs->kds" if transposed else "krd,krs->ksd"

    def add(
        index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        queries, keys, values = carry
        key_tile = _key_tile(tile, index, operands, size)
        scores = _product("krd,ksd->krs", tile.queries, key_tile.keys) * scale
        weights = jnp.exp(jnp.minimum(scores, key_tile.bound) - log_sum)
        slopes = _product("krd,ksd->krs", cotangent, key_tile.values)
        slopes = (weights * (slopes - slope) * scale).astype(dtype)
        queries += _product("krs,ksd->krd", slopes, key_tile.keys)
        at: list[Any] = [tile.sequence, 0, 0, 0]
        at[axis] = key_tile.begin

        def added(total: jax.Array, factor: jax.Array, of_keys: jax.Array) -> jax.Array:
            new = _product(equation, factor, of_keys)[None]
            old = jax.lax.dynamic_slice(total, at, new.shape)
            return jax.lax.dynamic_update_slice(total, old + new, at)

        weights = weights.astype(dtype)
        return queries, added(keys, by_query, slopes), added(values, by_output, weights)

    start = (jnp.zeros(tile.queries.shape, jnp.float32), *sums)
    queries, keys, values = _walk(tile, add, start, operands=operands, size=size)
    return (keys, values), queries


def backward(
    saved: Saved, cotangent: jax.Array, *, causal: bool, size: TileSize, transposed: bool
) -> Operands:
    """The gradients, with scores recomputed tile by tile.

    With `P = exp(score - log_sum)`, the weights of the one softmax, and `dP` their gradient, a
    score's gradient is `P * (dP - sum(cotangent * out))`, of the context and of the own block
    alike.

    Args:
        saved: of the forward pass.
        cotangent: of the output, [B, KV, N, G*K, head_dim].
        causal: as in `block_attention`.
        size: of the tiles.
        transposed: whether the sums over queries are made of factors transposed beforehand and kept
            transposed ([KV, head_dim, S]), for a CPU, where XLA is slow at products that sum over
            first axes.
    Returns:
        Gradients in the types of the operands.
    """
    operands, span = saved.operands, saved.span
    size = size.within_memory(operands)
    scale = operands.queries.shape[-1] ** -0.5
    dtype = operands.queries.dtype
    slope = jnp.sum(cotangent.astype(jnp.float32) * saved.out, axis=-1, keepdims=True)
    cotangent = cotangent.astype(dtype)

    weights = jnp.exp(_own_scores(operands, causal) - saved.log_sum)
    slopes = _product("bknrd,bkncd->bknrc", cotangent, operands.own_values)
    slopes = (weights * (slopes - slope) * scale).astype(dtype)
    own_queries = _product("bknrc,bkncd->bknrd", slopes, operands.own_keys)
    own_keys = _product("bknrc,bknrd->bkncd", slopes, operands.queries)
    own_values = _product("bknrc,bknrd->bkncd", weights.astype(dtype), cotangent)

    shape = operands.keys.swapaxes(2, 3).shape if transposed else operands.keys.shape
    # Float32: every tile of queries adds to them, which bfloat16 sums would round each time.
    zeros = jnp.zeros(shape, jnp.float32)
    figures = (_in_tiles(x, size) for x in (saved.log_sum, slope, cotangent))
    add_tile = functools.partial(_add_tile, operands=operands, size=size, transposed=transposed)
    tiles = (_tiles(operands, span, size), *figures)
    sums, queries = jax.lax.scan(add_tile, (zeros, zeros), tiles)
    keys, values = (x.swapaxes(2, 3) if transposed else x for x in sums)
    queries = _from_tiles(queries, operands.queries) + own_queries
    gradients = Operands(queries, keys, values, own_keys, own_values)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands)
