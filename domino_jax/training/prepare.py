"""A run before its first step: its inputs read and checked, its weights laid out over the devices."""

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console

from domino_jax.config import RunConfig, dump_config
from domino_jax.data.template import chat_template
from domino_jax.target.fingerprint import hashed_beside, tokenizer_fingerprint
from domino_jax.target.gguf import resolve_target
from domino_jax.target.load import TABLES, load_sharded_target, load_tokenizer, read_decoder_config
from domino_jax.training.checkpoint import CHECKPOINTS, DraftRecord, RunRecord, read_run_record, sound_checkpoint
from domino_jax.training.inputs import InputRows, Say, draft_of, read_features, read_rows, run_mesh
from domino_jax.training.program import make_program, resolved
from domino_jax.training.run_directory import check_draft, check_inputs, check_settings, write_config
from domino_jax.training.start import state_at_start
from domino_jax.training.step import Program, TrainState


class Resumed(NamedTuple):
    """The checkpoint that a run is resumed from."""

    step: int
    record: RunRecord


@dataclass(frozen=True)
class Run:
    """Everything a run needs once its inputs are read.

    `state` is the one at step 0, `resumed` the checkpoint that is to replace it; `total_steps` are
    those that the schedules are stretched over, `last_step` is where the run ends.
    """

    config: RunConfig
    directory: Path
    rows: InputRows
    heldout: InputRows | None
    record: DraftRecord
    program: Program
    mesh: Mesh
    target_params: Any
    state: TrainState
    total_steps: int
    last_step: int
    inputs: dict[str, str]
    resumed: Resumed | None


def prepare(config: RunConfig, *, console: Console) -> Run:
    """Reads target, tokenizer and rows and lays everything out on the devices; nothing is trained yet."""
    mesh = run_mesh(config)
    config = resolved(config, mesh)
    directory = Path(config.run_dir)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    path = resolve_target(config.target, progress=say)
    with hashed_beside(path) as target_sha256:
        tokenizer = load_tokenizer(path)
        data = config.data
        target_config = read_decoder_config(path, dtype=config.dtype)
        draft_config = draft_of(config, target_config, tokenizer)
        say(f"loading rows {' and '.join(x for x in (data.train, data.features, data.heldout) if x)}")
        if data.train is None:
            rows = read_features(config, path, tokenizer, draft_config, target_sha256=target_sha256())
        else:
            rows = read_rows(data.train, tokenizer, data, say=say)
        heldout = read_rows(data.heldout, tokenizer, data, say=say) if data.heldout else None
        template = chat_template(tokenizer, data.chat_template_kwargs)
        record = DraftRecord(draft_config, config.target, template)
        inputs = {"tokenizer": f"sha256 {tokenizer_fingerprint(path, tokenizer)}"}
        inputs |= {"data.train" if data.train else "data.features": rows.fingerprint}
        inputs |= {"data.heldout": heldout.fingerprint} if heldout else {}
        resumed = resumable(config, record, inputs, say=say)

        step_rows = config.data.batch_size * config.optimizer.grad_accumulation
        total_steps = config.train.steps or max(config.train.epochs * rows.epoch_rows // step_rows, 1)
        program = make_program(config, target_config, draft_config, mesh, total_steps=total_steps)
        say(f"loading target {path}")
        target_runs = data.features is None or data.heldout is not None
        only = (lambda path: True) if target_runs else (lambda path: path[0] in TABLES)
        target = load_sharded_target(path, program.target, mesh, only=only)
        began = time.monotonic()
        record = dataclasses.replace(record, target_sha256=target_sha256())
        say(f"target sha256 {record.target_sha256}, {time.monotonic() - began:.1f} s more than loading")
    inputs |= {"target": f"sha256 {record.target_sha256}"}
    layers_from = init_from = None
    if resumed is not None:  # a checkpoint is about to replace the state
        check_inputs(directory / CHECKPOINTS / str(resumed.step), resumed.record.inputs, inputs)
    else:
        layers_from = path if config.draft.init_layers_from_target else None
        init_from = config.draft.init_from
    run = Run(
        config=config,
        directory=directory,
        rows=rows,
        heldout=heldout,
        record=record,
        program=program,
        mesh=mesh,
        target_params=target.params,
        state=state_at_start(program, draft_config, mesh, layers_from=layers_from, init_from=init_from),
        total_steps=total_steps,
        last_step=total_steps + config.train.extend,
        inputs=inputs,
        resumed=resumed,
    )
    write_config(directory, config)
    say(dump_config(config))
    for name, part in (("training", rows), ("held out", heldout)):
        if part is not None:
            say(f"{name}: {part.summary(max_length=config.data.max_length)}")
    say(
        f"{run.last_step} steps of {step_rows} rows on {mesh.size} {mesh.devices.flat[0].platform} device(s); the "
        f"draft reads the target's layers {list(draft_config.target_layer_ids)}",
    )
    return run


def resumable(config: RunConfig, record: DraftRecord, inputs: dict[str, str], *, say: Say) -> Resumed | None:
    """The checkpoint that a run goes on from, None for a run that was never saved.

    Args:
        config: of this start, resolved.
        record: of this start; the target's fingerprint is not looked at.
        inputs: those that are known by now.
        say: is told damaged checkpoints, which are set aside.
    Raises:
        InputError: settings, target or inputs are not those that the run was started with.
    """
    directory = Path(config.run_dir)
    step = sound_checkpoint(directory, say=say, set_aside=True)
    if step is None:
        return None
    place = directory / CHECKPOINTS / str(step)
    draft, run = read_run_record(directory, step)
    check_settings(place, run.config, config)
    check_draft(place, draft, record)
    check_inputs(place, run.inputs, inputs)
    return Resumed(step, run)
