"""Block attention on a TPU, where plain products would read and multiply keys that no query sees.

One Pallas kernel a direction reads only the key tiles that its queries see:

    queries   [KV, N*G*K, head_dim]   in tiles of whole blocks; anchors are sorted, so a tile's
                                      blocks see much the same
    own keys  [KV, N*K, head_dim]     one tile beside each tile of queries, masked to the query's
                                      own block
    context   [KV, S, head_dim]       in tiles; the list of those that a tile of queries sees is
                                      made on the device and prefetched, so that a tile that nobody
                                      sees is neither read nor multiplied

Scores are kept transposed, [keys, queries]: what belongs to a query (its span, largest score, sum,
slope) then lies along lanes, which a TPU broadcasts over the keys for nothing.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from domino_jax.kernels.operands import LOWEST, ContextSpan, Operands, Saved
from domino_jax.kernels.tpu_tiles import TILE, Cut, KernelTile, cut_of, seen_tiles


class _Inputs(NamedTuple):
    """What both kernels read, cut and filled up; figures of queries lie along lanes, [.., 1, n].

    `own_seen` int32 [blocks * K, queries] says which keys of the tile of own keys a query sees, of
    every tile the same.
    """

    queries: Any
    keys: Any
    values: Any
    own_keys: Any
    own_values: Any
    own_seen: Any
    first: Any
    end: Any


def _inputs(operands: Operands, span: ContextSpan, cut: Cut, *, causal: bool) -> _Inputs:
    batch, heads, blocks, block_queries, width = operands.queries.shape
    size = operands.own_keys.shape[3]
    more_blocks = cut.tiles * cut.blocks - blocks
    more_keys = cut.parts * cut.part_tiles * cut.keys - operands.keys.shape[2]

    def by_block(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, more_blocks), (0, 0), (0, 0)))
        return x.reshape(batch, heads, -1, width)

    def by_position(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, more_keys), (0, 0)))

    def by_query(x: jax.Array) -> jax.Array:  # [B, N, 1 or K] -> [B, 1, tiles * queries]
        x = jnp.tile(x, (1, 1, block_queries // x.shape[2]))
        return jnp.pad(x, ((0, 0), (0, more_blocks), (0, 0))).reshape(batch, 1, -1)

    # A block's queries go through its positions once for each head of the group.
    key = np.arange(cut.blocks * size)[:, None]
    query = np.arange(cut.queries)
    own_seen = key // size == query // block_queries
    if causal:
        own_seen &= key % size <= query % size
    return _Inputs(
        by_block(operands.queries),
        by_position(operands.keys),
        by_position(operands.values),
        by_block(operands.own_keys),
        by_block(operands.own_values),
        jnp.asarray(own_seen, jnp.int32),
        by_query(span.first),
        by_query(span.end),
    )


# The grid of both kernels: sequence of the batch, key head, part of the context, tile of queries,
# step of its list. The last runs fastest, so that sums over steps stay in memory.
def _place(cut: Cut) -> jax.Array:
    """Where the lists of this tile of queries stand in `SeenTiles.counts`."""
    return (pl.program_id(0) * cut.parts + pl.program_id(2)) * cut.tiles + pl.program_id(3)


def _by_tile(b: Any, h: Any, p: Any, t: Any, s: Any, *_: Any) -> tuple[Any, ...]:
    return b, h, t, 0


def _by_lane(b: Any, h: Any, p: Any, t: Any, s: Any, *_: Any) -> tuple[Any, ...]:
    return b, h, 0, t


def _in_specs(cut: Cut, inputs: _Inputs) -> _Inputs:
    width = inputs.queries.shape[-1]
    own_shape = inputs.own_seen.shape

    def by_key(b: Any, h: Any, p: Any, t: Any, s: Any, order: Any, counts: Any) -> tuple[Any, ...]:
        # Past the end of the list the tile stays what it was, and is not read again.
        place = (b * cut.parts + p) * cut.tiles + t
        step = jnp.minimum(s, jnp.maximum(counts[place] - 1, 0))
        return b, h, p * cut.part_tiles + order[place * cut.part_tiles + step], 0

    tile = pl.BlockSpec((None, None, cut.queries, width), _by_tile)
    key = pl.BlockSpec((None, None, cut.keys, width), by_key)
    own = pl.BlockSpec((None, None, own_shape[0], width), _by_tile)
    seen = pl.BlockSpec(own_shape, lambda *_: (0, 0))
    query = pl.BlockSpec((None, 1, cut.queries), lambda b, h, p, t, s, *_: (b, 0, t))
    return _Inputs(tile, key, key, own, own, seen, query, query)


def _times_transposed(left: jax.Array, right: jax.Array) -> jax.Array:  # [n, d], [m, d] -> [n, m]
    return _product(left, right, ((1,), (1,)))


def _times(left: jax.Array, right: jax.Array) -> jax.Array:  # [n, m], [m, d] -> [n, d]
    return _product(left, right, ((1,), (0,)))


def _transposed_times(left: jax.Array, right: jax.Array) -> jax.Array:  # [n, a], [n, b] -> [a, b]
    return _product(left, right, ((0,), (0,)))


def _product(left: jax.Array, right: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    # The command sets the precision of all products to "highest", for float32. Mosaic refuses that
    # of bfloat16 operands ("Bad lhs type"), so those say what they want.
    float32 = left.dtype == right.dtype == jnp.float32
    precision = None if float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(left, right, (axes, ((), ())), precision, jnp.float32)


def _seen(at: _Inputs, begin: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which keys of a context tile the queries see, bool [keys, queries]; `begin` is its place."""
    position = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (at.first[...] <= position) & (position < at.end[...])


def _forward_kernel(order: Any, counts: Any, *refs: Any, cut: Cut) -> None:
    at = _Inputs(*refs[:8])
    (out, log_sum, largest, total, summed) = refs[8:]
    place = _place(cut)
    step = pl.program_id(4)
    scale = at.queries.shape[-1] ** -0.5

    # Never empty: the online softmax begins with it.
    @pl.when(step == 0)
    def _own_block() -> None:
        scores = _times_transposed(at.own_keys[...], at.queries[...]) * scale
        scores = jnp.where(at.own_seen[...] != 0, scores, LOWEST)
        largest[...] = jnp.max(scores, axis=0, keepdims=True)
        weights = jnp.exp(scores - largest[...])
        total[...] = jnp.sum(weights, axis=0, keepdims=True)
        summed[...] = _transposed_times(at.own_values[...], weights.astype(at.own_values.dtype))

    @pl.when(step < counts[place])
    def _context() -> None:
        scores = _times_transposed(at.keys[...], at.queries[...]) * scale
        # An index within the part is one of the whole context: the forward pass has one part.
        tile = order[place * cut.part_tiles + step]
        scores = jnp.where(_seen(at, tile * cut.keys, scores.shape), scores, LOWEST)
        new = jnp.maximum(largest[...], jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - new)
        kept = jnp.exp(largest[...] - new)
        largest[...] = new
        total[...] = kept * total[...] + jnp.sum(weights, axis=0, keepdims=True)
        summed[...] = kept * summed[...] + _transposed_times(
            at.values[...], weights.astype(at.values.dtype)
        )

    @pl.when(step == cut.part_tiles - 1)
    def _done() -> None:
        out[...] = (summed[...] / total[...]).T.astype(out.dtype)
        log_sum[...] = largest[...] + jnp.log(total[...])


def _backward_kernel(order: Any, counts: Any, *refs: Any, cut: Cut) -> None:
    at = _Inputs(*refs[:8])
    (cotangent, log_sum, slope) = refs[8:11]
    gradients = Operands(*refs[11:])
    place = _place(cut)
    part = pl.program_id(2)
    tile = pl.program_id(3)
    step = pl.program_id(4)
    scale = at.queries.shape[-1] ** -0.5

    # What a tile of keys adds to the gradients of the queries, of its keys and of its values.
    def of_keys(
        keys: jax.Array, values: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Chosen after the exponential, which may overflow where a query does not see the key.
        # Queries that fill up a tile have a cotangent of 0, and so add nothing.
        weights = jnp.where(
            seen, jnp.exp(_times_transposed(keys, at.queries[...]) * scale - log_sum[...]), 0.0
        )
        slopes = weights * (_times_transposed(values, cotangent[...]) - slope[...]) * scale
        slopes = slopes.astype(keys.dtype)
        weights = weights.astype(keys.dtype)
        return (
            _transposed_times(slopes, keys),
            _times(slopes, at.queries[...]),
            _times(weights, cotangent[...]),
        )

    # The block of these two is the same for all tiles and steps of a part: it stays in memory, and
    # is written out when the part ends.
    @pl.when((tile == 0) & (step == 0))
    def _begin() -> None:
        gradients.keys[...] = jnp.zeros_like(gradients.keys)
        gradients.values[...] = jnp.zeros_like(gradients.values)

    @pl.when(step == 0)
    def _own_block() -> None:
        # Of the first part of the context alone; the sums of the others begin with nothing.
        seen = (at.own_seen[...] != 0) & (part == 0)
        queries, keys, values = of_keys(at.own_keys[...], at.own_values[...], seen)
        gradients.queries[...] = queries
        gradients.own_keys[...] = keys
        gradients.own_values[...] = values

    @pl.when(step < counts[place])
    def _context() -> None:
        index = order[place * cut.part_tiles + step]
        begin = (part * cut.part_tiles + index) * cut.keys
        seen = _seen(at, begin, (cut.keys, cut.queries))
        queries, keys, values = of_keys(at.keys[...], at.values[...], seen)
        gradients.queries[...] += queries
        held = pl.ds(pl.multiple_of(index * cut.keys, cut.keys), cut.keys)
        gradients.keys[held, :] += keys
        gradients.values[held, :] += values


def _call(kernel: Any, cut: Cut, operands: Operands, **arguments: Any) -> Any:
    """A `pallas_call` over the grid of both kernels: takes `SeenTiles`, then the arrays."""
    batch, heads = operands.queries.shape[:2]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, heads, cut.parts, cut.tiles, cut.part_tiles),
        in_specs=arguments.pop("in_specs"),
        out_specs=arguments.pop("out_specs"),
        scratch_shapes=arguments.pop("scratch_shapes", ()),
    )
    # Steps add up the sums of queries, tiles those of a part's keys: both go one after the other.
    semantics: Any = ("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary")
    return pl.pallas_call(
        functools.partial(kernel, cut=cut),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        **arguments,
    )


@functools.partial(jax.jit, static_argnames=("causal", "size", "interpret"))
def forward(
    operands: Operands,
    span: ContextSpan,
    *,
    causal: bool,
    size: KernelTile = TILE,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The online softmax; arguments and result as `block_attention_xla.forward`.

    `interpret` runs the kernel without a TPU, for tests.
    """
    batch, heads, blocks, block_queries, width = operands.queries.shape
    # One part, whatever the context: nothing of it is held here, and each softmax runs over it all.
    one_part = replace(size, context=operands.keys.shape[2] + size.keys)
    cut = cut_of(operands, one_part)
    inputs = _inputs(operands, span, cut, causal=causal)
    specs = _in_specs(cut, inputs)
    count = cut.tiles * cut.queries
    run = _call(
        _forward_kernel,
        cut,
        operands,
        in_specs=list(specs),
        out_specs=[specs.queries, pl.BlockSpec((None, None, 1, cut.queries), _by_lane)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, count, width), operands.queries.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, count), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, cut.queries), jnp.float32),
            pltpu.VMEM((1, cut.queries), jnp.float32),
            pltpu.VMEM((width, cut.queries), jnp.float32),
        ],
        interpret=interpret,
        name="block_attention_forward",
    )
    out, log_sum = run(*seen_tiles(span, cut), *inputs)
    out = out.reshape(batch, heads, -1, block_queries, width)[:, :, :blocks]
    log_sum = log_sum.reshape(batch, heads, -1, block_queries, 1)[:, :, :blocks]
    return out, log_sum


@functools.partial(jax.jit, static_argnames=("causal", "size", "interpret"))
def backward(
    saved: Saved,
    cotangent: jax.Array,
    *,
    causal: bool,
    size: KernelTile = TILE,
    interpret: bool = False,
) -> Operands:
    """The gradients; arguments and result as `block_attention_xla.backward`, the derivation too."""
    operands, span = saved.operands, saved.span
    batch, heads, blocks, block_queries, width = operands.queries.shape
    length = operands.keys.shape[2]
    own = operands.own_keys.shape[3]
    cut = cut_of(operands, size)
    inputs = _inputs(operands, span, cut, causal=causal)
    specs = _in_specs(cut, inputs)
    outputs = _gradient_outputs(operands, cut)
    more = ((0, 0), (0, 0), (0, cut.tiles * cut.blocks - blocks), (0, 0))

    def lanes(x: jax.Array) -> jax.Array:  # [B, KV, N, G*K] -> [B, KV, 1, tiles * queries]
        return jnp.pad(x, more).reshape(batch, heads, 1, -1)

    out_specs = [spec for spec, _ in outputs]
    out_shapes = [shape for _, shape in outputs]
    query = pl.BlockSpec((None, None, 1, cut.queries), _by_lane)
    run = _call(
        _backward_kernel,
        cut,
        operands,
        in_specs=[*specs, specs.queries, query, query],
        out_specs=out_specs,
        out_shape=out_shapes,
        interpret=interpret,
        name="block_attention_backward",
    )
    slope = jnp.sum(cotangent.astype(jnp.float32) * saved.out, axis=-1)
    cotangent = jnp.pad(cotangent.astype(operands.queries.dtype), (*more, (0, 0)))
    figures = cotangent.reshape(batch, heads, -1, width), lanes(saved.log_sum[..., 0]), lanes(slope)
    found = Operands(*run(*seen_tiles(span, cut), *inputs, *figures))

    # Each part of the context has written what it adds to a query's and an own key's gradient.
    def by_block(x: jax.Array, size: int) -> jax.Array:
        x = x[:, :, 0] if cut.parts == 1 else jnp.sum(x, axis=2)
        return x.reshape(batch, heads, -1, size, width)[:, :, :blocks]

    gradients = Operands(
        by_block(found.queries, block_queries),
        found.keys[:, :, :length],
        found.values[:, :, :length],
        by_block(found.own_keys, own),
        by_block(found.own_values, own),
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands)


def _gradient_outputs(operands: Operands, cut: Cut) -> Any:
    """Block and shape of each gradient; sums of the context's keys and values stay in memory."""
    batch, heads, _, _, width = operands.queries.shape

    def of_tile(count: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        shape = (batch, heads, cut.parts, cut.tiles * count, width)
        spec = pl.BlockSpec(
            (None, None, None, count, width), lambda b, h, p, t, s, *_: (b, h, p, t, 0)
        )
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    held = cut.part_tiles * cut.keys
    spec = pl.BlockSpec((None, None, held, width), lambda b, h, p, t, s, *_: (b, h, p, 0))
    context: Any = spec, jax.ShapeDtypeStruct((batch, heads, cut.parts * held, width), jnp.float32)
    own: Any = of_tile(cut.blocks * operands.own_keys.shape[3])
    queries: Any = of_tile(cut.queries)
    return Operands(queries, context, context, own, own)
