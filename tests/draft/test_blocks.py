"""Anchors, blocks, labels and weights against loops that apply the rules position by position."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draft_config, random_anchors, random_batch, slow_document_ids

from domino_jax.draft.blocks import (
    Anchors,
    Packing,
    anchor_candidates,
    document_ids,
    make_blocks,
    sample_anchors,
)

MASK_ID = 119
draw = jax.jit(sample_anchors, static_argnames="num_anchors")
cut = jax.jit(make_blocks, static_argnames="cfg")


def slow_candidates(
    loss_mask: np.ndarray, block_size: int, doc_remaining: np.ndarray | None
) -> np.ndarray:
    found = np.zeros(loss_mask.shape, bool)
    rows, length = loss_mask.shape
    for b, a in itertools.product(range(rows), range(length)):
        whole = doc_remaining is None or doc_remaining[b, a] >= block_size - 1
        found[b, a] = loss_mask[b, a] > 0.5 and 0 <= a <= max(length - block_size, 0) and whole
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [32, 24])
def test_anchor_candidates_equal_the_loop(packed: bool, length: int) -> None:
    batch = random_batch(draft_config(), length=length, packed=packed)
    remaining = batch.packing.get("doc_remaining")
    found = anchor_candidates(batch.loss_mask, block_size=7, doc_remaining=remaining)
    chex.assert_type(found, bool)
    np.testing.assert_array_equal(found, slow_candidates(batch.loss_mask, 7, remaining))
    assert np.any(found) and not np.all(found)


@pytest.mark.parametrize(
    ("length", "block_size", "expected"),
    [
        (6, 4, [0, 1, 2]),
        (4, 4, [0]),
        (3, 4, [0]),
        (1, 4, [0]),
    ],  # a row shorter than a block may start at its top
)
def test_anchor_candidates_leave_room_for_the_block(
    length: int, block_size: int, expected: list[int]
) -> None:
    found = anchor_candidates(jnp.ones((1, length)), block_size=block_size)
    assert np.flatnonzero(found[0]).tolist() == expected


@pytest.mark.parametrize("packed", [False, True])
def test_specforge_candidates_need_a_supervised_successor(packed: bool) -> None:
    batch = random_batch(draft_config(), packed=packed)
    remaining = batch.packing.get("doc_remaining")
    found = anchor_candidates(
        batch.loss_mask, block_size=7, doc_remaining=remaining, rule="specforge"
    )
    mask = batch.loss_mask
    rows, length = mask.shape
    for b, a in itertools.product(range(rows), range(length)):
        follows = a + 1 < length and mask[b, a + 1] and (remaining is None or remaining[b, a] >= 1)
        assert bool(found[b, a]) == bool(mask[b, a] and follows)
    assert np.any(found[:, length - 7 + 1 :])  # blocks may reach past the row's end here


def test_anchor_candidates_refuse_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="anchor_rule must be 'nemo' or 'specforge', found 'zlab'"):
        anchor_candidates(jnp.ones((1, 4)), block_size=2, rule="zlab")


def test_anchor_candidates_need_more_than_half_supervision() -> None:
    found = anchor_candidates(jnp.array([[0.0, 0.5, 0.51, 1.0]]), block_size=1)
    assert found.tolist() == [[False, False, True, True]]


def test_sample_anchors_draws_every_subset_equally_often() -> None:
    candidates = jnp.array([[False, True, True, False, True, True, False, True, True]])
    draws = 6000
    keys = jax.random.split(jax.random.key(11), draws)
    anchors, keep = jax.vmap(lambda key: draw(key, candidates, num_anchors=3))(keys)
    assert np.all(keep)
    assert np.all(np.diff(anchors[:, 0]) > 0)  # ascending, and nothing drawn twice
    subsets = {
        subset: 0 for subset in itertools.combinations(np.flatnonzero(candidates[0]).tolist(), 3)
    }
    for drawn in np.asarray(anchors[:, 0]).tolist():
        subsets[tuple(drawn)] += 1
    expected = draws / len(subsets)
    chi_square = sum((count - expected) ** 2 / expected for count in subsets.values())
    assert len(subsets) == 20
    assert chi_square < 43.82  # the 99.9 % quantile of chi-square with 19 degrees of freedom


def test_sample_anchors_draws_rows_and_keys_independently() -> None:
    candidates = jnp.ones((2, 40), bool)
    first, _ = draw(jax.random.key(0), candidates, num_anchors=6)
    again, _ = draw(jax.random.key(0), candidates, num_anchors=6)
    other, _ = draw(jax.random.key(1), candidates, num_anchors=6)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(
    "num_anchors", [1, 4, 8, 13]
)  # fewer slots than candidates, more, as many as S, more than S
def test_sample_anchors_fills_static_slots(num_anchors: int) -> None:
    candidates = np.zeros((3, 8), bool)
    candidates[0, [1, 4, 5]] = True
    candidates[1, [0, 2, 3, 6, 7]] = (
        True  # position 0 is an anchor here and the filler of unused slots elsewhere
    )
    anchors, keep = draw(jax.random.key(3), jnp.asarray(candidates), num_anchors=num_anchors)
    chex.assert_shape([anchors, keep], (3, num_anchors))
    chex.assert_type([anchors, keep], [jnp.int32, bool])
    for row in range(3):
        allowed = np.flatnonzero(candidates[row])
        used = np.asarray(anchors[row])[np.asarray(keep[row])]
        assert keep[row].tolist() == [
            slot < min(num_anchors, len(allowed)) for slot in range(num_anchors)
        ]
        assert set(used) <= set(allowed)
        assert np.all(np.diff(used) > 0)
        assert np.all(np.asarray(anchors[row])[~np.asarray(keep[row])] == 0)


def slow_blocks(
    ids: np.ndarray,
    loss_mask: np.ndarray,
    anchors: np.ndarray,
    keep: np.ndarray,
    *,
    block_size: int,
    shift_label: bool,
    packing: dict[str, np.ndarray],
) -> dict[str, Any]:
    """All blocks by the training rules; previous ids, labels and mask of predicting positions."""
    rows, length = ids.shape
    shape = (rows, anchors.shape[1], block_size)
    names = ("noise_ids", "positions", "previous_ids", "target_ids", "mask")
    blocks = {name: np.zeros(shape, np.float32 if name == "mask" else int) for name in names}
    label_start = 1 if shift_label else 0
    last = length - 1
    for b, n, k in itertools.product(*map(range, shape)):
        a = anchors[b, n]
        index = a + label_start + k
        supervised = loss_mask[b, min(index, last)] if keep[b, n] and index < length else 0.0
        if packing:
            supervised = supervised and label_start + k <= packing["doc_remaining"][b, a]
        blocks["noise_ids"][b, n, k] = ids[b, a] if k == 0 and keep[b, n] else MASK_ID
        blocks["positions"][b, n, k] = (packing["position_ids"][b, a] if packing else a) + k
        # The GRU's state at a position has last read the token before that position's label.
        blocks["previous_ids"][b, n, k] = ids[b, min(index - 1, last)]
        blocks["target_ids"][b, n, k] = ids[b, min(index, last)]
        blocks["mask"][b, n, k] = supervised
    for name in ("previous_ids", "target_ids", "mask"):
        blocks[name] = blocks[name] if shift_label else blocks[name][:, :, 1:]
    return blocks


@pytest.mark.pitfall(
    "labels shifted by one",
    seen="draft/blocks.py: labels from the anchor itself on; target_ids alone one earlier",
)
@pytest.mark.parametrize("shift_label", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [32, 3])  # the second is shorter than a block
def test_make_blocks_equals_the_loop(shift_label: bool, packed: bool, length: int) -> None:
    if length < 5:
        batch = random_batch(draft_config(), length=length)
        anchors, keep = np.array([[0, 0]] * 3, np.int32), np.array([[True, False]] * 3)
        everywhere = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
        if packed:  # one document of the row's length
            whole = {"seq_lens": np.full((3, 1), length, np.int32), "position_ids": everywhere}
            batch = batch._replace(packing=whole | {"doc_remaining": length - 1 - everywhere})
    else:
        batch = random_batch(draft_config(), length=length, packed=packed)
        anchors, keep = random_anchors(draft_config(), batch, slots=12)
        # Blocks that reach over the end, which sampling would not draw, must still be cut there.
        anchors[:, 0], anchors[:, 1], keep[:, :2] = length - 1, length - 3, True
    options = {"block_size": 5, "shift_label": shift_label}
    found = cut(
        batch.input_ids,
        batch.loss_mask,
        Anchors(jnp.asarray(anchors), jnp.asarray(keep)),
        cfg=draft_config(**options),
        packing=Packing(**batch.packing) if packed else None,
    )
    expected = slow_blocks(
        batch.input_ids, batch.loss_mask, anchors, keep, packing=batch.packing, **options
    )
    assert not np.all(keep)
    for name, values in found._asdict().items():
        assert values.dtype == (jnp.float32 if name == "mask" else jnp.int32), name
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_make_blocks_supervises_by_the_share_of_the_loss_mask() -> None:
    found = cut(
        jnp.arange(4)[None],
        jnp.array([[1.0, 0.5, 0.51, 0.0]]),
        Anchors(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)),
        cfg=draft_config(block_size=4, shift_label=False),
    )
    np.testing.assert_allclose(found.mask, [[[0.5, 0.51, 0.0]]])


@pytest.mark.parametrize("shift_label", [False, True])
def test_a_prefix_shows_its_tokens_and_supervises_only_what_it_does_not_show(
    shift_label: bool,
) -> None:
    ids, anchor, size = np.arange(20, 32)[None], 2, 5
    for length in (2, 3, 4):
        found = cut(
            jnp.asarray(ids),
            jnp.ones((1, 12)),
            Anchors(jnp.array([[anchor]]), jnp.ones((1, 1), bool)),
            cfg=draft_config(block_size=size, shift_label=shift_label),
            prefix_lengths=jnp.array([[length]]),
        )
        shown = [ids[0, anchor + k] if k < length else MASK_ID for k in range(size)]
        labels = [ids[0, anchor + k + int(shift_label)] for k in range(size)][not shift_label :]
        assert found.noise_ids[0, 0].tolist() == shown
        assert found.target_ids[0, 0].tolist() == labels
        assert found.mask[0, 0].tolist() == [label not in shown for label in labels]


def test_document_ids_equal_the_loop_and_nemo() -> None:
    from nemo_automodel.components.speculative.dflash.core import _context_doc_ids
    from torch import tensor

    seq_lens = np.array(
        [[3, 0, 4, 2, 0], [12, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    )  # holes, a full row, padding behind
    found = document_ids(jnp.asarray(seq_lens), 12)
    chex.assert_type(found, jnp.int32)
    np.testing.assert_array_equal(found, slow_document_ids(seq_lens, 12))
    np.testing.assert_array_equal(found, _context_doc_ids(tensor(seq_lens), 12, "cpu").numpy())
