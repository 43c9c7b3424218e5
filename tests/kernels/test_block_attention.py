"""Block attention: the definition equals dense attention, and the tiled form the definition."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_cases import CASES, GRADIENT, KERNEL_GRADIENT, QUICK, VALUE
from reference import draft_config, random_anchors, random_batch, slow_mask

from domino_jax.draft.mask import context_span
from domino_jax.kernels import block_attention as kernel
from domino_jax.kernels import block_attention_pallas_tpu as pallas_tpu
from domino_jax.kernels import block_attention_xla as xla
from domino_jax.kernels import causal_attention
from domino_jax.kernels.block_attention import block_attention
from domino_jax.kernels.block_attention_xla import WHOLE_CONTEXT, TileSize
from domino_jax.kernels.operands import ContextSpan
from domino_jax.kernels.tpu_tiles import KernelTile, cut_of, seen_tiles
from domino_jax.sharding import make_mesh

attend = jax.jit(block_attention)

ROWS, HEADS, KV_HEADS, LENGTH, SLOTS, SIZE, WIDTH = 2, 6, 2, 24, 7, 3, 10


class Inputs(NamedTuple):
    q: jax.Array
    context: tuple[jax.Array, jax.Array]
    own: tuple[jax.Array, jax.Array]


def random_inputs(
    rows: int = ROWS,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    length: int = LENGTH,
    queries: int = SLOTS * SIZE,
    seed: int = 4,
) -> Inputs:
    rng = np.random.default_rng(seed)

    def draw(heads: int, length: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, heads, length, WIDTH)) * 2.0, jnp.float32)

    context, own = ((draw(kv_heads, count), draw(kv_heads, count)) for count in (length, queries))
    return Inputs(draw(heads, queries), context, own)


def drawn(packed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    batch = random_batch(draft_config(), rows=ROWS, length=LENGTH, packed=packed)
    anchors, keep = random_anchors(draft_config(block_size=SIZE), batch, slots=SLOTS)
    anchors[0, 0] = 0  # a used block without context
    assert keep.any() and not keep.all()
    return anchors, keep, batch.packing.get("seq_lens")


def values_and_gradients(attention: Any, inputs: Inputs) -> tuple[jax.Array, Inputs]:
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(inputs.q.shape), jnp.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        out = attention(*inputs)
        return jnp.sum(out * weights), out

    (_, out), gradient = run(inputs)
    return out, gradient


@pytest.mark.parametrize(
    ("packed", "window", "causal"),
    [(False, None, False), (True, None, False), (True, 5, False), (False, 4, True)],
)
def test_definition_equals_dense_attention(packed: bool, window: int | None, causal: bool) -> None:
    anchors, keep, seq_lens = drawn(packed)
    span = context_span(anchors, keep, seq_lens=seq_lens, block_size=SIZE, window=window)
    mask = jnp.asarray(
        slow_mask(anchors, keep, seq_lens, length=LENGTH, size=SIZE, window=window, causal=causal)
    )

    def dense(q: jax.Array, context: Any, own: Any) -> jax.Array:
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(context, own, strict=True))
        return causal_attention.definition(q, k, v, mask=mask)

    inputs = random_inputs()
    found = values_and_gradients(
        functools.partial(kernel.definition, span=span, causal=causal), inputs
    )
    expected = values_and_gradients(dense, inputs)
    chex.assert_shape(found[0], (ROWS, HEADS, SLOTS * SIZE, WIDTH))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


class Case(NamedTuple):
    inputs: Inputs
    span: ContextSpan
    causal: bool
    size: TileSize


def random_case(seed: int, *, longest: int = 60) -> Case:
    """Windows, packed rows, unused slots, long beside short rows; tiles that divide nothing."""
    rng = np.random.default_rng(seed)
    rows, kv_heads, groups = (int(rng.integers(1, top)) for top in (4, 3, 9))
    size, slots, length = (
        int(rng.integers(low, top)) for low, top in ((2, 17), (1, 9), (1, longest))
    )
    reach = np.maximum(1, length * rng.choice([0.1, 0.5, 1.0], (rows, 1))).astype(int)
    anchors = np.sort(rng.integers(0, reach, (rows, slots)), axis=1).astype(np.int32)
    keep = np.arange(slots) < rng.integers(0, slots + 1, (rows, 1))
    packed = rng.random() < 0.5
    window = int(rng.integers(size, 3 * size)) if rng.random() < 0.5 else None
    first = int(rng.integers(1, length + 1))
    seq_lens = np.tile(np.array([first, length - first], np.int32), (rows, 1)) if packed else None
    span = context_span(
        jnp.asarray(np.where(keep, anchors, 0)),
        jnp.asarray(keep),
        seq_lens=seq_lens,
        block_size=size,
        window=window,
    )
    inputs = random_inputs(rows, kv_heads * groups, kv_heads, length, slots * size, seed=seed)
    tiles = TileSize(int(rng.integers(1, 4 * groups * size)), int(rng.integers(1, length + 9)))
    return Case(inputs, span, bool(rng.random() < 0.3), tiles)


@functools.cache  # several implementations are held to it
def with_definition(seed: int, *, longest: int = 60) -> tuple[Case, tuple[jax.Array, Inputs]]:
    """A random case with the definition's values and gradients."""
    case = random_case(seed, longest=longest)
    attention = functools.partial(kernel.definition, span=case.span, causal=case.causal)
    return case, values_and_gradients(attention, case.inputs)


def check_against_the_definition(
    case: Case,
    expected: tuple[jax.Array, Inputs],
    implementation: kernel.Implementation,
    *,
    gradient: float,
) -> None:
    attention = functools.partial(
        block_attention, span=case.span, causal=case.causal, implementation=implementation
    )
    found, slopes = values_and_gradients(attention, case.inputs)
    out, exact = expected
    np.testing.assert_allclose(found, out, rtol=VALUE, atol=VALUE * np.abs(out).max())
    for ours, theirs in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(ours - theirs) <= gradient * np.linalg.norm(theirs) + 1e-6


@pytest.mark.pitfall(
    "a boolean mask added as +1 and 0", seen="kernels/block_attention_xla.py: `scores + seen`"
)
@pytest.mark.pitfall(
    "merged softmaxes: the log-sum-exp's gradient is dropped without a word",
    seen=(
        "kernels/block_attention_xla.py: a score's gradient without the merged output's part, in "
        "the context; in the own block"
    ),
)
@pytest.mark.parametrize("implementation", ["cpu", "tiles", "whole context"])
@pytest.mark.parametrize("seed", CASES)
def test_tiled_form_equals_the_definition(seed: int, implementation: str) -> None:
    case, expected = with_definition(seed)
    size = case.size
    if implementation == "whole context":
        size = dataclasses.replace(size, keys=WHOLE_CONTEXT.keys)
    tiled = kernel.by_tiles(size, transposed=implementation == "cpu")
    check_against_the_definition(case, expected, tiled, gradient=GRADIENT)


@pytest.mark.parametrize("seed", CASES)
def test_the_kernel_of_a_tpu_equals_the_definition(seed: int) -> None:
    case, expected = with_definition(seed, longest=600)
    interpreted: dict[str, Any] = {
        "size": KernelTile(queries=128, keys=128, context=256),
        "interpret": True,
    }
    implementation = kernel.Implementation(
        functools.partial(pallas_tpu.forward, **interpreted),
        functools.partial(pallas_tpu.backward, **interpreted),
    )
    check_against_the_definition(case, expected, implementation, gradient=KERNEL_GRADIENT)


@pytest.mark.parametrize("seed", CASES)
def test_the_kernel_of_a_tpu_reads_the_tiles_that_a_query_sees_and_no_other(seed: int) -> None:
    case = random_case(seed, longest=3000)
    operands = kernel._operands(*case.inputs, case.span)
    cut = cut_of(operands, KernelTile(queries=128, keys=128, context=1024))
    first, end = (np.asarray(x) for x in case.span)
    needed = 0
    for row, tile, key in np.ndindex(first.shape[0], cut.tiles, cut.parts * cut.part_tiles):
        blocks = slice(tile * cut.blocks, (tile + 1) * cut.blocks)
        low = np.maximum(first[row, blocks], key * cut.keys)
        high = np.minimum(end[row, blocks], (key + 1) * cut.keys)
        needed += bool(np.any(low < high))
    seen = seen_tiles(case.span, cut)
    assert int(seen.counts.sum()) == needed
    # What stands in the others does not matter: no list leads there.
    batch, _, length, _ = operands.keys.shape
    position = np.arange(length)
    tile_of, poisoned = position // cut.keys, np.zeros((batch, length), bool)
    for row in range(batch):
        of_some_query = np.any(
            (first[row, ..., None] <= position) & (position < end[row, ..., None]), axis=(0, 1)
        )
        poisoned[row] = ~np.isin(tile_of, tile_of[of_some_query])
    keys, values = (
        jnp.where(poisoned[:, None, :, None], jnp.nan, x) for x in (operands.keys, operands.values)
    )
    poison = operands._replace(keys=keys, values=values)
    run = functools.partial(
        pallas_tpu.forward, causal=case.causal, size=KernelTile(128, 128), interpret=True
    )
    if needed:
        assert all(np.all(np.isfinite(x)) for x in run(poison, case.span))


def test_a_tile_of_the_whole_context_has_the_rows_that_memory_allows() -> None:
    inputs = random_inputs(queries=2 * SIZE)
    operands = kernel._operands(
        *inputs, context_span(jnp.array([[3, 5], [1, 2]]), jnp.ones((2, 2), bool))
    )
    a_row = 4 * KV_HEADS * LENGTH  # bytes of its scores
    small = dataclasses.replace(WHOLE_CONTEXT, mib=1)
    assert small.within_memory(operands).queries == 2**20 // a_row
    assert TileSize(5, 7, mib=1).within_memory(operands) == TileSize(5, 7, mib=1)
    assert TileSize(5, 7).within_memory(operands) == TileSize(5, 7)


def test_a_short_row_walks_its_own_length() -> None:
    """Of a batch of a long row and a short one, each tile ends where its own row ends."""
    span = context_span(jnp.array([[90, 95], [3, 5]]), jnp.ones((2, 2), bool))
    inputs = random_inputs(rows=2, length=96, queries=2 * SIZE)
    tiles = xla._tiles(kernel._operands(*inputs, span), span, TileSize(9, 10))
    assert tiles.sequence.tolist() == [0, 0, 1, 1]
    assert tiles.stop.tolist() == [9, 10, 1, 1]


def test_devices_attend_for_their_own_rows_and_sum_nothing() -> None:
    span = context_span(jnp.array([[3, 20], [4, 9], [1, 2], [8, 23]]), jnp.ones((4, 2), bool))
    inputs = random_inputs(rows=4, queries=2 * SIZE)

    def total(inputs: Inputs, span: ContextSpan) -> jax.Array:
        return jnp.sum(jnp.sin(block_attention(*inputs, span=span)))

    expected = jax.jit(jax.value_and_grad(total))(inputs, span)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    by_row = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
    spans = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(total), in_shardings=(by_row, spans))
        found = run(inputs, span)
        text = run.lower(inputs, span).compile().as_text()
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in text and "all-to-all" not in text
    # The sums of the scalar `total`, and no other.
    scalars = re.findall(r"= f32\[\]\S* all-reduce\(", text)
    assert len(re.findall(r"all-reduce\(", text)) == len(scalars) > 0


@pytest.mark.pitfall(
    "fully masked attention rows: NaN",
    seen=(
        "kernels/block_attention_xla.py: the own block left out, the context masked with -inf, "
        "which gives NaN"
    ),
)
def test_block_attention_of_an_unused_slot_sees_its_own_block_only() -> None:
    nothing = ContextSpan(*jnp.zeros((2, ROWS, SLOTS, 1), jnp.int32))
    inputs = random_inputs()
    found = attend(*inputs, span=nothing)
    everything = jnp.ones((1, SIZE, SIZE), bool)
    for n in range(SLOTS):
        block = np.s_[:, :, n * SIZE : (n + 1) * SIZE]
        k, v = (x[block] for x in inputs.own)
        expected = causal_attention.definition(inputs.q[block], k, v, mask=everything)
        np.testing.assert_allclose(found[block], expected, rtol=1e-5, atol=1e-5)

    def total(inputs: Inputs) -> jax.Array:
        return jnp.sum(jnp.sin(block_attention(*inputs, span=nothing)))

    gradient = jax.jit(jax.grad(total))(inputs)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    assert not any(np.any(x) for x in gradient.context)


def test_block_attention_keeps_bfloat16_outside_and_float32_scores_inside() -> None:
    anchors, keep, _ = drawn()
    span = context_span(anchors, keep)
    inputs = random_inputs()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs._replace(q=4.0 * inputs.q))
    found = attend(*rounded, span=span)
    chex.assert_type(found, jnp.bfloat16)
    exact = attend(*jax.tree.map(lambda x: x.astype(jnp.float32), rounded), span=span)
    # Weights and outputs, up to 7 here, are rounded to 8 bits; scores, up to 100, must not be.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.05)
