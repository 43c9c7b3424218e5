"""A run before its first step, in the order of what it costs to be refused.

A mistake in a path should not be told only after the weights are loaded, and a refused run should
leave nothing behind.

    check         paths, mesh, ids, room on the disk, the checkpoint to resume from    seconds
    read_inputs   rows, and whether they are those of the checkpoint                   minutes
    prepare       weights over the devices, the state, and only then the directory
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from domino_jax.base.errors import InputError
from domino_jax.base.progress import Reporter
from domino_jax.config.model import DecoderConfig
from domino_jax.config.run import RunConfig, dump_config
from domino_jax.data.template import chat_template
from domino_jax.interop.start import check_start
from domino_jax.objective.objectives import objective_named
from domino_jax.sharding import parts_of
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.fingerprint import hashed_beside, tokenizer_fingerprint
from domino_jax.target.load import (
    TABLES,
    ParameterPath,
    load_sharded_target,
    load_tokenizer,
    open_target,
)
from domino_jax.target.resolve import resolve_target
from domino_jax.training.checkpoint import CHECKPOINTS, NEWEST, sound_checkpoint
from domino_jax.training.inputs import (
    InputRows,
    draft_of,
    read_features,
    read_prompts,
    read_rows,
    run_mesh,
    training_batches,
)
from domino_jax.training.preflight import (
    check_one_process,
    check_packages,
    check_place,
    check_room,
    check_sources,
    packages_of,
)
from domino_jax.training.program import make_program, resolved, state_layout
from domino_jax.training.records import DraftRecord, RunRecord, read_draft_record, read_run_record
from domino_jax.training.run_directory import (
    check_draft,
    check_inputs,
    check_settings,
    write_config,
)
from domino_jax.training.start import state_at_start
from domino_jax.training.step import Program, TrainState


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run is resumed from."""

    step: int
    record: RunRecord


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that is possible as far as can be told without its rows and weights.

    `config` is resolved, `target` the directory, `resumed` the checkpoint that is to replace the
    state of step 0.
    """

    config: RunConfig
    directory: Path
    mesh: Mesh
    target: Path
    target_config: DecoderConfig
    tokenizer: Any
    record: DraftRecord
    resumed: Resumed | None


@dataclass(frozen=True, kw_only=True)
class RunInputs(CheckedRun):
    """A run whose rows are read.

    `total_steps` are those that the schedules are stretched over, `last_step` is where the run
    ends, `inputs` tells by name what was read. `prompts`, int32 [n] each, are those of rollouts.
    """

    rows: InputRows
    heldout: InputRows | None
    prompts: Sequence[np.ndarray]
    program: Program
    total_steps: int
    last_step: int
    inputs: dict[str, str]

    @property
    def step_rows(self) -> int:
        """Batch rows that a step takes."""
        return self.config.data.batch_size * self.config.optimizer.grad_accumulation

    def batches(self) -> Any:
        """The endless shuffled batches of this process, from the first (see `row_batches`)."""
        return training_batches(
            self.rows,
            step_rows=self.step_rows,
            max_length=self.config.data.max_length,
            seed=self.config.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Run(RunInputs):
    """Everything a run needs.

    `state` is the one at step 0; of a resumed run shapes and shardings, for the checkpoint's.
    """

    target_params: Any
    state: TrainState


def check(config: RunConfig, *, reporter: Reporter, set_aside: bool) -> CheckedRun:
    """Checks whatever can be checked before rows and weights are read, what is free first.

    Args:
        config: the run.
        reporter: is told each stage, and each damaged checkpoint.
        set_aside: move damaged checkpoints out of the way.
    Raises:
        InputError: the run cannot be, or its directory belongs to other settings; nothing was
            created.
    """
    directory = Path(config.run_dir)
    # Either says that the run was saved. What is gone is told later, and no reason to begin anew.
    started = (directory / NEWEST).exists() or (directory / CHECKPOINTS).is_dir()
    check_packages(packages_of(config))
    check_sources(config, started=started)
    check_place(config.run_dir)
    check_one_process("train")
    mesh = run_mesh(config)
    config = resolved(config, mesh)  # what is left open is chosen for the mesh's devices
    path = resolve_target(config.target, reporter=reporter)
    target_config = read_decoder_config(path, dtype=config.dtype)
    open_target(path, target_config)  # its headers are read and checked
    tokenizer = load_tokenizer(path)
    draft_config = draft_of(config, target_config, tokenizer)
    if config.draft.init_from and not started:
        check_start(config.draft.init_from, draft_config)
    check_room(config, draft_config)
    record = DraftRecord(
        draft_config,
        config.target,
        chat_template(tokenizer, config.data.chat_template_kwargs),
        tokenizer_sha256=tokenizer_fingerprint(path, tokenizer),
    )
    return CheckedRun(
        config=config,
        directory=directory,
        mesh=mesh,
        target=path,
        target_config=target_config,
        tokenizer=tokenizer,
        record=record,
        # The last check: it reads every byte of a checkpoint.
        resumed=_resumable(config, record, reporter=reporter, set_aside=set_aside),
    )


def read_inputs(
    run: CheckedRun, *, target_sha256: Callable[[], str], reporter: Reporter
) -> RunInputs:
    """Reads the rows of a run.

    Args:
        run: what was checked.
        target_sha256: returns the target's fingerprint; only asked where captured states are read.
        reporter: is told each stage, and each line of the data that is left out.
    Raises:
        InputError: no usable rows, too few of them, or not those that the run was started with.
    """
    config = run.config
    data, tokenizer = run.config.data, run.tokenizer
    sources = [place for place in (data.train, data.hidden_states, data.eval) if place]
    reporter.say(f"loading rows {' and '.join(sources)}")
    if data.train is None:
        rows = read_features(
            config, run.target, tokenizer, run.record.config, target_sha256=target_sha256()
        )
    else:
        rows = read_rows(data.train, tokenizer, data, reporter=reporter)
    inputs = {"tokenizer": f"sha256 {run.record.tokenizer_sha256}"}
    inputs["data.train" if data.train else "data.hidden_states"] = rows.fingerprint
    heldout = None
    prompts: Sequence[np.ndarray] = ()
    if data.eval:
        heldout = read_rows(data.eval, tokenizer, data, reporter=reporter)
        inputs["data.eval"] = heldout.fingerprint
        if config.train.rollout_every is not None:
            prompts = read_prompts(config, heldout.rows, tokenizer, run.target_config)
    if run.resumed is not None:
        # Without the target, whose hash may not be there yet: `prepare` compares it.
        check_inputs(
            run.directory / CHECKPOINTS / str(run.resumed.step), run.resumed.record.inputs, inputs
        )

    step_rows = data.batch_size * config.optimizer.grad_accumulation
    if rows.epoch_rows < step_rows:
        raise InputError(
            f"{data.train or data.hidden_states}: {rows.epoch_rows} rows cannot fill a step of "
            f"{step_rows} (data.batch_size {data.batch_size} x optimizer.grad_accumulation "
            f"{config.optimizer.grad_accumulation})"
        )
    epochs_rows = config.train.epochs * rows.epoch_rows
    total_steps = config.train.steps or max(epochs_rows // step_rows, 1)
    program = make_program(
        config, run.target_config, run.record.config, run.mesh, total_steps=total_steps
    )
    return RunInputs(
        **vars(run),
        rows=rows,
        heldout=heldout,
        prompts=prompts,
        program=program,
        total_steps=total_steps,
        # The schedules are not stretched over the extension: it trains on at their last values.
        last_step=total_steps + config.train.extra_steps,
        inputs=inputs,
    )


def prepare(config: RunConfig, *, reporter: Reporter) -> Run:
    """Checks and reads a run and lays everything out on the devices; nothing is trained yet.

    The run directory is made last: a run that is refused leaves none.

    Raises:
        InputError: the run cannot be, or is not the one that was started.
    """
    checked = check(config, reporter=reporter, set_aside=True)
    # Hashed in a thread meanwhile: the weights are gigabytes, which loading reads as well.
    with hashed_beside(checked.target) as target_sha256:
        run = read_inputs(checked, target_sha256=target_sha256, reporter=reporter)
        config, resumed = run.config, run.resumed
        reporter.say(f"loading target {run.target}")
        target_params = _target_params(run)
        began = time.monotonic()
        record = dataclasses.replace(run.record, target_sha256=target_sha256())
        reporter.say(
            f"target sha256 {record.target_sha256}, {time.monotonic() - began:.1f} s more than "
            "loading"
        )
    inputs = run.inputs | {"target": f"sha256 {record.target_sha256}"}
    if resumed is None:
        state = state_at_start(
            run.program,
            record.config,
            run.mesh,
            layers_from=run.target if config.draft.init_layers_from_target else None,
            init_from=config.draft.init_from,
        )
    else:
        check_inputs(run.directory / CHECKPOINTS / str(resumed.step), resumed.record.inputs, inputs)
        # Its layout alone: beside the restored state the devices might not hold a second one.
        state = state_layout(run.program, record.config, run.mesh)
    # The first thing that is written: nothing is left that could refuse the run.
    text = dump_config(config)
    write_config(run.directory, text)
    reporter.say(text)
    # A new object of a later class: who holds a `Run` knows that all of it is there.
    known = vars(run) | {"record": record, "inputs": inputs}
    whole = Run(**known, target_params=target_params, state=state)
    _tell(whole, reporter)
    return whole


def _tell(run: Run, reporter: Reporter) -> None:
    """What is about to be trained, on what, and how long."""
    config, record = run.config, run.record
    for name, part in (("training", run.rows), ("held out", run.heldout)):
        if part is not None:
            reporter.say(f"{name}: {part.summary(max_length=config.data.max_length)}")
    parts = parts_of("kv_heads", run.mesh)
    for name, heads in (
        ("target", run.target_config.num_key_value_heads),
        ("draft", record.config.num_key_value_heads),
    ):
        if heads % parts:
            reporter.say(
                f"the {name}'s {heads} key-value heads do not divide over mesh.tensor {parts}: "
                "each of these devices attends with all of them"
            )
    cost = objective_named(config.loss.loss_type).cost
    if cost is not None:
        predictions = config.loss.num_anchors * record.config.num_predictions
        size = 4 * config.data.batch_size * predictions * record.config.vocab_size / 2**30
        reporter.say(
            f"loss.loss_type {config.loss.loss_type} reads whole logits: each array of them takes "
            f"{size:.3g} GiB over all devices, and loss.logits_mib bounds nothing"
        )
    reporter.say(
        f"{run.last_step} steps of {run.step_rows} rows on {run.mesh.size} "
        f"{run.mesh.devices.flat[0].platform} device(s); the draft reads the target's layers "
        f"{list(record.config.target_layer_ids)}",
    )


def _target_params(run: RunInputs) -> Any:
    """The target's parameters that steps, held-out passes and rollouts of a run read."""
    data = run.config.data
    # Rollouts too are of held-out rows.
    target_runs = data.hidden_states is None or data.eval is not None

    def read(path: ParameterPath) -> bool:
        # Captured states stand for the layers; head and embedding are read either way.
        return target_runs or path[0] in TABLES

    return load_sharded_target(run.target, run.program.target, run.mesh, only=read).params


def _resumable(
    config: RunConfig, record: DraftRecord, *, reporter: Reporter, set_aside: bool
) -> Resumed | None:
    """The checkpoint that a run is resumed from, None for a run that was never saved.

    Args:
        config: of this start, resolved.
        record: of this start; the target's fingerprint is not looked at.
        reporter: is told damaged checkpoints.
        set_aside: move them out of the way.
    Raises:
        InputError: settings or target are not those that the run was started with.
    """
    directory = Path(config.run_dir)
    step = sound_checkpoint(directory, reporter=reporter, set_aside=set_aside)
    if step is None:
        return None
    place = directory / CHECKPOINTS / str(step)
    run = read_run_record(place)
    check_settings(place, run.config, dataclasses.asdict(config))
    check_draft(place, read_draft_record(place), record)
    return Resumed(step, run)
