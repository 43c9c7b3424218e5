"""Token rows become batches of one shape.

A shape that depends on the data recompiles the step, and a run that resumes must see the batches
that it would have seen. So every batch is padded to S, and grain, whose iterators can be saved with
the state, shuffles the rows and shares the batches out to the processes:

    rows or packs, in another order each epoch | the next epoch ...
    batch 0   batch 1   batch 2   batch 3   batch 4 ...     process 0 of 2 takes 0, 2, 4 ...
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    shuffle: bool = True,
    repeat: bool = True,
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
        shuffle: False keeps the order of `rows` or `packs`.
        repeat: False ends after the batch that completes the first epoch; it is filled up from the
            second.
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
    units = _enough_units(rows, packs, step_units=batch_size * count)
    require(0 <= seed < 2**32, f"seed must lie in 0..{2**32 - 1}, found {seed}")
    data = grain.MapDataset.source(units)
    if shuffle:
        data = data.shuffle(seed=seed)
    make = _batch_maker(rows, packs, max_length=max_length, from_disk=read_ahead > 0)
    # Repeated before they are batched: a batch may reach into the next epoch, and none is short.
    batches = data.repeat(ENDLESS // len(units)).batch(batch_size, batch_fn=make)
    if not repeat:
        batches = batches[: _steps(units, batch_size * count) * count]
    return _iterator(batches, index, count, read_ahead=read_ahead)


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

    The last batches are filled up with empty sequences.

    Args:
        rows: all rows, the same in every process, each at most `max_length` long.
        batch_size: sequences per batch and process.
        max_length: S.
        packs: which rows share one sequence of a batch.
        process_index: which process this is; JAX's own by default.
        process_count: of how many. Every process gets the same number of batches.
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
    units = _units(rows, packs)
    # Empty sequences and not fewer batches: every process has to step as often as the others.
    missing = _steps(units, batch_size * count) * batch_size * count - len(units)
    data = grain.MapDataset.source([*units, *[()] * missing])
    make = _batch_maker(rows, packs, max_length=max_length, from_disk=False)
    return _iterator(data.batch(batch_size, batch_fn=make), index, count, read_ahead=0)


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not one of {count} processes")
    return index, count


def _units(rows: Sequence[Row], packs: Sequence[Pack] | None) -> Sequence[Pack]:
    """The rows of each sequence: the packs, or one row each."""
    return single_packs(len(rows)) if packs is None else packs


def _enough_units(
    rows: Sequence[Row], packs: Sequence[Pack] | None, *, step_units: int
) -> Sequence[Pack]:
    units = _units(rows, packs)
    if len(units) < step_units:
        what = "rows" if packs is None else f"rows packed from {len(rows)} conversations"
        raise InputError(f"{len(units)} {what} cannot fill a batch of {step_units}")
    return units


def _steps(units: Sequence[Pack], step_units: int) -> int:
    return -(-len(units) // step_units)


def _batch_maker(
    rows: Sequence[Row], packs: Sequence[Pack] | None, *, max_length: int, from_disk: bool
) -> Callable[[Sequence[Pack]], dict[str, np.ndarray]]:
    lengths = row_lengths(rows)
    check_fits(lengths, max_length=max_length)
    # Of all packs, not of those of a batch: every batch has one shape.
    documents = 1 if packs is None else max(len(pack) for pack in packs)
    source = _Source(
        rows=rows,
        lengths=lengths,
        max_length=max_length,
        documents=documents,
        packed=packs is not None,
        threads=ThreadPoolExecutor(READING_THREADS) if from_disk else None,
    )
    return source.batch


def _iterator(
    batches: "grain.MapDataset", index: int, count: int, *, read_ahead: int
) -> "grain.DatasetIterator":
    import grain

    # Rows that lie in memory need no reading threads: a batch takes microseconds.
    options = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
    return iter(batches[index::count].to_iter_dataset(options))


@dataclass(frozen=True)
class _Placed:
    """A row by its number, the sequence of the batch that it lies in, and where it begins there."""

    number: int
    slot: int
    begin: int


@dataclass(frozen=True)
class _Source:
    """What batches are filled from.

    Attributes:
        rows: all rows.
        lengths: tokens of each.
        max_length: S.
        documents: the largest number of rows in a sequence.
        packed: whether batches say where documents lie.
        threads: that read and copy rows, None to do so here.
    """

    rows: Sequence[Row]
    lengths: Sequence[int]
    max_length: int
    documents: int
    packed: bool
    threads: ThreadPoolExecutor | None

    def batch(self, units: Sequence[Pack]) -> dict[str, np.ndarray]:
        """The batch of these sequences, as `row_batches` describes it."""
        batch = {
            "input_ids": np.zeros((len(units), self.max_length), np.int32),
            "loss_mask": np.zeros((len(units), self.max_length), bool),
            "row_numbers": np.full((len(units), self.documents), -1, np.int32),
        }
        seq_lens: list[list[int]] = []
        places: list[_Placed] = []
        for slot, pack in enumerate(units):
            batch["row_numbers"][slot, : len(pack)] = pack
            seq_lens.append([self.lengths[number] for number in pack])
            begins = np.cumsum([0, *seq_lens[-1]])
            for number, begin in zip(pack, begins[:-1], strict=True):
                places.append(_Placed(number, slot, int(begin)))

        def put(place: _Placed) -> None:
            for name, values in self.rows[place.number].arrays.items():
                if name not in batch:
                    shape = (len(units), self.max_length, *values.shape[1:])
                    batch[name] = np.zeros(shape, values.dtype)
                end = place.begin + len(values)
                batch[name][place.slot, place.begin : end] = values

        # One row first: it makes the arrays, which several threads would make at once.
        for place in places[:1]:
            put(place)
        # The states of one row are a hundred megabytes. `list` runs all and raises what one raised.
        each = map if self.threads is None else self.threads.map
        list(each(put, places[1:]))
        if self.packed:
            batch |= document_arrays(seq_lens, max_length=self.max_length, documents=self.documents)
        return batch
