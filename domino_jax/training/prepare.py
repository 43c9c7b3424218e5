"""A run before its first step: its inputs read and checked, its weights laid out over the devices."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from domino_jax.config import RunConfig, dump_config
from domino_jax.data.template import chat_template
from domino_jax.interop.start import check_start
from domino_jax.strict import InputError
from domino_jax.target.gguf import resolve_target
from domino_jax.target.load import TABLES, load_sharded_target, load_tokenizer, open_target, read_decoder_config
from domino_jax.training.checkpoint import DraftRecord, has_checkpoint
from domino_jax.training.inputs import InputRows, Say, draft_of, read_features, read_rows, run_mesh
from domino_jax.training.preflight import check_packages, check_place, check_room, check_sources, packages_of
from domino_jax.training.program import make_program, resolved
from domino_jax.training.run_directory import claim
from domino_jax.training.start import state_at_start
from domino_jax.training.step import Program, TrainState


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """A run whose inputs are read and checked; no weights are loaded and nothing is written yet.

    `config` is resolved, `target` the directory, `started` whether there is a checkpoint.
    """

    config: RunConfig
    directory: Path
    started: bool
    target: Path
    tokenizer: Any
    rows: InputRows
    heldout: InputRows | None
    record: DraftRecord
    program: Program
    mesh: Mesh
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Run(RunInputs):
    """Everything a run needs; `state` is the one at step 0."""

    target_params: Any
    state: TrainState


def read_inputs(config: RunConfig, *, say: Say) -> RunInputs:
    """Checks a run, then reads its tokenizer and rows: what is free first, what takes time last.

    Raises:
        InputError: the run cannot be; nothing was created.
    """
    directory = Path(config.run_dir)
    started = has_checkpoint(directory)
    check_packages(packages_of(config))
    check_sources(config, started=started)
    check_place(directory)
    mesh = run_mesh(config)
    config = resolved(config, mesh)
    path = resolve_target(config.target, progress=say)
    target_config = read_decoder_config(path, dtype=config.dtype)
    open_target(path, target_config)  # checked by its headers
    tokenizer = load_tokenizer(path)
    draft_config = draft_of(config, target_config, tokenizer)
    if config.draft.init_from and not started:
        check_start(config.draft.init_from, draft_config)
    check_room(config, draft_config)
    data = config.data
    template = chat_template(tokenizer, data.chat_template_kwargs)

    say(f"loading rows {' and '.join(x for x in (data.train, data.features, data.heldout) if x)}")
    if data.train is None:
        rows = read_features(config, path, tokenizer, draft_config)
    else:
        rows = read_rows(data.train, tokenizer, data, say=say)
    heldout = read_rows(data.heldout, tokenizer, data, say=say) if data.heldout else None
    step_rows = data.batch_size * config.optimizer.grad_accumulation
    if rows.epoch_rows < step_rows:
        raise InputError(
            f"{data.train or data.features}: {rows.epoch_rows} rows cannot fill a step of {step_rows} "
            f"(data.batch_size {data.batch_size} x optimizer.grad_accumulation {config.optimizer.grad_accumulation})"
        )
    total_steps = config.train.steps or max(config.train.epochs * rows.epoch_rows // step_rows, 1)
    return RunInputs(
        config=config,
        directory=directory,
        started=started,
        target=path,
        tokenizer=tokenizer,
        rows=rows,
        heldout=heldout,
        record=DraftRecord(draft_config, config.target, template),
        program=make_program(config, target_config, draft_config, mesh, total_steps=total_steps),
        mesh=mesh,
        total_steps=total_steps,
    )


def prepare(config: RunConfig, *, console: Console) -> Run:
    """Reads a run's inputs and lays everything out on the devices; nothing is trained yet.

    The run directory is made last: a run that is refused leaves none.

    Raises:
        InputError: the run cannot be, or its directory belongs to other settings.
    """
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    inputs = read_inputs(config, say=say)
    config, mesh, draft = inputs.config, inputs.mesh, inputs.record.config
    say(f"loading target {inputs.target}")
    target_runs = config.data.features is None or config.data.heldout is not None
    only = (lambda path: True) if target_runs else (lambda path: path[0] in TABLES)
    target = load_sharded_target(inputs.target, inputs.program.target, mesh, only=only)
    layers_from = init_from = None
    if not inputs.started:  # otherwise a checkpoint is about to replace the state
        layers_from = inputs.target if config.draft.init_layers_from_target else None
        init_from = config.draft.init_from
    state = state_at_start(inputs.program, draft, mesh, layers_from=layers_from, init_from=init_from)
    claim(inputs.directory, config, started=inputs.started)
    run = Run(**vars(inputs), target_params=target.params, state=state)
    say(dump_config(config))
    for name, part in (("training", run.rows), ("held out", run.heldout)):
        if part is not None:
            say(f"{name}: {part.summary(max_length=config.data.max_length)}")
    say(
        f"{run.total_steps} steps of {config.data.batch_size * config.optimizer.grad_accumulation} rows on {mesh.size} "
        f"{mesh.devices.flat[0].platform} device(s); the draft reads the target's layers {list(draft.target_layer_ids)}"
    )
    return run
