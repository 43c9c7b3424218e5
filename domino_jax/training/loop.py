"""A training run from its configuration to its last checkpoint, resumed where an earlier start left off."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domino_jax.config import RunConfig
from domino_jax.data.packing import row_lengths
from domino_jax.training.checkpoint import (
    open_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from domino_jax.training.inputs import (
    device_batch,
    evaluation_batches,
    training_batches,
)
from domino_jax.training.metrics import MetricsLog, metric_means, metric_sums
from domino_jax.training.optimizer import learning_rate_schedule, updates_done
from domino_jax.training.prepare import Run, prepare
from domino_jax.training.program import StepArguments, lowered_step
from domino_jax.training.skips import Diverged, Skip, SkipWatch, divergence, overflow
from domino_jax.training.speed import Speed, speed_words
from domino_jax.training.step import (
    Batch,
    TrainState,
    all_finite,
    batch_metrics,
)
from domino_jax.training.trace import Trace

HELDOUT_SEED = 1  # folded into the run's seed: held-out anchors are the same at every evaluation


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; starting it again goes on from there."""


def train(
    config: RunConfig,
    *,
    console: Console,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path:
    """Trains a drafter, or goes on with a run that was cut off.

    Args:
        config: the run; its directory receives config.yaml, metrics.jsonl, timing.jsonl and checkpoints/.
        console: where progress goes.
        stop_requested: asked after each step; once it says so, the state is saved and the run ends.
    Returns:
        The run directory.
    Raises:
        InputError: unusable input, or a run directory that belongs to another configuration.
        Interrupted: `stop_requested` said so, and the state is saved.
        Diverged: `train.max_bad_steps` updates in a row, or the parameters, were not finite; no checkpoint is.
    """
    run = prepare(config, console=console)
    with jax.set_mesh(run.mesh), open_checkpoints(run.directory, keep=config.train.keep_checkpoints) as checkpoints:
        rows = training_batches(run.rows, config)
        state = run.state
        restored = restore_checkpoint(checkpoints, state, rows, run.record)
        if restored is not None:
            state, rows = restored
            _say(console, f"resuming at step {int(state.step)} of {run.total_steps}")

        finite = jax.jit(all_finite)

        def newest_checkpoint() -> int | None:
            checkpoints.wait_until_finished()
            return checkpoints.latest_step()

        def save(state: TrainState) -> None:
            step = int(state.step)
            if checkpoints.latest_step() == step:
                return
            if not finite(state.params):
                raise Diverged(overflow(config, step, newest_checkpoint=newest_checkpoint()))
            _say(console, f"saving checkpoint {step}")
            save_checkpoint(checkpoints, state, rows, run.record)

        log = MetricsLog(run.directory, from_step=int(state.step), tensorboard=config.train.tensorboard)
        with log:
            diverged = _run_steps(run, state, rows, log=log, save=save, stop_requested=stop_requested, console=console)
        if diverged is not None:
            raise Diverged(divergence(config, diverged, newest_checkpoint=newest_checkpoint()))
    return run.directory


def _run_steps(
    run: Run,
    state: TrainState,
    rows: Iterator[dict[str, np.ndarray]],
    *,
    log: MetricsLog,
    save: Callable[[TrainState], None],
    stop_requested: Callable[[], bool],
    console: Console,
) -> Skip | None:
    """Trains to the last step; the first of too many non-finite steps in a row where it had to stop."""
    settings, total = run.config.train, run.total_steps
    step, say = int(state.step), functools.partial(_say, console)
    speed = Speed(run.config, run.program, run.mesh, lengths=row_lengths(run.rows.rows))
    coming = range(step + 1, total + 1)
    trace = Trace(run.directory, settings.profile, coming, paused=speed.paused, say=say)
    if step >= total:
        say(f"already trained for {step} steps")
        return None
    micro_batches = run.config.optimizer.grad_accumulation
    taken = next(rows)
    batch = device_batch(run.mesh, taken, micro_batches=micro_batches)
    compiled = _compiled_step(run, state, batch, console=console)
    heldout = _HeldOut(run) if run.heldout else None
    skips = SkipWatch(run.rows.rows, run.config)

    with _progress(console) as progress, trace:
        task = progress.add_task("training", total=total, completed=step, figures="")
        window: dict[str, Any] = {}
        speed.begin()
        while True:
            trace.before(step + 1, state)
            state, sums = compiled(state, run.target_params, batch)
            step += 1
            trace.after(step, state)
            window = {name: window[name] + value for name, value in sums.items()} if window else sums
            skips.add(step, taken["row_numbers"], sums)
            speed.add(taken["row_numbers"])
            last = step == total or stop_requested()
            if step % settings.log_every == 0 or last:
                sums, updates = jax.device_get((window, updates_done(state.opt_state)))
                timing = speed.figures(sums)  # the window's steps have run: that waited for them
                figures = _training_figures(run, sums, step=step, updates=int(updates))
                for skip in skips.fetch():
                    say(f"step {skip.step}: update skipped, {skip.words}")
                    log.write(skip.step, "skipped", skip.record)
                log.write(step, "train", figures, timing=timing)
                words = f"{_in_words(figures)}  {speed_words(timing)}"
                progress.update(task, completed=step, figures=words)
                if not console.is_terminal:
                    say(f"step {step}/{total}  {words}")
                if skips.diverged_at is not None:
                    return skips.diverged_at
                window = {}
                speed.begin()
            if heldout and (step % settings.eval_every == 0 or step == total):
                with speed.paused(state):
                    figures = heldout(state)
                log.write(step, "heldout", figures)
                say(f"step {step}/{total}  held out: {_in_words(figures)}")
            if step % settings.checkpoint_every == 0 or last:
                with speed.paused(state):
                    save(state)  # before the next rows: the saved data position is this step's
            if last:
                break
            taken = next(rows)
            batch = device_batch(run.mesh, taken, micro_batches=micro_batches)
    if step < total:
        raise Interrupted(f"stopped at step {step} of {total}; the same command goes on from there")
    return None


def _compiled_step(
    run: Run, state: TrainState, batch: Batch, *, console: Console
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The program of a step, which consumes its state."""
    # Compiled ahead: another shape later in the run would be an error, not a silent second compilation.
    began = time.monotonic()
    compiled = lowered_step(run.program, StepArguments(state, run.target_params, batch)).compile()
    _say(console, f"step compiled in {time.monotonic() - began:.1f} s")
    return compiled


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


def _training_figures(run: Run, sums: dict[str, Any], *, step: int, updates: int) -> dict[str, float]:
    """The means of a window of steps, and what its last step and its last update were made with."""
    rate = learning_rate_schedule(run.config.optimizer, run.total_steps)
    return metric_means(sums) | {
        "lambda_base": float(run.program.curriculum(step - 1)),
        "learning_rate": float(rate(max(updates - 1, 0))),
    }


def _in_words(figures: dict[str, float]) -> str:
    base = f" (base {figures['base_accept_len']:.2f})" if "base_accept_len" in figures else ""
    return f"loss {figures['loss']:.3f}  accept_len {figures['accept_len']:.2f}{base}"


def _progress(console: Console) -> Progress:
    figures = TextColumn("{task.fields[figures]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
