"""A training run from its first step to its last checkpoint, resumed where a start was cut off.

Machines are taken away while they train, and the run must end with the same bits all the same. So
a step is noted, told, measured and saved in one order, and a resumed run begins behind all of it:

    each step           rows -> batch -> compiled step -> its outcome into the window
    log_every, last     the window's line: skipped steps, spikes, means; the window is empty again
    eval_every, last    the held-out pass, teacher-forced
    rollout_every, last the rollout: the draft drafts, the target verifies
    checkpoint_every,   state, position in the rows, window, end of the log; which of the two
    last, a stop        are still due
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax.base.chips import CHIPS
from domino_jax.base.errors import Diverged, InputError, Interrupted, Untrained
from domino_jax.base.progress import STDERR, Bar, Reporter
from domino_jax.data.packing import row_lengths
from domino_jax.training.accumulator import MetricAccumulator, total
from domino_jax.training.checkpoint import Checkpoints
from domino_jax.training.eval import HeldOut
from domino_jax.training.inputs import device_batch
from domino_jax.training.metrics import MetricsLog, metric_means
from domino_jax.training.optimizer import updates_done
from domino_jax.training.program import StepArguments, traced_step
from domino_jax.training.records import RunRecord
from domino_jax.training.rollout import Rollout, rollout_words
from domino_jax.training.run import Run
from domino_jax.training.skips import (
    StepRows,
    StepWatch,
    divergence,
    no_update,
    overflow,
    rollout_failure,
)
from domino_jax.training.speed import Speed, speed_words
from domino_jax.training.step import Batch, TrainState, all_finite
from domino_jax.training.trace import Trace


def train(
    run: Run, *, reporter: Reporter = STDERR, stop_requested: Callable[[], bool] = lambda: False
) -> Path:
    """Trains a drafter, or resumes a run that was cut off.

    Args:
        run: its directory receives metrics.jsonl, timing.jsonl and checkpoints/.
        reporter: is told the progress.
        stop_requested: asked after each step and during held-out passes and rollouts; once it says
            so, the state is saved and the run ends.
    Returns:
        The run directory.
    Raises:
        Interrupted: `stop_requested` said so, and the state is saved.
        Diverged: `train.max_nonfinite_steps` consecutive updates, the parameters, or the logits of
            a rollout were not finite; every checkpoint is.
        Untrained: no step of the run, earlier starts included, updated the draft.
    """
    inputs, cadence = run.inputs, run.inputs.cadence
    kept = Checkpoints(inputs.directory, keep=cadence.keep_checkpoints, keep_best=cadence.keep_best)
    # Everything is traced under the mesh: without one, layouts are asked for in vain.
    with jax.set_mesh(inputs.mesh), kept as checkpoints:
        batches = inputs.batches()
        state = run.state
        if inputs.resumed is not None:
            state, batches = checkpoints.restore(inputs.resumed.step, state, batches)
            reporter.say(f"resuming at step {inputs.resumed.step} of {inputs.last_step}")
        training = _Training(
            run, state, batches, checkpoints, stop_requested=stop_requested, reporter=reporter
        )
        with training.log:
            diverged = training.run_steps()
        if diverged is not None:
            # Behind the log: its lines are written, and the save in the background is waited for.
            raise Diverged(
                divergence(
                    inputs.directory,
                    diverged,
                    max_nonfinite_steps=cadence.max_nonfinite_steps,
                    newest_checkpoint=checkpoints.newest(),
                )
            )
        problem = training.without_update()
        if problem is not None:
            # The checkpoints stay: they are sound, and a longer run may resume from them.
            raise Untrained(
                f"{inputs.directory}: {problem}; the checkpoints hold the initial draft, so start "
                "another run_dir"
            )
    return inputs.directory


@dataclass(frozen=True)
class _Pass:
    """A measurement of the draft after `every` so many steps and the last.

    `measure` gives the figures of a state, None where the run was asked to stop, `words` what the
    reporter is told of them; `split` is that of their record.
    """

    split: str
    every: int
    measure: Callable[..., Mapping[str, Any] | None]
    words: Callable[[Any], str]


class _Training:
    """The steps of a run, and what is written along the way."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        batches: Any,
        checkpoints: Checkpoints,
        *,
        stop_requested: Callable[[], bool],
        reporter: Reporter,
    ) -> None:
        inputs = run.inputs
        stored = None if inputs.resumed is None else inputs.resumed.record
        self._run = run
        self._inputs = inputs
        self._state = state
        self._batches = batches
        self._checkpoints = checkpoints
        self._stop_requested = stop_requested
        self._reporter = reporter
        self._step = self._began_at = int(state.step)
        self._speed = Speed(
            inputs.program,
            inputs.mesh,
            lengths=row_lengths(inputs.rows.rows),
            step_rows=inputs.shape.step_rows,
            target_runs=not inputs.rows.captured,
            chip=CHIPS.get(inputs.mesh.devices.flat[0].device_kind),
        )
        self._window = MetricAccumulator(stored.outcomes if stored else ())
        self._watch = StepWatch(
            inputs.rows.rows,
            inputs.source,
            max_nonfinite_steps=inputs.cadence.max_nonfinite_steps,
            stored=stored.watch if stored else None,
        )
        self._passes = list(_passes(run))
        due = vars(stored) if stored else {}
        # Those of this start: rollouts may have been switched off since.
        self._due = [one for one in self._passes if due.get(f"{one.split}_due")]
        self._finite = jax.jit(all_finite)
        self._begun: deque[Any] = deque(maxlen=2)  # sums of the last steps, perhaps still to come
        self.log = MetricsLog(
            inputs.directory,
            at=stored.log if stored else None,
            step=self._step,
            tensorboard=inputs.cadence.tensorboard,
            reporter=reporter,
        )

    def run_steps(self) -> StepRows | None:
        """Trains to the last step.

        Returns the first of too many consecutive non-finite steps where the run had to stop.
        """
        inputs, cadence = self._inputs, self._inputs.cadence
        last_step = inputs.last_step
        # Nothing of this start is to be saved yet: a signal may end the process.
        self._measure(stop_requested=lambda: False)
        if inputs.resumed is None:
            self.log.write(0, "data", inputs.rows.figures)
        if self._step >= last_step:
            self._reporter.say(f"already trained for {self._step} steps")
            return None
        coming = range(self._step + 1, last_step + 1)
        trace = Trace(
            inputs.directory,
            cadence.profile,
            coming,
            paused=self._speed.paused,
            reporter=self._reporter,
        )
        with self._reporter.bar("step", total=last_step, done=self._step) as bar, trace:
            compiled, stop = None, False
            while self._step < last_step and not stop:
                taken, batch = self._next()
                if compiled is None:  # the first batch has all shapes, those of packing too
                    compiled = self._compiled_step(batch)
                    self._speed.begin()  # compiling is no training time
                trace.before(self._step + 1, self._state)
                self._state, sums = compiled(self._state, self._run.target_params, batch)
                self._begun.append(sums)
                # The step has only begun. Up to the line of the log nothing asks for its result, so
                # the next batch is made while the device works.
                self._step += 1
                trace.after(self._step, self._state)
                bar.update(self._step)
                self._speed.add(taken["row_numbers"])
                self._window.add(self._step, taken["row_numbers"], sums)
                # Line, passes, checkpoint: what is told before a save is never told again.
                last = self._step == last_step
                if self._step % cadence.log_every == 0 or last:
                    self._tell(bar)
                    if self._watch.diverged_at is not None:
                        return self._watch.diverged_at
                self._due = [one for one in self._passes if self._step % one.every == 0 or last]
                figures = self._measure(stop_requested=self._stop_requested)
                # A pass that was cut short is a stop too, made up for by the next start.
                stop = bool(self._due) or self._stop_requested()
                if self._step % cadence.checkpoint_every == 0 or last or stop:
                    self._save(figures)
        if self._step < last_step or self._due:
            raise Interrupted(
                f"stopped at step {self._step} of {last_step}; the same command resumes there"
            )
        return None

    def without_update(self) -> str | None:
        """Why no step of the run has updated the draft, and what to do; None once one has."""
        # The optimiser's own count covers earlier starts. Without an update no count of non-finite
        # steps was ever reset.
        if int(updates_done(self._state.opt_state)):
            return None
        return no_update(self._step, nonfinite=self._watch.nonfinite_in_a_row)

    def _next(self) -> tuple[dict[str, np.ndarray], Batch]:
        """The rows of the next step, and their batch on the devices."""
        inputs = self._inputs
        if inputs.rows.captured and len(self._begun) == 2:
            # A batch of captured states is gigabytes: one may wait beside the one in use, no more.
            jax.block_until_ready(self._begun[0])
        taken = next(self._batches)
        micro_batches = inputs.shape.grad_accumulation
        return taken, device_batch(inputs.mesh, taken, micro_batches=micro_batches)

    def _compiled_step(
        self, batch: Batch
    ) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The program of a step, which consumes its state."""
        # Compiled ahead: another shape later in the run is an error, not a silent second
        # compilation.
        began = time.monotonic()
        arguments = StepArguments(self._state, self._run.target_params, batch)
        compiled = traced_step(self._inputs.program, arguments).lower().compile()
        self._reporter.say(f"step compiled in {time.monotonic() - began:.1f} s")
        return compiled

    def _tell(self, bar: Bar) -> None:
        """Writes and tells the window's line and what stands out in it."""
        outcomes = self._window.fetch()
        # The window's steps have run: that waited for them. Only those of this start were timed.
        timed = [outcome for outcome in outcomes if outcome.step > self._began_at]
        timing = self._speed.figures(total(timed))
        # Both counters have advanced since: a step and an update read them before they count.
        updates = int(updates_done(self._state.opt_state))
        figures = metric_means(total(outcomes)) | {
            "lambda_base": float(self._inputs.program.curriculum(self._step - 1)),
            "learning_rate": float(self._inputs.learning_rate(max(updates - 1, 0))),
        }
        for notice in self._watch.notices(outcomes):
            self._reporter.say(f"step {notice.step}: {notice.words}")
            self.log.write(notice.step, notice.split, notice.record)
        problem = self.without_update()
        if problem is not None and self._step < self._inputs.last_step:
            self._reporter.say(f"step {self._step}: {problem}")
        self.log.write(self._step, "train", figures, timing=timing)
        bar.tell(self._step, f"{_formatted(figures)}  {speed_words(timing)}")
        self._window.clear()
        self._speed.begin()

    def _measure(self, *, stop_requested: Callable[[], bool]) -> dict[str, Mapping[str, Any]]:
        """Measures what is due, in its order, and writes it; returns the figures by split.

        Where the run was asked to stop, the pass that was cut short and those behind it stay due.
        """
        measured: dict[str, Mapping[str, Any]] = {}
        while self._due:
            one = self._due[0]
            try:
                with self._speed.paused(self._state):
                    figures = one.measure(self._state, stop_requested=stop_requested)
            except InputError as error:  # logits that are not finite
                directory, newest = self._inputs.directory, self._checkpoints.newest()
                words = rollout_failure(directory, self._step, str(error), newest_checkpoint=newest)
                raise Diverged(words) from error
            if figures is None:
                break
            self._due.pop(0)
            self.log.write(self._step, one.split, figures)
            self._reporter.say(f"step {self._step}/{self._inputs.last_step}  {one.words(figures)}")
            measured[one.split] = figures
        return measured

    def _save(self, figures: Mapping[str, Mapping[str, Any]]) -> None:
        inputs, step = self._inputs, self._step
        if self._checkpoints.saved(step):
            return
        with self._speed.paused(self._state):
            # A step looks at loss and gradient alone. Finite ones overflow parameters under absurd
            # settings only, so one look before each save is enough.
            if not self._finite(self._state.params):
                newest = self._checkpoints.newest()
                raise Diverged(overflow(inputs.directory, step, newest_checkpoint=newest))
            self._reporter.say(f"saving checkpoint {step}")
            due = [one.split for one in self._due]
            record = RunRecord(
                config=inputs.settings,
                inputs=inputs.hashes,
                outcomes=[outcome.as_json() for outcome in self._window.fetch()],
                watch=self._watch.as_json(),
                log=self.log.mark(),
                heldout_due="heldout" in due,
                rollout_due="rollout" in due,
            )
            # Before the next batch is taken: the saved position in the data is this step's.
            self._checkpoints.save(
                self._state, self._batches, inputs.record, record, figures=figures
            )


def _passes(run: Run) -> Iterator[_Pass]:
    """What a run measures of its draft, in the order in which it does."""
    cadence = run.inputs.cadence
    if run.inputs.heldout is not None:
        yield _Pass("heldout", cadence.eval_every, HeldOut(run), _heldout_words)
    if cadence.rollout_every is not None:
        yield _Pass("rollout", cadence.rollout_every, Rollout(run), rollout_words)


def _heldout_words(figures: dict[str, float]) -> str:
    return f"held out: {_formatted(figures)}"


def _formatted(figures: dict[str, float]) -> str:
    base = ""
    if "base_accept_len" in figures:
        base = f" (base {figures['base_accept_len']:.2f})"
    return f"loss {figures['loss']:.3f}  accept_len {figures['accept_len']:.2f}{base}"
