"""A training run from its configuration to its last checkpoint, resumed where an earlier start left off."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from optax.tree_utils import tree_map_params
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domino_jax.config import LossConfig, RunConfig, dump_config, load_config
from domino_jax.data.template import chat_template
from domino_jax.draft.backbone import DraftModel, init_variables
from domino_jax.interop.start import starting_params
from domino_jax.model_config import DraftConfig
from domino_jax.sharding import parameter_shardings, partition_spec
from domino_jax.strict import InputError
from domino_jax.target.gguf import resolve_target
from domino_jax.target.load import TABLES, load_tables, load_target, load_tokenizer
from domino_jax.target.model import Target, first_layers
from domino_jax.training.checkpoint import (
    DraftRecord,
    has_checkpoint,
    open_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from domino_jax.training.curriculum import lambda_base_schedule
from domino_jax.training.inputs import (
    InputRows,
    device_batch,
    draft_of,
    evaluation_batches,
    place_target,
    read_features,
    read_rows,
    run_mesh,
    training_batches,
)
from domino_jax.training.metrics import MetricsLog, metric_means, metric_sums
from domino_jax.training.modules import build_trainer
from domino_jax.training.objectives import resolved_loss
from domino_jax.training.optimizer import learning_rate_schedule, make_optimizer
from domino_jax.training.step import (
    Batch,
    Program,
    TrainState,
    batch_metrics,
    compiler_options,
    initial_state,
    train_step,
)

HELDOUT_SEED = 1  # folded into the run's seed: held-out anchors are the same at every evaluation


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; starting it again goes on from there."""


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


def train(
    config: RunConfig,
    *,
    console: Console,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path:
    """Trains a drafter, or goes on with a run that was cut off.

    Args:
        config: the run; its directory receives config.yaml, metrics.jsonl and checkpoints/.
        console: where progress goes.
        stop_requested: asked after each step; once it says so, the state is saved and the run ends.
    Returns:
        The run directory.
    Raises:
        InputError: unusable input, or a run directory that belongs to another configuration.
        Interrupted: `stop_requested` said so, and the state is saved.
    """
    run = prepare(config, console=console)
    with jax.set_mesh(run.mesh), open_checkpoints(run.directory, keep=config.train.keep_checkpoints) as checkpoints:
        rows = training_batches(run.rows, config)
        state = run.state
        restored = restore_checkpoint(checkpoints, state, rows, run.record)
        if restored is not None:
            state, rows = restored
            _say(console, f"resuming at step {int(state.step)} of {run.total_steps}")

        def save(state: TrainState) -> None:
            if checkpoints.latest_step() != int(state.step):
                save_checkpoint(checkpoints, state, rows, run.record)

        log = MetricsLog(run.directory, from_step=int(state.step), tensorboard=config.train.tensorboard)
        with log:
            _run_steps(run, state, rows, log=log, save=save, stop_requested=stop_requested, console=console)
    return run.directory


def prepare(config: RunConfig, *, console: Console) -> Run:
    """Reads target, tokenizer and rows and lays everything out on the devices; nothing is trained yet."""
    loss = resolved_loss(config.loss, domino=config.draft.projector_type is not None)
    config = replace(config, loss=loss)
    directory = Path(config.run_dir)
    started = has_checkpoint(directory)
    _claim(directory, config, started=started)
    say = functools.partial(_say, console)
    path = resolve_target(config.target, progress=say)
    tokenizer = load_tokenizer(path)
    data = config.data
    target_runs = data.features is None or data.heldout is not None
    load = load_target if target_runs or config.draft.init_layers_from_target else load_tables
    target = load(path, dtype=config.dtype)
    draft_config = draft_of(config, target.config, tokenizer)
    if data.train is None:
        rows = read_features(config, path, tokenizer, draft_config)
    else:
        rows = read_rows(data.train, tokenizer, data, say=say)
    heldout = read_rows(data.heldout, tokenizer, data, say=say) if data.heldout else None

    step_rows = config.data.batch_size * config.optimizer.grad_accumulation
    total_steps = config.train.steps or max(config.train.epochs * rows.epoch_rows // step_rows, 1)
    whole = config.loss.kl_weight > 0  # the target's own distribution needs its last layer
    depth = target.config.num_hidden_layers if whole else max(draft_config.target_layer_ids) + 1
    target_params = first_layers(target.params, depth)
    if not target_runs:
        target_params = {name: leaf for name, leaf in target_params.items() if name in TABLES}
    program = Program(
        trainer=build_trainer(draft_config, **_trainer_options(config.loss)),
        target=Target(target.config, capture=draft_config.target_layer_ids, depth=depth, scan_layers=True),
        optimizer=make_optimizer(config.optimizer, total_steps),
        curriculum=lambda_base_schedule(
            total_steps, lambda_start=config.loss.lambda_start, decay_ratio=config.loss.decay_ratio
        ),
        seed=config.seed,
        ema_decay=config.optimizer.ema_decay,
    )
    template = chat_template(tokenizer, data.chat_template_kwargs)
    mesh = run_mesh(config)
    layers_from = target.params if config.draft.init_layers_from_target else None
    init_from = None if started else config.draft.init_from  # a checkpoint is about to replace the state
    run = Run(
        config=config,
        directory=directory,
        rows=rows,
        heldout=heldout,
        record=DraftRecord(draft_config, config.target, template),
        program=program,
        mesh=mesh,
        target_params=place_target(program.target, target_params, mesh),
        state=_state_at_start(program, draft_config, mesh, layers_from=layers_from, init_from=init_from),
        total_steps=total_steps,
    )
    say(dump_config(config))
    for name, part in (("training", rows), ("held out", heldout)):
        if part is not None:
            say(f"{name}: {part.summary(max_length=config.data.max_length)}")
    say(
        f"{total_steps} steps of {step_rows} rows on {mesh.size} {jax.devices()[0].platform} device(s); the draft "
        f"reads the target's layers {list(draft_config.target_layer_ids)}",
    )
    return run


def _trainer_options(loss: LossConfig) -> dict[str, Any]:
    """The settings of a loss that are fields of the trainer module; the rest is the curriculum's."""
    other = ("lambda_start", "decay_ratio", "options")
    fields = {name: value for name, value in vars(loss).items() if name not in other}
    return fields | {"loss_options": FrozenDict(loss.options)}


def _state_at_start(
    program: Program, config: DraftConfig, mesh: Mesh, *, layers_from: Any, init_from: str | None
) -> TrainState:
    """A fresh draft, or one that starts as the target's top or as a checkpoint, over the mesh with its optimiser."""
    key = jax.random.fold_in(jax.random.key(program.seed), np.iinfo(np.int32).max)
    model = DraftModel(config)
    boxed = jax.eval_shape(lambda: init_variables(model, key))["params"]
    shardings = parameter_shardings(boxed, mesh)
    params = jax.jit(lambda: nn.meta.unbox(init_variables(model, key))["params"], out_shardings=shardings)()
    if layers_from is not None:
        params = jax.device_put(draft_from_target(config, params, layers_from), shardings)
    if init_from is not None:
        params = jax.device_put(starting_params(init_from, config), shardings)
    whole = NamedSharding(mesh, partition_spec())
    shapes = jax.eval_shape(lambda: initial_state(program, params))
    opt_shardings = tree_map_params(
        program.optimizer, lambda _, s: s, shapes.opt_state, shardings, transform_non_params=lambda _: whole
    )
    layout = TrainState(whole, shardings, opt_shardings, shardings if program.ema_decay is not None else None)
    return jax.jit(lambda tree: initial_state(program, tree), out_shardings=layout)(params)


def draft_from_target(config: DraftConfig, params: Any, target_params: Any) -> Any:
    """A draft that starts as the top of its target.

    Its layers and final norm are the target's last ones, and its context is the last captured state as the first of
    those layers would read it; the other captured states start without weight.

    Args:
        config: the draft.
        params: fresh parameters, float32; what the target lacks (q and k norms of a Llama, the head) stays, and so
            does the feed-forward part below experts. What the draft lacks (biases) is left out.
        target_params: the target's, layers apart.
    Returns:
        A tree like `params`.
    """
    first = config.num_target_layers - config.num_hidden_layers
    copied = {"norm": target_params["norm"]}
    for index in range(config.num_hidden_layers):
        name, layer = f"layers_{index}", target_params[f"layers_{first + index}"]
        fresh, known = flatten_dict(params[name]), flatten_dict(layer)
        copied[name] = unflatten_dict({path: known.get(path, leaf) for path, leaf in fresh.items()})
    copied["hidden_norm"] = target_params[f"layers_{first}"]["input_layernorm"]
    width, captured = config.hidden_size, len(config.target_layer_ids)
    copied["fc"] = {"weight": jnp.eye(width, captured * width, k=(captured - 1) * width)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**params, **copied})


def _run_steps(
    run: Run,
    state: TrainState,
    rows: Iterator[dict[str, np.ndarray]],
    *,
    log: MetricsLog,
    save: Callable[[TrainState], None],
    stop_requested: Callable[[], bool],
    console: Console,
) -> None:
    settings, total = run.config.train, run.total_steps
    step = int(state.step)
    if step >= total:
        _say(console, f"already trained for {step} steps")
        return
    micro_batches = run.config.optimizer.grad_accumulation
    batch = device_batch(run.mesh, next(rows), micro_batches=micro_batches)
    # Compiled ahead: another shape later in the run would be an error, not a silent second compilation.
    layout = jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(functools.partial(train_step, run.program), donate_argnums=0, out_shardings=(layout, None))
    began = time.monotonic()
    compiled = program.lower(state, run.target_params, batch).compile(compiler_options=compiler_options())
    _say(console, f"step compiled in {time.monotonic() - began:.1f} s")
    heldout = _HeldOut(run) if run.heldout else None

    with _progress(console) as progress:
        task = progress.add_task("training", total=total, completed=step, figures="")
        window: dict[str, Any] = {}
        began, first_of_window = time.monotonic(), step
        while True:
            state, sums = compiled(state, run.target_params, batch)
            step += 1
            window = {name: window[name] + value for name, value in sums.items()} if window else sums
            last = step == total or stop_requested()
            if step % settings.log_every == 0 or last:
                sums, steps = jax.device_get(window), step - first_of_window  # waits for the steps it measures
                figures = _training_figures(run, step, sums, steps=steps, seconds=time.monotonic() - began)
                log.write(step, "train", figures)
                progress.update(task, completed=step, figures=_in_words(figures))
                if not console.is_terminal:
                    _say(console, f"step {step}/{total}  {_in_words(figures)}")
                window, began, first_of_window = {}, time.monotonic(), step
            paused = time.monotonic()
            if heldout and (step % settings.eval_every == 0 or step == total):
                jax.block_until_ready(state)
                figures = heldout(state)
                log.write(step, "heldout", figures)
                _say(console, f"step {step}/{total}  held out: {_in_words(figures)}")
            if step % settings.checkpoint_every == 0 or last:
                save(state)  # before the next rows are taken: the saved data position belongs to this step
            began += time.monotonic() - paused
            if last:
                break
            batch = device_batch(run.mesh, next(rows), micro_batches=micro_batches)
    if step < total:
        raise Interrupted(f"stopped at step {step} of {total}; the same command goes on from there")


class _HeldOut:
    """Teacher-forced metrics of the held-out rows, with the same anchors every time."""

    def __init__(self, run: Run) -> None:
        self._run = run

        def sums(params: Any, target_params: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
            return metric_sums(batch_metrics(run.program, params, target_params, batch, key=key, lambda_base=0.0))

        self._sums = jax.jit(sums)

    def __call__(self, state: TrainState) -> dict[str, float]:
        run = self._run
        assert run.heldout is not None
        key = jax.random.fold_in(jax.random.key(run.program.seed), HELDOUT_SEED)
        total: dict[str, Any] = {}
        for index, rows in enumerate(evaluation_batches(run.heldout, run.config)):
            batch = jax.tree.map(lambda x: x[0], device_batch(run.mesh, rows, micro_batches=1))
            params = state.params if state.ema is None else state.ema
            sums = self._sums(params, run.target_params, batch, jax.random.fold_in(key, index))
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
        return metric_means(jax.device_get(total))


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _training_figures(run: Run, step: int, sums: dict[str, Any], *, steps: int, seconds: float) -> dict[str, float]:
    """The means of a window of steps, and what they were trained with."""
    data, optimizer = run.config.data, run.config.optimizer
    tokens = steps * data.batch_size * optimizer.grad_accumulation * data.max_length
    return metric_means(sums) | {
        "grad_norm": float(sums["grad_norm"]) / steps,
        "lambda_base": float(run.program.curriculum(step - 1)),
        "learning_rate": float(learning_rate_schedule(optimizer, run.total_steps)(step - 1)),
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": seconds / steps,
    }


def _in_words(figures: dict[str, float]) -> str:
    base = f" (base {figures['base_accept_len']:.2f})" if "base_accept_len" in figures else ""
    speed = f"  {figures['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in figures else ""
    return f"loss {figures['loss']:.3f}  accept_len {figures['accept_len']:.2f}{base}{speed}"


# What may differ when a run is started again: nothing that changes its numbers.
_FREE_TO_CHANGE = ("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints", "mesh")


def _claim(directory: Path, config: RunConfig, *, started: bool) -> None:
    """Creates the run directory with the resolved config, or checks that one with a checkpoint belongs to it."""
    path = directory / "config.yaml"
    if not (started and path.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".yaml.new")
        beside.write_text(dump_config(config))
        beside.replace(path)
        return
    try:
        started_as = load_config(path)
    except InputError as error:
        raise InputError(
            f"{error}: the run was started by another version of this program and cannot be resumed by this one; "
            "use another run_dir, which may begin with the old run's export (draft.init_from)"
        ) from error
    before, now = (_flat(dataclasses.asdict(one)) for one in (started_as, config))
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith((*_FREE_TO_CHANGE, "run_dir", "train.tensorboard"))
    ]
    if changed:
        raise InputError(f"{path}: started with other settings ({'; '.join(changed)}); use another run_dir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _progress(console: Console) -> Progress:
    figures = TextColumn("{task.fields[figures]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
