"""Packs: which rows share one sequence of a batch, and where each lies in it.

A row is one conversation. Short ones, each alone in its sequence, leave most of a batch to padding.
Packed, they share one, in which target and draft see one document at a time (S = 8):

    token          a0 a1 a2 b0 b1 b2 b3  .     seq_lens 3, 4, filled up with 0
    position_ids    0  1  2  0  1  2  3  0     restart with each document, and with the padding
    doc_remaining   2  1  0  3  2  1  0  0     tokens that follow in the same document
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Pack = tuple[int, ...]  # numbers of the rows that share one sequence of a batch, in order


def row_lengths(rows: Sequence[Any]) -> Sequence[int]:
    """Tokens of each row; rows that lie on disk know theirs without being read."""
    known = getattr(rows, "lengths", None)
    return known if known is not None else [len(row.input_ids) for row in rows]


def answer_tokens(rows: Iterable[Any]) -> int:
    """Tokens that the target wrote, of all rows; what lies on disk is read for it."""
    return sum(int(row.loss_mask.sum()) for row in rows)


def single_packs(count: int) -> list[Pack]:
    """Packs of one row each: batches without packing."""
    return [(number,) for number in range(count)]


def pack_rows(lengths: Sequence[int], *, max_length: int) -> list[Pack]:
    """Puts rows together so that little is left over: best-fit decreasing.

    Nothing is cut. The longest rows are placed first, each where it leaves the least room, or else
    in a new pack; that takes one binary search per row. A row shorter than a draft block gets no
    anchor when packed, because no block fits into it; in a sequence of its own, a block may reach
    over its end.

    Args:
        lengths: tokens of each row, 1 or more.
        max_length: S, room of a pack.
    Returns:
        The packs in order of their first row, the rows of each in order. The same lengths give the
        same packs.
    Raises:
        ValueError: a row is longer than `max_length`.
    Source: NeMo AutoModel 0.7.0 for the rule of short conversations (`_sample_anchor_positions`).

    >>> pack_rows([5, 3, 6, 2, 4], max_length=8)
    [(0, 1), (2, 3), (4,)]
    """
    check_fits(lengths, max_length=max_length)

    # Open packs by the room they have left.
    by_room: list[list[list[int]]] = [[] for _ in range(max_length + 1)]
    rooms: list[int] = []  # the rooms at which there is one, ascending
    packs: list[list[int]] = []
    # Rows of one length by number: every process and every start must find the same packs.
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
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
        # Listed once, however many packs have this room: the search is by rooms.
        if not by_room[room]:
            bisect.insort(rooms, room)
        by_room[room].append(pack)
    return sorted(tuple(sorted(pack)) for pack in packs)


def check_fits(lengths: Sequence[int], *, max_length: int) -> None:
    """Raises `ValueError` where a row is longer than `max_length`."""
    longest = max(lengths, default=0)
    # A `ValueError`: whoever encodes rows cuts them, so this is no fault of the user's.
    if longest > max_length:
        raise ValueError(f"a row has {longest} tokens, more than max_length {max_length}")


def padding_share(lengths: Sequence[int], packs: Sequence[Pack], *, max_length: int) -> float:
    """The part of all positions of a pass over the packs that holds no token, 0..1.

    >>> padding_share([5, 3, 4], [(0, 1), (2,)], max_length=8)
    0.25
    """
    tokens = sum(lengths[number] for pack in packs for number in pack)
    return 1.0 - tokens / (len(packs) * max_length)


def document_arrays(
    seq_lens: Sequence[Sequence[int]], *, max_length: int, documents: int
) -> dict[str, np.ndarray]:
    """What packs tell the model about where documents lie (`draft.blocks.Packing`).

    Args:
        seq_lens: per sequence the lengths of its documents in order.
        max_length: S.
        documents: the largest number of documents in a sequence of the whole data, so that every
            batch has one shape.
    Returns:
        `position_ids` int32 [B, S], counted from the start of each document, and again from the
        start of the padding, `seq_lens` int32 [B, documents], filled up with 0, and `doc_remaining`
        int32 [B, S], how many tokens follow in the same document, 0 on padding.
    """
    sequences = len(seq_lens)
    arrays = {
        "position_ids": np.zeros((sequences, max_length), np.int32),
        "seq_lens": np.zeros((sequences, documents), np.int32),
        "doc_remaining": np.zeros((sequences, max_length), np.int32),
    }
    for slot, lengths in enumerate(seq_lens):
        arrays["seq_lens"][slot, : len(lengths)] = lengths
        bounds = [0, *itertools.accumulate(lengths)]
        for begin, end in itertools.pairwise(bounds):
            arrays["position_ids"][slot, begin:end] = np.arange(end - begin)
            arrays["doc_remaining"][slot, begin:end] = np.arange(end - begin)[::-1]
        # Padding counts as one more document, see `draft.blocks.document_ids`.
        arrays["position_ids"][slot, bounds[-1] :] = np.arange(max_length - bounds[-1])
    return arrays
