"""Block attention against plain attention under the dense mask."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, random_anchors, random_batch

from domino_jax.draft import attention
from domino_jax.draft.attention import block_attention
from domino_jax.draft.mask import ContextSpan, block_mask, context_span
from domino_jax.layers import grouped_attention

attend = jax.jit(block_attention)

ROWS, HEADS, KV_HEADS, LENGTH, SLOTS, SIZE, WIDTH = 2, 6, 2, 24, 7, 3, 10


class Inputs(NamedTuple):
    q: jax.Array
    context: tuple[jax.Array, jax.Array]
    own: tuple[jax.Array, jax.Array]


def random_inputs() -> Inputs:
    rng = np.random.default_rng(4)

    def draw(heads: int, length: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((ROWS, heads, length, WIDTH)) * 2.0, jnp.float32)

    far, near = LENGTH, SLOTS * SIZE
    return Inputs(
        draw(HEADS, near), (draw(KV_HEADS, far), draw(KV_HEADS, far)), (draw(KV_HEADS, near), draw(KV_HEADS, near))
    )


def drawn(packed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    batch = random_batch(draft_config(), rows=ROWS, length=LENGTH, packed=packed)
    anchors, keep = random_anchors(draft_config(block_size=SIZE), batch, slots=SLOTS)
    anchors[0, 0] = 0  # a used block without context
    assert keep.any() and not keep.all()
    return anchors, keep, batch.packing.get("seq_lens")


# One tile; tiles that divide neither the blocks nor the context; a block and a key at a time.
@pytest.mark.parametrize(("tile_rows", "tile_keys"), [(768, 256), (20, 7), (1, 1)])
@pytest.mark.parametrize(
    ("packed", "window", "causal"), [(False, None, False), (True, None, False), (True, 5, False), (False, 4, True)]
)
def test_block_attention_equals_dense_attention_in_values_and_gradients(
    packed: bool,
    window: int | None,
    causal: bool,
    tile_rows: int,
    tile_keys: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(attention, "TILE_KEYS", tile_keys)
    anchors, keep, seq_lens = drawn(packed)
    rule = {"block_size": SIZE, "seq_lens": seq_lens, "window": window}
    span = context_span(anchors, keep, **rule)
    dense = block_mask(anchors, keep, **rule, context_len=LENGTH, causal=causal)
    inputs = random_inputs()
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(inputs.q.shape), jnp.float32)

    def fast(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        out = block_attention(*inputs, span=span, causal=causal)
        return jnp.sum(out * weights), out

    def slow(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(inputs.context, inputs.own, strict=True))
        out = grouped_attention(inputs.q, k, v, mask=dense)
        return jnp.sum(out * weights), out

    (_, found), found_gradient = jax.jit(jax.value_and_grad(fast, has_aux=True))(inputs)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(slow, has_aux=True))(inputs)
    chex.assert_shape(found, (ROWS, HEADS, SLOTS * SIZE, WIDTH))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(found_gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_block_attention_ignores_the_anchor_and_what_follows() -> None:
    anchors, keep = np.full((ROWS, SLOTS), 9, np.int32), np.ones((ROWS, SLOTS), bool)
    span = context_span(anchors, keep)
    inputs = random_inputs()

    def total(context: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(block_attention(inputs.q, context, inputs.own, span=span)))

    for gradient in jax.jit(jax.grad(total))(inputs.context):
        reached = np.any(np.asarray(gradient) != 0, axis=(0, 1, 3))
        assert reached.tolist() == [position < 9 for position in range(LENGTH)]


def test_block_attention_keeps_blocks_apart() -> None:
    anchors, keep, _ = drawn()
    span = context_span(anchors, keep)
    inputs = random_inputs()
    before = attend(*inputs, span=span)
    own = tuple(x.at[:, :, SIZE : 2 * SIZE].add(1.0) for x in inputs.own)
    changed = np.any(np.asarray(before != attend(inputs.q, inputs.context, own, span=span)), axis=(0, 1, 3))
    assert np.flatnonzero(changed).tolist() == list(range(SIZE, 2 * SIZE))


def test_block_attention_of_an_unused_slot_sees_its_own_block_only() -> None:
    nothing = ContextSpan(*jnp.zeros((2, ROWS, SLOTS, 1), jnp.int32))
    inputs = random_inputs()
    found = attend(*inputs, span=nothing)
    k, v = (np.repeat(np.asarray(x), HEADS // KV_HEADS, axis=1) for x in inputs.own)
    for n in range(SLOTS):
        block = slice(n * SIZE, (n + 1) * SIZE)
        scores = np.asarray(inputs.q)[:, :, block] @ k[:, :, block].swapaxes(2, 3) / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(found[:, :, block], weights @ v[:, :, block], rtol=1e-5, atol=1e-5)

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
