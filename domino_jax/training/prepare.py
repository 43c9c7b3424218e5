"""The preparation of a run, in the order of what it costs to be refused.

A refused run leaves nothing behind. This is the only module of `training` that reads the
configuration: each part receives the values that it needs.

    check             paths, mesh, ids, room on the disk, the checkpoint to resume    seconds
    read_inputs       rows, and whether they are those of the checkpoint              minutes
    prepare           weights over the devices, the state, then the directory

    abstract_step     shapes and layouts of a step, for a plan
    capture_inputs    rows and target, for a capture of hidden states
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.core import FrozenDict
from jax.sharding import Mesh

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.files import write_whole
from domino_jax.base.output_paths import check_output_directory
from domino_jax.base.progress import Reporter
from domino_jax.config.draft import make_draft_config
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.config.run import RunConfig, dump_config
from domino_jax.config.sections import DataConfig, LossConfig
from domino_jax.data.conversations import Row
from domino_jax.data.hidden_states import MANIFEST, read_manifest
from domino_jax.data.prompt import stop_token_ids
from domino_jax.data.template import KWARGS, NO_KWARGS, chat_template, dated
from domino_jax.interop.start import check_start
from domino_jax.objective.curriculum import lambda_base_schedule
from domino_jax.objective.modules import build_trainer
from domino_jax.objective.objectives import (
    check_objective,
    checked_options,
    objective_named,
    reads_target,
)
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.fingerprint import hashed_beside, tokenizer_fingerprint
from domino_jax.target.load import TABLES, load_sharded_target, load_tokenizer, open_target
from domino_jax.target.resolve import resolve_target
from domino_jax.target.tokens import choose_mask_token, end_token_ids, special_token_ids
from domino_jax.training.checkpoint import CHECKPOINTS, NEWEST, sound_checkpoint
from domino_jax.training.inputs import RowSettings, read_features, read_prompts, read_rows, run_mesh
from domino_jax.training.optimizer import learning_rate_schedule, make_optimizer
from domino_jax.training.preflight import (
    check_conversations,
    check_directory,
    check_one_process,
    check_packages,
    check_pattern,
    check_room,
)
from domino_jax.training.program import (
    BatchShape,
    StepArguments,
    abstract_batch,
    abstract_state,
    abstract_target,
    chunk_blocks,
    default_logits_mib,
    scanned_target,
)
from domino_jax.training.records import DraftRecord, Resumed, read_draft_record, read_run_record
from domino_jax.training.run import Cadence, Run, RunInputs, announcement
from domino_jax.training.run_directory import check_draft, check_inputs, check_settings
from domino_jax.training.start import state_at_start
from domino_jax.training.step import Program

# Of a run whose rows are not read: constants of its schedules, and documents of a packed row.
_UNKNOWN_STEPS, _UNKNOWN_DOCUMENTS = 1000, 8


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that is possible as far as can be told without its rows and weights.

    `config` is resolved, `target` the directory, `resumed` the checkpoint that is to replace the
    state of step 0.
    """

    config: RunConfig
    mesh: Mesh
    target: Path
    target_config: DecoderConfig
    tokenizer: Any
    record: DraftRecord
    resumed: Resumed | None


def check(config: RunConfig, *, reporter: Reporter, set_aside: bool) -> CheckedRun:
    """Checks whatever can be checked before rows and weights are read, what is free first.

    With `set_aside` damaged checkpoints are moved out of the way.

    Raises:
        InputError: the run cannot be, or its directory belongs to other settings; nothing was
            created.
    """
    directory = Path(config.run_dir)
    data, recipe, train = config.data, config.draft, config.train
    optional = {"array_record": data.hidden_states is not None, "tensorboardX": train.tensorboard}
    check_packages(["grain", *(package for package, used in optional.items() if used)])
    check_conversations("data.train", data.train)
    check_conversations("data.eval", data.eval)
    check_directory(
        "data.hidden_states",
        data.hidden_states,
        lacking=MANIFEST,
        expected="a directory that `domino capture` wrote",
    )
    # A run that has a checkpoint never reads its start again, so that may be gone. Either path says
    # that the run was saved; what is gone is told later, and no reason to begin anew.
    started = (directory / NEWEST).exists() or (directory / CHECKPOINTS).is_dir()
    init_from = None if started else recipe.init_from
    check_directory(
        "draft.init_from",
        init_from,
        lacking="config.json",
        expected="the directory of a draft, as export writes it",
    )
    check_output_directory("run_dir", config.run_dir)
    check_pattern(config.run_dir)
    check_one_process("train")
    mesh = run_mesh(vars(config.mesh), batch_size=data.batch_size)
    config = resolved(config, mesh)  # what is left open is chosen for the mesh's devices
    path = resolve_target(config.target, reporter=reporter)
    target_config = read_decoder_config(path, dtype=config.dtype)
    open_target(path, target_config)  # its headers are read and checked
    tokenizer = load_tokenizer(path)
    draft_config = draft_of(config, target_config, tokenizer, directory=path, reporter=reporter)
    chosen = dataclasses.replace(config.draft, mask_token_id=draft_config.mask_token_id)
    config = dataclasses.replace(config, draft=chosen)
    if init_from:
        check_start(init_from, draft_config)
    check_room(
        config.run_dir,
        draft_config,
        average=config.optimizer.ema_decay is not None,
        keep=train.keep_checkpoints,
        keep_best=train.keep_best is not None,
    )
    # The last check: it reads every byte of a checkpoint.
    step = sound_checkpoint(directory, reporter=reporter, set_aside=set_aside)
    resumed = None
    if step is not None:
        source = directory / CHECKPOINTS / str(step)
        resumed = Resumed(step, source, read_run_record(source))
    data = dataclasses.replace(
        data, chat_template_kwargs=_dated_kwargs(data, tokenizer, resumed=resumed)
    )
    config = dataclasses.replace(config, data=data)
    record = DraftRecord(
        draft_config,
        config.target,
        chat_template(tokenizer, data.chat_template_kwargs),
        target_sha256=None,
        tokenizer_sha256=tokenizer_fingerprint(path, tokenizer),
    )
    if resumed is not None:
        check_settings(resumed.source, resumed.record.config, dataclasses.asdict(config))
        check_draft(resumed.source, read_draft_record(resumed.source), record)
    return CheckedRun(
        config=config,
        mesh=mesh,
        target=path,
        target_config=target_config,
        tokenizer=tokenizer,
        record=record,
        resumed=resumed,
    )


def read_inputs(
    run: CheckedRun, *, target_sha256: Callable[[], str], reporter: Reporter
) -> RunInputs:
    """Reads the rows of a run.

    Args:
        run: what was checked.
        target_sha256: returns the target's fingerprint; only called for captured states.
        reporter: receives each line of the data that is left out.
    Raises:
        InputError: no usable rows, too few of them, or not those that the run was started with.
    """
    config, data, train, loss = run.config, run.config.data, run.config.train, run.config.loss
    sources = [source for source in (data.train, data.hidden_states, data.eval) if source]
    reporter.say(f"loading rows {' and '.join(sources)}")
    settings = row_settings(data)
    read = functools.partial(
        read_rows,
        tokenizer=run.tokenizer,
        settings=settings,
        draft=run.record.config,
        packing=data.packing,
        max_unusable=data.max_unusable,
        special_tokens=data.special_tokens_in_text,
        end_ids=end_token_ids(run.target),
        reporter=reporter,
    )
    hashes = {"tokenizer": f"sha256 {run.record.tokenizer_sha256}"}
    if data.hidden_states is not None:
        rows = read_features(
            data.hidden_states,
            settings,
            target=target_sha256(),
            tokenizer=run.record.tokenizer_sha256,
            target_layer_ids=run.record.config.target_layer_ids,
            mask_token_id=run.record.config.mask_token_id,
            packing=data.packing,
            loss_type=loss.loss_type,
            kl_weight=loss.kl_weight,
        )
        hashes["data.hidden_states"] = rows.fingerprint
    else:
        rows = read(data.source)
        hashes["data.train"] = rows.fingerprint
    heldout = None
    prompts: Sequence[np.ndarray] = ()
    if data.eval:
        heldout = read(data.eval)
        hashes["data.eval"] = heldout.fingerprint
        if train.rollout_every is not None:
            prompts = read_prompts(
                data.eval,
                heldout.rows,
                run.tokenizer,
                run.target_config,
                chat_template_kwargs=data.chat_template_kwargs,
                count=train.rollout_prompts,
                rollout_tokens=train.rollout_tokens,
            )
    # Without the target, whose hash may not be there yet: `prepare` compares it.
    check_inputs(run.resumed, hashes)
    shape = _batch_shape(config)
    if rows.epoch_rows < shape.step_rows:
        raise InputError(
            f"{data.source}: {rows.epoch_rows} rows cannot fill a step of {shape.step_rows} "
            f"(data.batch_size {shape.batch_size} x optimizer.grad_accumulation "
            f"{shape.grad_accumulation})"
        )
    total_steps = train.steps or max(train.epochs * rows.epoch_rows // shape.step_rows, 1)
    return RunInputs(
        directory=Path(config.run_dir),
        source=data.source,
        mesh=run.mesh,
        target=run.target,
        tokenizer=run.tokenizer,
        record=run.record,
        resumed=run.resumed,
        rows=rows,
        heldout=heldout,
        prompts=prompts,
        shape=shape,
        program=make_program(
            config, run.target_config, run.record.config, run.mesh, total_steps=total_steps
        ),
        learning_rate=_learning_rate(config, total_steps=total_steps),
        cadence=Cadence(**{f.name: getattr(train, f.name) for f in dataclasses.fields(Cadence)}),
        # The schedules are not stretched over the extension: it trains on at their last values.
        last_step=total_steps + train.extra_steps,
        hashes=hashes,
        settings=dataclasses.asdict(config),
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
        inputs = read_inputs(checked, target_sha256=target_sha256, reporter=reporter)
        reporter.say(f"loading target {inputs.target}")
        # Captured states replace the layers, head and embedding are read either way. Held-out rows
        # have no captured states, and rollouts are of held-out rows.
        whole = not inputs.rows.captured or inputs.heldout is not None
        target_params = load_sharded_target(
            inputs.target,
            inputs.program.target,
            inputs.mesh,
            only=lambda path: whole or path[0] in TABLES,
        ).params
        began = time.monotonic()
        digest = target_sha256()
        reporter.say(f"target sha256 {digest}, {time.monotonic() - began:.1f} s more than loading")
    inputs = dataclasses.replace(
        inputs,
        record=dataclasses.replace(inputs.record, target_sha256=digest),
        hashes={**inputs.hashes, "target": f"sha256 {digest}"},
    )
    check_inputs(inputs.resumed, inputs.hashes)
    draft = inputs.record.config
    if inputs.resumed is None:
        recipe = config.draft
        state = state_at_start(
            inputs.program,
            draft,
            inputs.mesh,
            layers_from=inputs.target if recipe.init_layers_from_target else None,
            init_from=recipe.init_from,
        )
    else:
        # Its layout alone: beside the restored state the devices might not hold a second one.
        state = abstract_state(inputs.program, draft, inputs.mesh)
    # The first thing that is written: nothing is left that could refuse the run.
    text = dump_config(checked.config)
    inputs.directory.mkdir(parents=True, exist_ok=True)
    write_whole(inputs.directory / "config.yaml", text)
    for line in text.splitlines():
        reporter.say(line)
    for line in announcement(inputs):
        reporter.say(line)
    return Run(inputs, target_params, state)


def _dated_kwargs(data: DataConfig, tokenizer: Any, *, resumed: Resumed | None) -> Scalars:
    """The template kwargs of a run, with the date of its checkpoint, its inputs, or today."""
    recorded: list[Scalars | Path] = []
    if resumed is not None:
        # A record of another version may lack the section; `check_settings` refuses it.
        recorded.append(resumed.record.config.get("data", {}).get(KWARGS, NO_KWARGS))
    if data.hidden_states is not None:
        recorded.append(read_manifest(data.hidden_states).chat_template_kwargs)
    recorded += [Path(file) for file in (data.train, data.eval) if file is not None]
    return dated(tokenizer, data.chat_template_kwargs, *recorded)


def row_settings(data: DataConfig) -> RowSettings:
    """The settings of a run's rows."""
    return RowSettings(**{f.name: getattr(data, f.name) for f in dataclasses.fields(RowSettings)})


def _batch_shape(config: RunConfig) -> BatchShape:
    return BatchShape(
        grad_accumulation=config.optimizer.grad_accumulation,
        batch_size=config.data.batch_size,
        max_length=config.data.max_length,
    )


def draft_of(
    config: RunConfig, target: DecoderConfig, tokenizer: Any, *, directory: Path, reporter: Reporter
) -> DraftConfig:
    """The draft that a run trains for the target in a directory (see `make_draft_config`).

    A mask token that the run leaves open is chosen and reported; the same files give the same one.
    """
    # The end of a turn does not depend on the date.
    kwargs = dated(tokenizer, config.data.chat_template_kwargs)
    stop_ids = stop_token_ids(tokenizer, kwargs, end_ids=end_token_ids(directory))
    special_ids = special_token_ids(tokenizer, stop_ids)
    recipe = config.draft
    if recipe.mask_token_id is None:
        chosen = choose_mask_token(tokenizer, special_ids=special_ids, vocab_size=target.vocab_size)
        reporter.say(f"draft.mask_token_id {chosen.id}: {chosen.reason}")
        recipe = dataclasses.replace(recipe, mask_token_id=chosen.id)
    return make_draft_config(recipe, target, special_ids=special_ids, dtype=config.dtype)


def resolved(config: RunConfig, mesh: Mesh) -> RunConfig:
    """The run with a `resolved_loss`, and with the memory of the loss that suits the devices."""
    loss = resolved_loss(config.loss, domino=config.draft.projector_type is not None)
    if loss.logits_mib is None:
        loss = dataclasses.replace(loss, logits_mib=default_logits_mib(mesh))
    return dataclasses.replace(config, loss=loss)


def resolved_loss(loss: LossConfig, *, domino: bool) -> LossConfig:
    """A run's loss, checked, with the objective's own decay, divisor and options written out.

    So a run can be read from its record, whatever becomes of the defaults.

    Raises:
        InputError: as `check_objective`, with the place.
    """
    name = loss.loss_type
    gamma = loss.loss_decay_gamma
    try:
        own = objective_named(name)
        if gamma == "default":
            gamma = own.loss_decay_gamma
        check_objective(
            name,
            loss.options,
            normalize=loss.normalize,
            gamma=gamma,
            kl_weight=loss.kl_weight,
            domino=domino,
        )
    except InputError as error:
        # The place is named here: trainer modules check the same and have no section `loss`.
        raise InputError(f"loss: {error}") from error
    return dataclasses.replace(
        loss,
        loss_decay_gamma=gamma,
        normalize=loss.normalize or own.normalize,
        options=dataclasses.asdict(checked_options(name, loss.options)),
    )


def make_program(
    config: RunConfig, target: DecoderConfig, draft: DraftConfig, mesh: Mesh, *, total_steps: int
) -> Program:
    """The program of the steps of a run that is `resolved`.

    `mesh` is of devices that are here, or of a topology that is only described; the schedules are
    stretched over `total_steps`.
    """
    data, loss, optimizer = config.data, config.loss, config.optimizer
    assert loss.logits_mib is not None, "a run is resolved before its program is made"
    # The target's own distribution and its answers need its last layer; without them the captured
    # ones are enough. With rollouts each step runs the rest too: to cut the stacked layers there
    # would copy them.
    depth = max(draft.target_layer_ids) + 1
    rolled_out = config.train.rollout_every is not None
    if rolled_out or reads_target(loss.loss_type, kl_weight=loss.kl_weight):
        depth = target.num_hidden_layers
    # The rest are the curriculum's, or have another name in the trainer module.
    other = ("lambda_start", "decay_ratio", "options", "logits_mib")
    return Program(
        trainer=build_trainer(
            draft,
            chunk_blocks=chunk_blocks(
                draft,
                mesh,
                batch_size=data.batch_size,
                num_anchors=loss.num_anchors,
                logits_mib=loss.logits_mib,
            ),
            # A CPU has the memory, and no time to spare.
            recompute=mesh.devices.flat[0].platform != "cpu",
            loss_options=FrozenDict(loss.options),
            **{name: value for name, value in vars(loss).items() if name not in other},
        ),
        target=scanned_target(
            target, capture=draft.target_layer_ids, depth=depth, mesh=mesh, packed=data.packing
        ),
        optimizer=make_optimizer(
            _learning_rate(config, total_steps=total_steps),
            b1=optimizer.b1,
            b2=optimizer.b2,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
        ),
        curriculum=lambda_base_schedule(
            total_steps, lambda_start=loss.lambda_start, decay_ratio=loss.decay_ratio
        ),
        seed=config.seed,
        ema_decay=optimizer.ema_decay,
    )


def _learning_rate(config: RunConfig, *, total_steps: int) -> optax.Schedule:
    optimizer = config.optimizer
    return learning_rate_schedule(
        learning_rate=optimizer.learning_rate,
        warmup_ratio=optimizer.warmup_ratio,
        min_lr_ratio=optimizer.min_lr_ratio,
        total_steps=total_steps,
    )


@dataclass(frozen=True)
class Models:
    """The two models of a run, without weights."""

    target: DecoderConfig
    draft: DraftConfig


def read_models(config: RunConfig, *, reporter: Reporter) -> Models:
    """The models of a run from its target's config.json, and its tokenizer where there is one.

    Raises:
        InputError: no such target, or the draft does not fit it.
    """
    path = resolve_target(config.target, reporter=reporter)
    target = read_decoder_config(path, dtype=config.dtype)
    if (path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(path)
        draft = draft_of(config, target, tokenizer, directory=path, reporter=reporter)
        return Models(target, draft)
    reporter.say(f"{path}: no tokenizer; whether the mask token is a special one is not checked")
    draft = make_draft_config(config.draft, target, special_ids={}, dtype=config.dtype)
    return Models(target, draft)


@dataclass(frozen=True)
class AbstractStep:
    """The program of a step, its mesh, and the shapes and shardings of its arguments."""

    program: Program
    mesh: Mesh
    arguments: StepArguments


def abstract_step(config: RunConfig, models: Models, devices: Sequence[jax.Device]) -> AbstractStep:
    """The step of a run on devices that may not be here; no rows are read.

    Raises:
        InputError: mesh or batch do not divide over the devices.
    """
    mesh = run_mesh(vars(config.mesh), batch_size=config.data.batch_size, devices=devices)
    config = resolved(config, mesh)
    data, loss = config.data, config.loss
    steps = config.train.steps or _UNKNOWN_STEPS
    program = make_program(config, models.target, models.draft, mesh, total_steps=steps)
    captured = data.hidden_states is not None
    batch = abstract_batch(
        _batch_shape(config),
        models.draft,
        mesh,
        captured=captured,
        target_states=reads_target(loss.loss_type, kl_weight=loss.kl_weight),
        documents=_UNKNOWN_DOCUMENTS if data.packing else None,
    )
    # Captured states spare the layers, unless held-out rows need them.
    tables_only = captured and data.eval is None
    target = abstract_target(program.target, mesh, tables_only=tables_only)
    state = abstract_state(program, models.draft, mesh)
    return AbstractStep(program, mesh, StepArguments(state, target, batch))


@dataclass(frozen=True, kw_only=True)
class CaptureInputs:
    """The rows and the target of a capture, without weights; `target` is the directory."""

    target: Path
    target_config: DecoderConfig
    target_layer_ids: tuple[int, ...]
    tokenizer_sha256: str
    rows: Sequence[Row]
    settings: RowSettings
    mesh: Mesh
    batch_size: int


def capture_inputs(config: RunConfig, recorded: Scalars, *, reporter: Reporter) -> CaptureInputs:
    """Checks and reads a capture of a run's rows: what is free first, the rows last.

    Args:
        config: the run.
        recorded: template kwargs of an earlier start.
        reporter: receives each line of the data that is left out.
    Raises:
        InputError: no conversations, a target or a mesh that cannot be, or several processes.
    """
    data = config.data
    if data.train is None:
        raise InputError("data.train is missing: capture reads conversations")
    check_one_process("capture")
    check_packages(("grain", "array_record"))
    check_conversations("data.train", data.train)
    mesh = run_mesh(vars(config.mesh), batch_size=data.batch_size)
    path = resolve_target(config.target, reporter=reporter)
    target_config = read_decoder_config(path, dtype=config.dtype)
    open_target(path, target_config)  # its headers are checked; the weights stay unread
    tokenizer = load_tokenizer(path)
    kwargs = dated(tokenizer, data.chat_template_kwargs, recorded, Path(data.train))
    settings = row_settings(dataclasses.replace(data, chat_template_kwargs=kwargs))
    draft = draft_of(config, target_config, tokenizer, directory=path, reporter=reporter)
    rows = read_rows(
        data.train,
        tokenizer,
        settings,
        draft=draft,
        packing=False,
        max_unusable=data.max_unusable,
        special_tokens=data.special_tokens_in_text,
        end_ids=end_token_ids(path),
        reporter=reporter,
    )
    return CaptureInputs(
        target=path,
        target_config=target_config,
        target_layer_ids=draft.target_layer_ids,
        tokenizer_sha256=tokenizer_fingerprint(path, tokenizer),
        rows=rows.rows,
        settings=settings,
        mesh=mesh,
        batch_size=data.batch_size,
    )
