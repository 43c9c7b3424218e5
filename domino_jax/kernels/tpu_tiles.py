"""How block attention is cut for a TPU, and which tiles of the context are worth reading.

A kernel's grid is fixed when it is compiled, so both axes are cut into tiles of one size and filled
up. Which of them some query sees is known on the device alone: the kernel gets a list.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.operands import ContextSpan, Operands

LANES = 128  # of a vector register: queries and keys of a tile come in multiples of it


@dataclass(frozen=True)
class KernelTile:
    """Queries and keys of one tile of scores, and the context whose gradient stays in memory.

    `queries` is a wish: a tile holds whole blocks and a multiple of `LANES` queries.
    """

    queries: int = 512
    keys: int = 512
    context: int = 4096


TILE = KernelTile()


@dataclass(frozen=True)
class Cut:
    """`tiles` of `blocks` or `queries`; `parts` of the context, `part_tiles` of `keys` each."""

    blocks: int
    queries: int
    keys: int
    tiles: int
    parts: int
    part_tiles: int


def cut_of(operands: Operands, size: KernelTile) -> Cut:
    """The cut of a call; both axes are filled up to whole tiles."""
    blocks, block_queries = operands.queries.shape[2:4]
    length = operands.keys.shape[2]
    unit = LANES // math.gcd(LANES, block_queries)  # the fewest blocks that fill registers
    wished = size.queries // (unit * block_queries)
    tile_blocks = unit * max(min(wished, -(-blocks // unit)), 1)
    keys = min(size.keys, -(-length // LANES) * LANES)
    key_tiles = -(-length // keys)
    # A part is what the backward pass holds the gradient of; it cannot be less than a tile.
    parts = -(-key_tiles * keys // max(size.context, keys))
    return Cut(
        blocks=tile_blocks,
        queries=tile_blocks * block_queries,
        keys=keys,
        tiles=-(-blocks // tile_blocks),
        parts=parts,
        part_tiles=-(-key_tiles // parts),
    )


class SeenTiles(NamedTuple):
    """The key tiles that some query of a tile sees, flat, as a scalar memory wants them.

    `order` int32 [B * parts * tiles * part_tiles] holds the seen ones first; `counts` int32
    [B * parts * tiles].
    """

    order: jax.Array
    counts: jax.Array


def seen_tiles(span: ContextSpan, cut: Cut) -> SeenTiles:
    """Which key tiles are worth reading; arrays of tiles, not of positions."""
    batch, blocks = span.end.shape[:2]

    def by_tile(x: jax.Array) -> jax.Array:  # [B, N, Q] -> [B, tiles, queries, 1]
        x = jnp.pad(x, ((0, 0), (0, cut.tiles * cut.blocks - blocks), (0, 0)))
        return x.reshape(batch, cut.tiles, -1, 1)

    shape = jnp.broadcast_shapes(span.first.shape, span.end.shape)
    first, end = (by_tile(jnp.broadcast_to(x, shape)) for x in span)
    begin = jnp.arange(cut.parts * cut.part_tiles) * cut.keys
    # A span may be empty inside a tile: a block at its document's first token needs none of it.
    seen = jnp.any((first < end) & (first < begin + cut.keys) & (end > begin), axis=2)
    seen = seen.reshape(batch, cut.tiles, cut.parts, cut.part_tiles).swapaxes(1, 2)
    # A list, since windows leave holes between a begin and a stop; a stable sort keeps its order.
    order = jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32)
    return SeenTiles(order.reshape(-1), jnp.sum(seen, axis=-1, dtype=jnp.int32).reshape(-1))
