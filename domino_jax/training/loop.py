"""A training run from its configuration to its last checkpoint, resumed where a start was cut off.

Machines are taken away while they train, and the run must end with the same bits all the same. So
a step is noted, told, measured and saved in one order, and a resumed run begins behind all of it:

    each step           rows -> batch -> compiled step -> its outcome into the window
    log_every, last     the window's line: skipped steps, spikes, means; the window is empty again
    eval_every, last    the held-out pass
    checkpoint_every,   state, position in the rows, window, end of the log; whether a held-out
    last, a stop        pass is still due
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domino_jax.config.run import RunConfig
from domino_jax.data.packing import row_lengths
from domino_jax.training.checkpoint import Checkpoints
from domino_jax.training.inputs import device_batch, evaluation_batches, training_batches
from domino_jax.training.metrics import MetricsLog, metric_means, metric_sums
from domino_jax.training.optimizer import learning_rate_schedule, updates_done
from domino_jax.training.prepare import Run, prepare
from domino_jax.training.program import StepArguments, lowered_step
from domino_jax.training.records import RunRecord
from domino_jax.training.skips import Diverged, Skip, StepWatch, divergence, overflow
from domino_jax.training.speed import Speed, speed_words
from domino_jax.training.step import Batch, TrainState, all_finite, batch_metrics
from domino_jax.training.trace import Trace
from domino_jax.training.window import Window, spikes, total

HELDOUT_SEED = 1  # folded into the run's seed: held-out anchors are the same at every evaluation


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; started again, it resumes there."""


def train(
    config: RunConfig,
    *,
    console: Console,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path:
    """Trains a drafter, or resumes a run that was cut off.

    Args:
        config: the run; its directory receives config.yaml, metrics.jsonl, timing.jsonl and
            checkpoints/.
        console: where progress goes.
        stop_requested: asked after each step and during held-out passes; once it says so, the
            state is saved and the run ends.
    Returns:
        The run directory.
    Raises:
        InputError: unusable input, or a run directory that belongs to another configuration or
            other inputs.
        Interrupted: `stop_requested` said so, and the state is saved.
        Diverged: `train.max_bad_steps` consecutive updates, or the parameters, were not finite;
            every checkpoint is.
    """
    run = prepare(config, console=console)
    settings = run.config.train
    kept = Checkpoints(
        run.directory, keep=settings.keep_checkpoints, keep_best=settings.keep_best is not None
    )
    # Everything is traced under the mesh: without one, layouts are asked for in vain.
    with jax.set_mesh(run.mesh), kept as checkpoints:
        rows, state = training_batches(run.rows, run.config), run.state
        if run.resumed is not None:
            state, rows = checkpoints.restore(run.resumed.step, state, rows)
            _say(console, f"resuming at step {run.resumed.step} of {run.last_step}")
        training = _Training(
            run, state, rows, checkpoints, stop_requested=stop_requested, console=console
        )
        with training.log:
            diverged = training.run_steps()
        if diverged is not None:
            # Behind the log: its lines are written, and the save in the background is waited for.
            raise Diverged(divergence(run.config, diverged, newest_checkpoint=checkpoints.newest()))
    return run.directory


class _Training:
    """The steps of a run, and what is written along the way."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        rows: Any,
        checkpoints: Checkpoints,
        *,
        stop_requested: Callable[[], bool],
        console: Console,
    ) -> None:
        stored = None if run.resumed is None else run.resumed.record
        self._run, self._state, self._rows, self._checkpoints = run, state, rows, checkpoints
        self._stop_requested, self._console = stop_requested, console
        self._say = functools.partial(_say, console)
        self._step = self._began_at = int(state.step)
        self._speed = Speed(run.config, run.program, run.mesh, lengths=row_lengths(run.rows.rows))
        self._window = Window(stored.outcomes if stored else ())
        self._watch = StepWatch(run.rows.rows, run.config, stored.watch if stored else None)
        self._heldout = _HeldOut(run) if run.heldout else None
        self._heldout_due = stored is not None and stored.heldout_due
        self._finite = jax.jit(all_finite)
        self.log = MetricsLog(
            run.directory,
            at=stored.log if stored else None,
            step=self._step,
            tensorboard=run.config.train.tensorboard,
            say=self._say,
        )

    def run_steps(self) -> Skip | None:
        """Trains to the last step.

        Returns the first of too many consecutive non-finite steps where the run had to stop.
        """
        run, settings, last_step = self._run, self._run.config.train, self._run.last_step
        if self._heldout_due:
            # Nothing of this start is to be saved yet: a signal may end the process.
            self._evaluate(stop_requested=lambda: False)
        if self._step >= last_step:
            self._say(f"already trained for {self._step} steps")
            return None
        micro_batches = run.config.optimizer.grad_accumulation
        coming = range(self._step + 1, last_step + 1)
        trace = Trace(
            run.directory, settings.profile, coming, paused=self._speed.paused, say=self._say
        )
        with _progress(self._console) as progress, trace:
            task = progress.add_task("training", total=last_step, completed=self._step, figures="")
            compiled, stop = None, False
            while self._step < last_step and not stop:
                taken = next(self._rows)
                batch = device_batch(run.mesh, taken, micro_batches=micro_batches)
                if compiled is None:  # the first batch has all shapes, those of packing too
                    compiled = _compiled_step(run, self._state, batch, console=self._console)
                    self._speed.begin()  # compiling is no training time
                trace.before(self._step + 1, self._state)
                self._state, sums = compiled(self._state, run.target_params, batch)
                # The step has only begun. Up to the line of the log nothing asks for its result, so
                # the next batch is made while the device works.
                self._step += 1
                trace.after(self._step, self._state)
                progress.update(task, completed=self._step)
                self._speed.add(taken["row_numbers"])
                self._window.add(self._step, taken["row_numbers"], sums)
                # Line, held-out pass, checkpoint: what is told before a save is never told again.
                last = self._step == last_step
                if self._step % settings.log_every == 0 or last:
                    progress.update(task, figures=self._tell())
                    if self._watch.diverged_at is not None:
                        return self._watch.diverged_at
                figures = None
                if self._heldout and (self._step % settings.eval_every == 0 or last):
                    figures = self._evaluate(stop_requested=self._stop_requested)
                # A held-out pass that was cut short is a stop too, made up for by the next start.
                stop = self._heldout_due or self._stop_requested()
                if self._step % settings.checkpoint_every == 0 or last or stop:
                    self._save(figures)
        if self._step < last_step or self._heldout_due:
            raise Interrupted(
                f"stopped at step {self._step} of {last_step}; the same command goes on from there"
            )
        return None

    def _tell(self) -> str:
        """Writes the window's line and what stands out in it; returns its figures, formatted."""
        run, outcomes = self._run, self._window.fetch()
        # The window's steps have run: that waited for them. Only those of this start were timed.
        timing = self._speed.figures(total([one for one in outcomes if one.step > self._began_at]))
        sums = total(outcomes)
        figures = _training_figures(
            run, sums, step=self._step, updates=int(updates_done(self._state.opt_state))
        )
        for skip in self._watch.skips(outcomes):
            self._say(f"step {skip.step}: update skipped, {skip.words}")
            self.log.write(skip.step, "skipped", skip.record)
        for spike in spikes(outcomes):
            self._say(f"step {spike.outcome.step}: {self._watch.spike_words(spike)}")
            self.log.write(spike.outcome.step, "spike", self._watch.spike_record(spike))
        self.log.write(self._step, "train", figures, timing=timing)
        words = f"{_in_words(figures)}  {speed_words(timing)}"
        if not self._console.is_terminal:  # there the progress bar shows them
            self._say(f"step {self._step}/{run.last_step}  {words}")
        self._window.clear()
        self._speed.begin()
        return words

    def _evaluate(self, *, stop_requested: Callable[[], bool]) -> dict[str, float] | None:
        """Measures and writes the held-out figures.

        Returns None where the run was asked to stop: the pass is still due.
        """
        assert self._heldout is not None
        with self._speed.paused(self._state):
            figures = self._heldout(self._state, stop_requested=stop_requested)
        self._heldout_due = figures is None
        if figures is not None:
            self.log.write(self._step, "heldout", figures)
            self._say(f"step {self._step}/{self._run.last_step}  held out: {_in_words(figures)}")
        return figures

    def _save(self, heldout: dict[str, float] | None) -> None:
        run, step = self._run, self._step
        if self._checkpoints.saved(step):
            return
        with self._speed.paused(self._state):
            # A step looks at loss and gradient alone. Finite ones overflow parameters under absurd
            # settings only, so one look before each save is enough.
            if not self._finite(self._state.params):
                newest = self._checkpoints.newest()
                raise Diverged(overflow(run.config, step, newest_checkpoint=newest))
            self._say(f"saving checkpoint {step}")
            record = RunRecord(
                config=dataclasses.asdict(run.config),
                inputs=run.inputs,
                outcomes=[outcome.as_json() for outcome in self._window.fetch()],
                watch=self._watch.as_json(),
                log=self.log.mark(),
                heldout_due=self._heldout_due,
            )
            # Before the next rows are taken: the saved position in the data is this step's.
            self._checkpoints.save(self._state, self._rows, run.record, record, heldout=heldout)


def _compiled_step(
    run: Run, state: TrainState, batch: Batch, *, console: Console
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The program of a step, which consumes its state."""
    # Compiled ahead: another shape later in the run is an error, not a silent second compilation.
    began = time.monotonic()
    compiled = lowered_step(run.program, StepArguments(state, run.target_params, batch)).compile()
    _say(console, f"step compiled in {time.monotonic() - began:.1f} s")
    return compiled


class _HeldOut:
    """Teacher-forced metrics of the held-out rows, with the same anchors every time."""

    def __init__(self, run: Run) -> None:
        self._run = run

        def sums(
            params: Any, target_params: Any, batch: Batch, key: jax.Array
        ) -> dict[str, jax.Array]:
            # Without the base loss, whatever the curriculum: only corrected logits are decoded.
            return metric_sums(
                batch_metrics(run.program, params, target_params, batch, key=key, lambda_base=0.0)
            )

        self._sums = jax.jit(sums)

    def __call__(
        self, state: TrainState, *, stop_requested: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The figures, or None where the run was asked to stop between two batches."""
        run = self._run
        assert run.heldout is not None
        key = jax.random.fold_in(jax.random.key(run.program.seed), HELDOUT_SEED)
        total: dict[str, Any] = {}
        for index, rows in enumerate(evaluation_batches(run.heldout, run.config)):
            if stop_requested():
                return None
            batch = jax.tree.map(lambda x: x[0], device_batch(run.mesh, rows, micro_batches=1))
            # The average where there is one: it is what is exported.
            params = state.params if state.ema is None else state.ema
            sums = self._sums(params, run.target_params, batch, jax.random.fold_in(key, index))
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
        return metric_means(jax.device_get(total))


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _training_figures(
    run: Run, sums: dict[str, Any], *, step: int, updates: int
) -> dict[str, float]:
    """The means of a window of steps, and what its last step and its last update were made with."""
    # Both counters have advanced since: a step and an update read them before they count.
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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        figures,
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
