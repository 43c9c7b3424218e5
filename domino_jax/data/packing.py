"""Several conversations in one row of a batch: which ones share it, and where each lies."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Pack = tuple[int, ...]  # numbers of the rows that share one row of a batch, in order


def row_lengths(rows: Sequence[Any]) -> Sequence[int]:
    """Tokens of each row; rows that lie on disk know theirs without being read."""
    known = getattr(rows, "lengths", None)
    return known if known is not None else [len(row.input_ids) for row in rows]


def single_packs(count: int) -> list[Pack]:
    """Packs of one row each: batches without packing."""
    return [(number,) for number in range(count)]


def pack_rows(lengths: Sequence[int], *, max_length: int) -> list[Pack]:
    """Puts rows together so that little is left over: best-fit decreasing, one binary search per row.

    Nothing is cut. The longest rows are placed first, each where it leaves the least room, or else in a new pack. A
    conversation shorter than a draft block gets no anchor when packed, because no block fits into it; alone in its
    row, a block may reach over its end.

    Args:
        lengths: tokens of each row, 1 or more.
        max_length: S, room of a pack.
    Returns:
        The packs in order of their first row, the rows of each in order. The same lengths give the same packs.
    Raises:
        ValueError: a row is longer than `max_length`.
    Source: NeMo AutoModel 0.7.0 for the rule of short conversations (`_sample_anchor_positions`).
    """
    check_fits(lengths, max_length=max_length)
    by_room: list[list[list[int]]] = [
        [] for _ in range(max_length + 1)
    ]  # open packs by the room they have left
    rooms: list[int] = []  # the rooms at which there is one, ascending
    packs: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = bisect.bisect_left(rooms, lengths[number])
        if place == len(rooms):
            packs.append([])
            pack, room = packs[-1], max_length
        else:
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        pack.append(number)
        room -= lengths[number]
        if not by_room[room]:
            bisect.insort(rooms, room)
        by_room[room].append(pack)
    return sorted(tuple(sorted(pack)) for pack in packs)


def check_fits(lengths: Sequence[int], *, max_length: int) -> None:
    """Raises `ValueError` where a row is longer than `max_length`."""
    longest = max(lengths, default=0)
    if longest > max_length:
        raise ValueError(f"a row has {longest} tokens, more than max_length {max_length}")


def padding_share(lengths: Sequence[int], packs: Sequence[Pack], *, max_length: int) -> float:
    """The part of all positions of a pass over the packs that holds no token, 0..1."""
    return 1.0 - sum(lengths[number] for pack in packs for number in pack) / (
        len(packs) * max_length
    )


def document_arrays(
    seq_lens: Sequence[Sequence[int]], *, max_length: int, documents: int
) -> dict[str, np.ndarray]:
    """What packed rows tell the model about where documents lie (`draft.blocks.Packing`).

    Args:
        seq_lens: per row the lengths of its documents in order.
        max_length: S.
        documents: the largest number of documents in a row of the whole data, so that every batch has one shape.
    Returns:
        `position_ids` int32 [B, S], counted from the start of each document, and again from the start of the padding,
        `seq_lens` int32 [B, documents], filled up with 0, and `doc_remaining` int32 [B, S], how many tokens follow in
        the same document, 0 on padding.
    """
    rows = len(seq_lens)
    arrays = {
        "position_ids": np.zeros((rows, max_length), np.int32),
        "seq_lens": np.zeros((rows, documents), np.int32),
        "doc_remaining": np.zeros((rows, max_length), np.int32),
    }
    for row, lengths in enumerate(seq_lens):
        arrays["seq_lens"][row, : len(lengths)] = lengths
        bounds = [0, *itertools.accumulate(lengths)]
        for begin, end in itertools.pairwise(bounds):
            arrays["position_ids"][row, begin:end] = np.arange(end - begin)
            arrays["doc_remaining"][row, begin:end] = np.arange(end - begin)[::-1]
        arrays["position_ids"][row, bounds[-1] :] = np.arange(max_length - bounds[-1])
    return arrays
