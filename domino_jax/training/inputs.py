"""What a run reads: its rows as batches on the devices, and its target."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from domino_jax.config import DataConfig, RunConfig
from domino_jax.data.conversations import Row, load_rows
from domino_jax.data.packing import Pack, pack_rows, padding_share, row_lengths, single_packs
from domino_jax.data.pipeline import heldout_batches, row_batches
from domino_jax.sharding import make_mesh, partition_spec
from domino_jax.strict import InputError
from domino_jax.training.step import Batch

Say = Callable[[str], None]


class InputRows(NamedTuple):
    """The rows of a run, and which of them share one row of a batch (None without packing)."""

    rows: Sequence[Row]
    packs: list[Pack] | None

    @property
    def epoch_rows(self) -> int:
        """Rows of batches in one epoch."""
        return len(self.rows) if self.packs is None else len(self.packs)

    def summary(self, *, max_length: int) -> str:
        """How many they are and what share of their positions is padding, in words."""
        packs = single_packs(len(self.rows)) if self.packs is None else self.packs
        share = padding_share(row_lengths(self.rows), packs, max_length=max_length)
        packed = "" if self.packs is None else f" packed from {len(self.rows)} conversations"
        return f"{self.epoch_rows} rows{packed} ({share:.1%} of their positions are padding)"


def read_rows(path: str, tokenizer: Any, data: DataConfig, *, say: Say) -> InputRows:
    """Reads and encodes conversations, tells which lines were left out, and packs the rows if the run packs.

    Raises:
        InputError: the file cannot be read or gives no row.
    """
    rows, bad_lines = load_rows(
        path, tokenizer, max_length=data.max_length, mask_reasoning_content=data.mask_reasoning_content
    )
    for bad in bad_lines[:5]:
        say(f"{path}:{bad.line}: {bad.reason}")
    if bad_lines:
        say(f"{path}: {len(bad_lines)} of {len(bad_lines) + len(rows)} lines left out")
    return with_packs(rows, data)


def with_packs(rows: Sequence[Row], data: DataConfig) -> InputRows:
    """The rows, packed if the run packs."""
    return InputRows(rows, pack_rows(row_lengths(rows), max_length=data.max_length) if data.packing else None)


def training_batches(inputs: InputRows, config: RunConfig) -> grain.DatasetIterator:
    """The endless shuffled batches of this process, each of all micro-batches of a step (see `row_batches`)."""
    return row_batches(
        inputs.rows,
        batch_size=config.data.batch_size * config.optimizer.grad_accumulation // jax.process_count(),
        max_length=config.data.max_length,
        seed=config.seed,
        packs=inputs.packs,
    )


def evaluation_batches(inputs: InputRows, config: RunConfig) -> grain.DatasetIterator:
    """One pass over held-out rows (see `heldout_batches`)."""
    size = config.data.batch_size // jax.process_count()
    return heldout_batches(inputs.rows, batch_size=size, max_length=config.data.max_length, packs=inputs.packs)


def device_batch(mesh: Mesh, rows: dict[str, np.ndarray], *, micro_batches: int) -> Batch:
    """Puts the rows of this process on the devices: arrays [A * B, ...] -> `Batch` of [A, B, ...] of all processes."""

    def put(x: np.ndarray) -> jax.Array:
        layout = NamedSharding(mesh, partition_spec(None, "batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_process_local_data(layout, x.reshape(micro_batches, -1, *x.shape[1:]))

    return Batch(**{name: put(x) for name, x in rows.items()})


def run_mesh(config: RunConfig) -> Mesh:
    """The mesh of a run over all devices.

    Raises:
        InputError: the sizes do not fit the devices, or the batch does not divide over them.
    """
    try:
        mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    except ValueError as error:
        raise InputError(f"mesh: {error}") from error
    parts = mesh.size // config.mesh.tensor
    if config.data.batch_size % parts:
        raise InputError(f"data.batch_size {config.data.batch_size} must be a multiple of its {parts} devices")
    return mesh
