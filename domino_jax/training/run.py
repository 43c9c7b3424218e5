"""The prepared run: rows, program, state and settings, without the configuration.

`prepare` makes these records; the loop, the passes and the preview read them:

    Run -> target_params, state     arrays on the devices
        -> inputs: RunInputs        all else; a dry run ends with it
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from domino_jax.data.pipeline import row_batches
from domino_jax.objective.objectives import objective_named
from domino_jax.sharding import axis_size
from domino_jax.training.inputs import InputRows
from domino_jax.training.program import BatchShape
from domino_jax.training.records import DraftRecord, Resumed
from domino_jax.training.step import Program, TrainState


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Intervals and limits of the training loop: the keys of `train` that it reads."""

    log_every: int
    eval_every: int
    rollout_every: int | None
    rollout_tokens: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_best: str | None
    max_nonfinite_steps: int
    tensorboard: bool
    profile: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """A run whose rows are read.

    Attributes:
        source: file or directory of the training rows.
        target: directory of the target, whose tokenizer `tokenizer` is.
        resumed: the checkpoint that replaces the state of step 0.
        prompts: of rollouts, int32 [n] each.
        learning_rate: the rate as a function of the number of updates.
        last_step: the step at which the run ends.
        hashes: a few words with the hash of each input, by name.
        settings: the resolved configuration as plain values, for the record of a checkpoint.
    """

    directory: Path
    source: str
    mesh: Mesh
    target: Path
    tokenizer: Any
    record: DraftRecord
    resumed: Resumed | None
    rows: InputRows
    heldout: InputRows | None
    prompts: Sequence[np.ndarray]
    shape: BatchShape
    program: Program
    learning_rate: optax.Schedule
    cadence: Cadence
    last_step: int
    hashes: Mapping[str, str]
    settings: Mapping[str, Any]

    def batches(self) -> Any:
        """The endless shuffled batches of this process, from the first (see `row_batches`)."""
        return row_batches(
            self.rows.rows,
            # One batch a step: a position that is saved never lies between two micro-batches.
            batch_size=self.shape.step_rows // jax.process_count(),
            max_length=self.shape.max_length,
            seed=self.program.seed,
            packs=self.rows.packs,
            # Captured states lie on disk, so the next batches are read while this one trains.
            read_ahead=2 if self.rows.captured else 0,
        )


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs.

    `state` is that of step 0; of a resumed run its shapes and shardings, for the checkpoint's.
    """

    inputs: RunInputs
    target_params: Any
    state: TrainState


def announcement(run: RunInputs) -> Iterator[str]:
    """The lines that a run begins with: rows, heads, memory of the loss, steps and devices."""
    record = run.record
    for name, part in (("training", run.rows), ("held out", run.heldout)):
        if part is not None:
            yield f"{name}: {part.summary(max_length=run.shape.max_length)}"
    parts = axis_size("kv_heads", run.mesh)
    for name, heads in (
        ("target", run.program.target.cfg.num_key_value_heads),
        ("draft", record.config.num_key_value_heads),
    ):
        if heads % parts:
            yield (
                f"the {name}'s {heads} key-value heads do not divide over mesh.tensor {parts}: "
                "each of these devices attends with all of them"
            )
    trainer = run.program.trainer
    if objective_named(trainer.loss_type).cost is not None:
        predictions = trainer.num_anchors * record.config.num_predictions
        size = 4 * run.shape.batch_size * predictions * record.config.vocab_size / 2**30
        yield (
            f"loss.loss_type {trainer.loss_type} reads whole logits: each array of them takes "
            f"{size:.3g} GiB over all devices, and loss.logits_mib bounds nothing"
        )
    yield (
        f"{run.last_step} steps of {run.shape.step_rows} rows on {run.mesh.size} "
        f"{run.mesh.devices.flat[0].platform} device(s); the draft reads the target's layers "
        f"{list(record.config.target_layer_ids)}"
    )
