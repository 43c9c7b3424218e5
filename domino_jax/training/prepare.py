"""A run before its first step: its inputs read and checked, its weights laid out over the devices."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from domino_jax.config import RunConfig, dump_config
from domino_jax.data.template import chat_template
from domino_jax.target.gguf import resolve_target
from domino_jax.target.load import TABLES, load_sharded_target, load_tokenizer, read_decoder_config
from domino_jax.training.checkpoint import DraftRecord, has_checkpoint
from domino_jax.training.inputs import InputRows, draft_of, read_features, read_rows, run_mesh
from domino_jax.training.program import make_program, resolved
from domino_jax.training.run_directory import claim
from domino_jax.training.start import state_at_start
from domino_jax.training.step import Program, TrainState


@dataclass(frozen=True)
class Run:
    """Everything a run needs once its inputs are read; `state` is the one at step 0."""

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


def prepare(config: RunConfig, *, console: Console) -> Run:
    """Reads target, tokenizer and rows and lays everything out on the devices; nothing is trained yet."""
    mesh = run_mesh(config)
    config = resolved(config, mesh)
    directory = Path(config.run_dir)
    started = has_checkpoint(directory)
    claim(directory, config, started=started)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    path = resolve_target(config.target, progress=say)
    tokenizer = load_tokenizer(path)
    data = config.data
    target_config = read_decoder_config(path, dtype=config.dtype)
    draft_config = draft_of(config, target_config, tokenizer)
    say(f"loading rows {' and '.join(x for x in (data.train, data.features, data.heldout) if x)}")
    if data.train is None:
        rows = read_features(config, path, tokenizer, draft_config)
    else:
        rows = read_rows(data.train, tokenizer, data, say=say)
    heldout = read_rows(data.heldout, tokenizer, data, say=say) if data.heldout else None

    step_rows = config.data.batch_size * config.optimizer.grad_accumulation
    total_steps = config.train.steps or max(config.train.epochs * rows.epoch_rows // step_rows, 1)
    program = make_program(config, target_config, draft_config, mesh, total_steps=total_steps)
    template = chat_template(tokenizer, data.chat_template_kwargs)
    say(f"loading target {path}")
    target_runs = data.features is None or data.heldout is not None
    only = (lambda path: True) if target_runs else (lambda path: path[0] in TABLES)
    target = load_sharded_target(path, program.target, mesh, only=only)
    layers_from = init_from = None
    if not started:  # otherwise a checkpoint is about to replace the state
        layers_from = path if config.draft.init_layers_from_target else None
        init_from = config.draft.init_from
    run = Run(
        config=config,
        directory=directory,
        rows=rows,
        heldout=heldout,
        record=DraftRecord(draft_config, config.target, template),
        program=program,
        mesh=mesh,
        target_params=target.params,
        state=state_at_start(program, draft_config, mesh, layers_from=layers_from, init_from=init_from),
        total_steps=total_steps,
    )
    say(dump_config(config))
    for name, part in (("training", rows), ("held out", heldout)):
        if part is not None:
            say(f"{name}: {part.summary(max_length=config.data.max_length)}")
    say(
        f"{total_steps} steps of {step_rows} rows on {mesh.size} {mesh.devices.flat[0].platform} device(s); the draft "
        f"reads the target's layers {list(draft_config.target_layer_ids)}",
    )
    return run
