"""Packing: every row once, nothing cut, little left over; documents lie as the references say."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import _document_positions, draft_config
from rows import LENGTH, assert_equal_batches, make_rows

from domino_jax.data.conversations import Row
from domino_jax.data.packing import (
    Pack,
    document_arrays,
    pack_rows,
    padding_share,
    row_lengths,
    single_packs,
)
from domino_jax.data.pipeline import heldout_batches, row_batches
from domino_jax.draft.blocks import anchor_candidates


@given(st.lists(st.integers(1, 20), max_size=60))
def test_pack_rows_is_slow_best_fit_decreasing(lengths: list[int]) -> None:
    packs = pack_rows(lengths, max_length=20)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert packs == sorted(packs) and all(list(pack) == sorted(pack) for pack in packs)
    assert packs == pack_rows(lengths, max_length=20)
    # The rooms left over are those of a search through all packs for the fullest one that has room.
    slow: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in slow if room >= length]
        if fitting:
            slow.remove(min(fitting))
        slow.append((min(fitting) if fitting else 20) - length)
    assert sorted(20 - sum(lengths[number] for number in pack) for pack in packs) == sorted(slow)


def test_pack_rows_refuses_a_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a row has 21 tokens, more than max_length 20"):
        pack_rows([3, 21], max_length=20)


def test_padding_share_counts_positions() -> None:
    lengths = [10, 4, 6]
    assert padding_share(lengths, single_packs(3), max_length=10) == pytest.approx(1 / 3)
    assert padding_share(lengths, pack_rows(lengths, max_length=10), max_length=10) == 0


def test_document_arrays_follow_the_references() -> None:
    seq_lens = [[3, 4], [9], [2, 2, 2], []]
    arrays = document_arrays(seq_lens, max_length=9, documents=4)
    filled = np.array([[*lens, *[0] * (4 - len(lens))] for lens in seq_lens])
    np.testing.assert_array_equal(arrays["seq_lens"], filled)
    for name, expected in _document_positions(filled, 9).items():
        np.testing.assert_array_equal(arrays[name], expected)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int32)}


def packed(rows: list[Row]) -> list[Pack]:
    return pack_rows(row_lengths(rows), max_length=LENGTH)


def test_packed_batches_hold_every_row_whole() -> None:
    rows = make_rows(30)
    packs = packed(rows)
    epoch = row_batches(rows, packs=packs, batch_size=1, max_length=LENGTH, seed=3)
    seen, widths = [], set()
    for batch in itertools.islice(epoch, len(packs)):
        widths.add(batch["seq_lens"].shape)
        ends = np.cumsum(batch["seq_lens"][0])
        for begin, end in itertools.pairwise([0, *ends]):
            if begin == end:
                continue
            number = int(batch["input_ids"][0, begin]) - 1
            seen.append(number)
            assert number in batch["row_numbers"][0]
            assert batch["input_ids"][0, begin:end].tolist() == rows[number].input_ids.tolist()
            assert batch["loss_mask"][0, begin:end].tolist() == rows[number].loss_mask.tolist()
        for name in ("input_ids", "loss_mask"):
            assert not batch[name][0, ends[-1] :].any()
    assert sorted(seen) == list(range(30))
    assert widths == {(1, max(map(len, packs)))}


def test_packed_batches_restore_and_divide_over_processes() -> None:
    rows = make_rows(40)
    packs = packed(rows)

    def batches(size: int, **options):
        return row_batches(
            rows, packs=packs, batch_size=size, max_length=LENGTH, seed=3, read_ahead=2, **options
        )

    joint = batches(4)
    parts = [batches(2, process_index=index, process_count=2) for index in (0, 1)]
    for _ in range(7):
        pair = [next(part) for part in parts]
        assert_equal_batches(
            [next(joint)], [{name: np.concatenate([x[name] for x in pair]) for name in pair[0]}]
        )
    state = joint.get_state()
    expected = list(itertools.islice(joint, 5))
    other = batches(4)
    next(other)
    other.set_state(state)
    assert_equal_batches(itertools.islice(other, 5), expected)


def test_packed_held_out_rows_come_once() -> None:
    rows = make_rows(11)
    packs = packed(rows)
    batches = list(heldout_batches(rows, packs=packs, batch_size=4, max_length=LENGTH))
    assert len(batches) == -(-len(packs) // 4)
    total = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert total == sum(int(row.loss_mask.sum()) for row in rows)
    assert sum(int((batch["seq_lens"] > 0).sum()) for batch in batches) == 11


def test_a_conversation_shorter_than_the_block_gets_no_anchor_when_packed() -> None:
    block = draft_config().block_size
    arrays = document_arrays([[block - 1, block, 2 * block]], max_length=4 * block, documents=3)
    candidates = anchor_candidates(
        np.ones((1, 4 * block)), block_size=block, doc_remaining=arrays["doc_remaining"]
    )
    bounds = (0, block - 1, 2 * block - 1, 4 * block - 1)
    counts = [int(candidates[0, a:b].sum()) for a, b in itertools.pairwise(bounds)]
    assert counts == [0, 1, block + 1]
