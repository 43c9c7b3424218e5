"""Rows -> batches: none lost or repeated, the same after a restore, a fair share per process."""

import itertools
from pathlib import Path

import grain.checkpoint
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rows import LENGTH, assert_equal_batches, make_rows

from domino_jax.base.errors import InputError
from domino_jax.data.pipeline import heldout_batches, row_batches


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """Which rows a batch holds; -1 is an empty one."""
    return [int(first) - 1 for first in batch["input_ids"][:, 0]]


def taken(batches, count: int) -> list[int]:
    return [number for batch in itertools.islice(batches, count) for number in numbers(batch)]


def fresh(*, rows: int = 10, seed: int = 2, **options):
    return row_batches(make_rows(rows), batch_size=4, max_length=LENGTH, seed=seed, **options)


@pytest.mark.pitfall(
    "shapes that depend on the data: recompilation late in an epoch",
    seen="data/pipeline.py: padded to the longest of a batch",
)
def test_batches_are_the_padded_rows() -> None:
    rows = make_rows(10)
    batches = row_batches(rows, batch_size=4, max_length=LENGTH, seed=0)
    for batch in itertools.islice(batches, 20):
        assert batch["input_ids"].shape == batch["loss_mask"].shape == (4, LENGTH)
        assert batch["input_ids"].dtype == np.int32 and batch["loss_mask"].dtype == bool
        for slot, number in enumerate(numbers(batch)):
            row = rows[number]
            assert batch["row_numbers"][slot].tolist() == [number]
            padding = LENGTH - len(row.input_ids)
            assert batch["input_ids"][slot].tolist() == row.input_ids.tolist() + [0] * padding
            assert batch["loss_mask"][slot].tolist() == row.loss_mask.tolist() + [False] * padding


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    stream = taken(fresh(rows=30, seed=5), 23)
    epochs = [stream[start : start + 30] for start in (0, 30, 60)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != list(range(30))


def test_batches_of_one_row() -> None:
    batches = row_batches(make_rows(7), batch_size=1, max_length=LENGTH, seed=0)
    assert sorted(taken(batches, 7)) == list(range(7))


def test_the_seed_decides_the_order() -> None:
    first, again, other = (taken(fresh(rows=30, seed=seed), 20) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_together_see_what_one_would(process_count: int) -> None:
    rows = make_rows(24)
    joint = row_batches(rows, batch_size=2 * process_count, max_length=LENGTH, seed=1)
    own = dict(batch_size=2, max_length=LENGTH, seed=1, process_count=process_count)
    parts = [row_batches(rows, process_index=index, **own) for index in range(process_count)]
    epoch: list[int] = []
    for _ in range(24 // (2 * process_count)):
        batches = [next(part) for part in parts]
        seen = [set(numbers(batch)) for batch in batches]
        assert not set.intersection(*seen)
        together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        assert_equal_batches([together], [next(joint)])
        epoch += numbers(together)
    assert sorted(epoch) == list(range(24))


@pytest.mark.parametrize("before", [0, 1, 7, 13])
def test_a_restored_state_goes_on_with_the_same_batches(before: int) -> None:
    batches = fresh()
    taken(batches, before)
    state = batches.get_state()
    expected = list(itertools.islice(batches, 6))
    other = fresh()
    taken(other, 3)
    other.set_state(state)
    assert_equal_batches(itertools.islice(other, 6), expected)


def test_orbax_restores_the_place_with_the_state(tmp_path: Path) -> None:
    batches = fresh()
    taken(batches, 4)
    state = {"step": jnp.int32(4)}
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        items = {
            "state": ocp.args.StandardSave(state),
            "data": grain.checkpoint.CheckpointSave(batches),
        }
        checkpoints.save(4, args=ocp.args.Composite(**items))
        expected = list(itertools.islice(batches, 4))  # taken while the save may still be under way
        checkpoints.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        items = {
            "state": ocp.args.StandardRestore(state),
            "data": grain.checkpoint.CheckpointRestore(fresh()),
        }
        restored = checkpoints.restore(4, args=ocp.args.Composite(**items))
    assert int(restored["state"]["step"]) == 4
    assert_equal_batches(itertools.islice(restored["data"], 4), expected)


def test_row_batches_refuses() -> None:
    with pytest.raises(InputError, match="3 rows cannot fill a batch of 4"):
        fresh(rows=3)
    with pytest.raises(InputError, match="7 rows cannot fill a batch of 8"):
        fresh(rows=7, process_index=1, process_count=2)
    with pytest.raises(InputError, match="seed must lie in"):
        fresh(seed=-1)
    long = f"a row has {LENGTH} tokens, more than max_length {LENGTH - 1}"
    with pytest.raises(ValueError, match=long):
        row_batches(make_rows(30), batch_size=4, max_length=LENGTH - 1, seed=0)
    with pytest.raises(ValueError, match="process_index 2 is not one of 2"):
        fresh(rows=30, process_index=2, process_count=2)


@pytest.mark.pitfall(
    "shapes that depend on the data: recompilation late in an epoch",
    seen="data/pipeline.py: padded to the longest of a batch",
)
@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 4), (9, 4), (15, 4), (3, 1)])
def test_heldout_batches_drop_nothing(count: int, batch_size: int) -> None:
    rows = make_rows(count)
    batches = list(heldout_batches(rows, batch_size=batch_size, max_length=LENGTH))
    assert len(batches) == -(-count // batch_size)
    seen = [number for batch in batches for number in numbers(batch)]
    assert seen == [*range(count), *[-1] * (len(seen) - count)]
    assert [int(number) for batch in batches for number in batch["row_numbers"][:, 0]] == seen
    for batch in batches:
        assert batch["input_ids"].shape == batch["loss_mask"].shape == (batch_size, LENGTH)
    marks = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert marks == sum(int(row.loss_mask.sum()) for row in rows)


@pytest.mark.parametrize("count", [1, 9, 16])
def test_heldout_batches_of_two_processes_are_as_many(count: int) -> None:
    own = dict(batch_size=4, max_length=LENGTH, process_count=2)
    parts = [heldout_batches(make_rows(count), process_index=index, **own) for index in (0, 1)]
    pairs = list(zip(*parts, strict=True))  # as many of each
    seen = [number for pair in pairs for batch in pair for number in numbers(batch)]
    assert [number for number in seen if number >= 0] == list(range(count))


def test_heldout_batches_refuses() -> None:
    with pytest.raises(InputError, match="no held-out rows"):
        heldout_batches([], batch_size=4, max_length=LENGTH)
    with pytest.raises(ValueError, match="more than max_length"):
        heldout_batches(make_rows(30), batch_size=4, max_length=LENGTH - 1)
