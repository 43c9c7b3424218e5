"""Token rows become batches of one shape: grain iterators that shuffle, shard by process and can be checkpointed."""

import functools
from collections.abc import Sequence

import grain
import jax
import numpy as np

from domino_jax.data.conversations import Row
from domino_jax.strict import InputError

_EMPTY = Row(np.zeros(0, np.int32), np.zeros(0, bool))


def row_batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """Training batches of one process.

    The epochs follow each other without a gap, so that every batch is full and every row comes once per epoch. Batch
    k of process p is batch `k * process_count + p` of that stream: together the processes see the same rows in the
    same order as one process with their joint batch size.

    Args:
        rows: all rows, the same in every process, each at most `max_length` long.
        batch_size: rows per batch and process.
        max_length: S.
        seed: of the order, which differs from epoch to epoch.
        shuffle: False keeps the order of `rows`.
        repeat: False ends after the batch that completes the first epoch; it is filled up from the second.
        process_index: which process this is; JAX's own by default.
        process_count: of how many.
    Returns:
        Iterator with `get_state` and `set_state` (and `grain.checkpoint` for Orbax) over dicts of `input_ids` int32
        [batch_size, S], padded with 0 on the right, and `loss_mask` bool [batch_size, S], False on padding.
    Raises:
        InputError: fewer rows than all processes take per batch, or a seed outside 0..2**32-1.
        ValueError: a row is longer than `max_length`.
    """
    index, count = _process(process_index, process_count)
    if len(rows) < batch_size * count:
        raise InputError(f"{len(rows)} rows cannot fill a batch of {batch_size * count}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0..{2**32 - 1}, found {seed}")
    data = grain.MapDataset.source(rows)
    if shuffle:
        data = data.shuffle(seed=seed)
    batches = _batched(data.repeat(), rows, batch_size=batch_size, max_length=max_length)
    if not repeat:
        batches = batches[: _steps(rows, batch_size * count) * count]
    return _iterator(batches, index, count)


def heldout_batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """One pass over held-out rows in their order; the last batches are filled up with empty rows.

    Args:
        rows: all rows, the same in every process, each at most `max_length` long.
        batch_size: rows per batch and process.
        max_length: S.
        process_index: which process this is; JAX's own by default.
        process_count: of how many. Every process gets the same number of batches.
    Returns:
        Iterator over batches as `row_batches` gives them; the mask of an empty row is False throughout.
    Raises:
        InputError: there are no rows.
        ValueError: a row is longer than `max_length`.
    """
    index, count = _process(process_index, process_count)
    if not rows:
        raise InputError("no held-out rows")
    missing = _steps(rows, batch_size * count) * batch_size * count - len(rows)
    padded = [*rows, *[_EMPTY] * missing]
    data = grain.MapDataset.source(padded)
    return _iterator(_batched(data, padded, batch_size=batch_size, max_length=max_length), index, count)


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is not one of {count} processes")
    return index, count


def _steps(rows: Sequence[Row], step_rows: int) -> int:
    return -(-len(rows) // step_rows)


def _batched(data: grain.MapDataset, rows: Sequence[Row], *, batch_size: int, max_length: int) -> grain.MapDataset:
    longest = max(len(row.input_ids) for row in rows)
    if longest > max_length:
        raise ValueError(f"a row has {longest} tokens, more than max_length {max_length}")
    return data.batch(batch_size, batch_fn=functools.partial(_padded, max_length=max_length))


def _iterator(batches: grain.MapDataset, index: int, count: int) -> grain.DatasetIterator:
    # No reading threads: the rows lie in memory and a batch takes microseconds.
    return iter(batches[index::count].to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _padded(rows: Sequence[Row], *, max_length: int) -> dict[str, np.ndarray]:
    batch = {
        "input_ids": np.zeros((len(rows), max_length), np.int32),
        "loss_mask": np.zeros((len(rows), max_length), bool),
    }
    for slot, row in enumerate(rows):
        batch["input_ids"][slot, : len(row.input_ids)] = row.input_ids
        batch["loss_mask"][slot, : len(row.loss_mask)] = row.loss_mask
    return batch
