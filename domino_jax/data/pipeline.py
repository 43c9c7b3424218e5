"""Token rows become batches of one shape.

A shape that depends on the data recompiles the step, and a run that resumes must see the batches
that it would have seen. So every batch is padded to S, and grain, whose iterators can be saved with
the state, shuffles the rows and shares the batches out to the processes:

    rows or packs, in another order each epoch | the next epoch ...
    batch 0   batch 1   batch 2   batch 3   batch 4 ...     process 0 of 2 takes 0, 2, 4 ...
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from domino_jax.base.errors import InputError, require
from domino_jax.data.conversations import Row
from domino_jax.data.packing import Pack, check_fits, document_arrays, row_lengths, single_packs

if TYPE_CHECKING:
    import grain  # at run time where it is used: steps and decoding do without

READING_THREADS = 8  # that fill one batch from disk
# Sequences, as good as endless. Grain computes lengths in float64, where sys.maxsize in batches of
# 1 overflows.
ENDLESS = 2**50


def row_batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packs: Sequence[Pack] | None = None,
    read_ahead: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "grain.DatasetIterator":
    """Training batches of one process.

    The epochs follow each other without a gap, so that every batch is full and every row comes once
    per epoch. Batch k of process p is batch `k * process_count + p` of that stream: together the
    processes see the same rows in the same order as one process with their joint batch size.

    Args:
        rows: all rows, the same in every process, each at most `max_length` long.
        batch_size: sequences per batch and process.
        max_length: S.
        seed: of the order, which differs from epoch to epoch.
        packs: which rows share one sequence of a batch; these are then what is shuffled, counted
            and shared out.
        read_ahead: batches to prepare while the last one is used, for rows that are read from disk;
            several threads read and copy the rows of each.
        process_index: which process this is; JAX's own by default.
        process_count: of how many.
    Returns:
        Iterator with `get_state` and `set_state` (and `grain.checkpoint` for Orbax) over dicts of
        `input_ids` int32 [batch_size, S], padded with 0 on the right, and `loss_mask` bool
        [batch_size, S], False on padding; with `packs` also the arrays of `document_arrays`; what
        else the rows hold (`features`, `target_states`), padded with 0; and `row_numbers` int32
        [batch_size, documents], which of `rows` lie in each sequence of the batch, filled up
        with -1.
    Raises:
        InputError: fewer rows or packs than all processes take per batch, or a seed outside
            0..2**32-1.
        ValueError: a row is longer than `max_length`.
    """
    import grain

    index, count = _process(process_index, process_count)
    units = single_packs(len(rows)) if packs is None else packs
    if len(units) < batch_size * count:
        what = "rows" if packs is None else f"rows packed from {len(rows)} conversations"
        raise InputError(f"{len(units)} {what} cannot fill a batch of {batch_size * count}")
    require(0 <= seed < 2**32, f"seed must lie in 0..{2**32 - 1}, found {seed}")
    make = _batch_maker(rows, packs, max_length=max_length, from_disk=read_ahead > 0)
    shuffled = grain.MapDataset.source(units).shuffle(seed=seed)
    # Repeated before they are batched: a batch may reach into the next epoch, and none is short.
    batches = shuffled.repeat(ENDLESS // len(units)).batch(batch_size, batch_fn=make)
    # Rows that lie in memory need no reading threads: a batch takes microseconds.
    options = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
    return iter(batches[index::count].to_iter_dataset(options))


def heldout_batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    packs: Sequence[Pack] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "grain.DatasetIterator":
    """One pass over held-out rows in their order.

    The last batches are filled up with empty sequences, so that every process gets as many.

    Args:
        rows, batch_size, max_length, packs, process_index, process_count: see `row_batches`.
    Returns:
        Iterator over batches as `row_batches` gives them; the mask of an empty sequence is False
        throughout.
    Raises:
        InputError: there are no rows.
        ValueError: a row is longer than `max_length`.
    """
    import grain

    index, count = _process(process_index, process_count)
    if not rows:
        raise InputError("no held-out rows")
    units = single_packs(len(rows)) if packs is None else packs
    missing = -len(units) % (batch_size * count)
    make = _batch_maker(rows, packs, max_length=max_length, from_disk=False)
    data = grain.MapDataset.source([*units, *[()] * missing])
    batches = data.batch(batch_size, batch_fn=make)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches[index::count].to_iter_dataset(options))


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not one of {count} processes")
    return index, count


def _batch_maker(
    rows: Sequence[Row], packs: Sequence[Pack] | None, *, max_length: int, from_disk: bool
) -> Callable[[Sequence[Pack]], dict[str, np.ndarray]]:
    """Sequences, each the numbers of its rows -> their batch, as `row_batches` describes it."""
    lengths = row_lengths(rows)
    check_fits(lengths, max_length=max_length)
    # Of all packs, not of those of a batch: every batch has one shape.
    documents = 1 if packs is None else max(len(pack) for pack in packs)
    # The states of one row are a hundred megabytes.
    each: Any = ThreadPoolExecutor(READING_THREADS).map if from_disk else map

    def make(units: Sequence[Pack]) -> dict[str, np.ndarray]:
        batch = {
            "input_ids": np.zeros((len(units), max_length), np.int32),
            "loss_mask": np.zeros((len(units), max_length), bool),
            "row_numbers": np.full((len(units), documents), -1, np.int32),
        }
        seq_lens: list[list[int]] = []
        places: list[tuple[int, int, int]] = []  # a row, its sequence, and where it begins there
        for slot, pack in enumerate(units):
            batch["row_numbers"][slot, : len(pack)] = pack
            seq_lens.append([lengths[number] for number in pack])
            begins = np.cumsum([0, *seq_lens[-1]])
            for number, begin in zip(pack, begins[:-1], strict=True):
                places.append((number, slot, int(begin)))

        def put(place: tuple[int, int, int]) -> None:
            number, slot, begin = place
            for name, values in rows[number].arrays.items():
                if name not in batch:
                    shape = (len(units), max_length, *values.shape[1:])
                    batch[name] = np.zeros(shape, values.dtype)
                batch[name][slot, begin : begin + len(values)] = values

        # One row first: it makes the arrays, which several threads would make at once.
        for place in places[:1]:
            put(place)
        list(each(put, places[1:]))  # runs all, and raises what one raised
        if packs is not None:
            batch |= document_arrays(seq_lens, max_length=max_length, documents=documents)
        return batch

    return make
