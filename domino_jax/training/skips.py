"""Steps that a person should hear of: skipped updates, spikes, and when a run has to stop.

A run that skips in silence wastes its data, and nobody learns which line of it was bad. A step
leaves everything as it was where its batch has no anchor, or where its loss or its gradient is not
finite (`training.step`). Such steps, and those whose loss stands out of their window, are told with
the lines of the data that they were made of.

    a step was               updated              not finite    without anchors
    is told                  only as a spike      as skipped    as skipped
    consecutive bad steps    0 again              one more      as many as before
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.data.conversations import Row
from domino_jax.training.accumulator import Spike, StepOutcome

NONFINITE, NO_ANCHOR = "nonfinite", "no_anchor"
REASONS = {NONFINITE: "its loss or gradient is not finite", NO_ANCHOR: "no anchor in its batch"}
MAX_SHOWN = 16  # lines of one step in a message; metrics.jsonl has all of them


@dataclass(frozen=True)
class BatchSource:
    """Which part of the data a step was made of.

    Attributes:
        source: the file of conversations, or the directory of a capture.
        unit: "lines" of the file, or "rows" of a capture, which does not know them.
        numbers: which ones were in the batch, counted from 1, in the batch's order.
    """

    source: str
    unit: str
    numbers: list[int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.numbers[:MAX_SHOWN]))
        more = len(self.numbers) - MAX_SHOWN
        return f"{self.unit} {shown}{f' and {more} more' if more > 0 else ''} of {self.source}"


@dataclass(frozen=True)
class Skip:
    """A step without an update; `reason` is a key of `REASONS`."""

    step: int
    reason: str
    rows: BatchSource

    @property
    def words(self) -> str:
        """Why, and on what, for a person."""
        return f"{REASONS[self.reason]}; {self.rows}"

    @property
    def record(self) -> dict[str, Any]:
        """What `metrics.jsonl` says of it."""
        return {"reason": self.reason, self.rows.unit: self.rows.numbers}


class StepWatch:
    """Tells the skipped steps and the spikes of each window, and when non-finite ones are too many.

    Attributes:
        diverged_at: the first of `max_nonfinite_steps` consecutive non-finite steps, once there
            were as many. Batches without anchors say nothing about finiteness: they neither count
            nor end the count.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        source: str,
        *,
        max_nonfinite_steps: int,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to watch, or resumes.

        Args:
            rows: of the run.
            source: where they lie, for messages.
            max_nonfinite_steps: `train.max_nonfinite_steps`.
            stored: `as_json` of an earlier start.
        """
        self.diverged_at: Skip | None = None
        self._rows = rows
        self._source = source
        self._max_nonfinite_steps = max_nonfinite_steps
        # Counted on from the checkpoint: a run that is restarted at each bad step would never stop.
        self._bad_in_a_row: int = stored["bad_in_a_row"] if stored else 0
        self._first_bad: list[Any] | None = stored["first_bad"] if stored else None

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint: the consecutive non-finite steps up to now."""
        return {"bad_in_a_row": self._bad_in_a_row, "first_bad": self._first_bad}

    def skips(self, outcomes: Sequence[StepOutcome]) -> Iterator[Skip]:
        """The skipped steps of a window, in order; each window is asked about once."""
        for outcome in outcomes:
            if outcome.updated:
                self._bad_in_a_row = 0
                continue
            if outcome.nonfinite:
                self._count(outcome)
            reason = NONFINITE if outcome.nonfinite else NO_ANCHOR
            yield Skip(outcome.step, reason, self._rows_of(outcome.rows))

    def spike_words(self, spike: Spike) -> str:
        """A spike for a person: how large, and on what."""
        loss = f"loss {spike.outcome.loss:.3f} is {spike.times:.1f} times the window's median"
        return f"{loss}; {self._rows_of(spike.outcome.rows)}"

    def spike_record(self, spike: Spike) -> dict[str, Any]:
        """What `metrics.jsonl` says of a spike."""
        rows = self._rows_of(spike.outcome.rows)
        return {"loss": spike.outcome.loss, "median": spike.median, rows.unit: rows.numbers}

    def _count(self, outcome: StepOutcome) -> None:
        if self._bad_in_a_row == 0:
            # Numbers and no `BatchSource`: a checkpoint holds them as JSON.
            self._first_bad = [outcome.step, outcome.rows]
        self._bad_in_a_row += 1
        if self._bad_in_a_row == self._max_nonfinite_steps and self.diverged_at is None:
            assert self._first_bad is not None
            step, numbers = self._first_bad
            self.diverged_at = Skip(step, NONFINITE, self._rows_of(numbers))

    def _rows_of(self, numbers: Sequence[int]) -> BatchSource:
        # All lines or none: one message never counts two things.
        known = [self._rows[number].line for number in numbers]
        lines = [line for line in known if line is not None]
        if len(lines) == len(numbers):
            return BatchSource(self._source, "lines", lines)
        return BatchSource(self._source, "rows", [number + 1 for number in numbers])


def divergence(
    run_dir: Path, first: Skip, *, max_nonfinite_steps: int, newest_checkpoint: int | None
) -> str:
    """One line on a run that had to stop: since when, on which rows, what is left, what to do."""
    return (
        f"stopped: {max_nonfinite_steps} updates in a row (train.max_nonfinite_steps) were not "
        f"finite, from step {first.step} on ({first.rows}); {_way_on(run_dir, newest_checkpoint)}"
    )


def overflow(run_dir: Path, step: int, *, newest_checkpoint: int | None) -> str:
    """One line on parameters that an update of finite gradients took past what float32 holds."""
    return (
        f"stopped: the parameters are not finite after step {step}, so they were not saved; "
        f"{_way_on(run_dir, newest_checkpoint)}"
    )


def _way_on(run_dir: Path, newest_checkpoint: int | None) -> str:
    if newest_checkpoint is None:
        return "no checkpoint was written yet; mend the data or lower optimizer.learning_rate"
    return (
        f"the newest checkpoint, of step {newest_checkpoint}, is finite; mend the data or lower "
        "optimizer.learning_rate and start another run_dir from it: "
        f"`domino export {run_dir} DRAFT`, then draft.init_from=DRAFT"
    )
