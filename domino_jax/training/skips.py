"""Steps that a person should hear of: skipped updates, spikes, and when a run has to stop.

A step leaves everything as it was where its batch has no anchor, or where its loss or its gradient
is not finite (`training.step`). Such steps, and those whose loss stands out of their window, are
told with the lines of the data that they were made of.

    a step was               updated              not finite    without anchors
    is told                  only as a spike      as skipped    as skipped
    consecutive bad steps    0 again              one more      as many as before
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.data.conversations import Row
from domino_jax.training.accumulator import StepOutcome

NONFINITE, NO_ANCHOR = "nonfinite", "no_anchor"
REASONS = {NONFINITE: "its loss or gradient is not finite", NO_ANCHOR: "no anchor in its batch"}
SPIKE = 2.0  # times the median of the window
SPIKE_STEPS = 5  # a median of fewer says nothing
MAX_SHOWN = 16  # lines of one step in a message; metrics.jsonl has all of them


@dataclass(frozen=True)
class StepRows:
    """Which part of the data a step was made of.

    Attributes:
        step: counted from 1.
        source: the file of conversations, or the directory of a capture.
        unit: "lines" of the file, or "rows" of a capture, which does not know them.
        numbers: which ones were in the batch, counted from 1, in the batch's order.
    """

    step: int
    source: str
    unit: str
    numbers: list[int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.numbers[:MAX_SHOWN]))
        more = len(self.numbers) - MAX_SHOWN
        return f"{self.unit} {shown}{f' and {more} more' if more > 0 else ''} of {self.source}"


@dataclass(frozen=True)
class Notice:
    """A skipped step or a spike: `words` for a person, `record` and `split` for the log."""

    step: int
    split: str
    words: str
    record: dict[str, Any]


class StepWatch:
    """Finds the skipped steps and the spikes of each window, and too many non-finite steps.

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
        self.diverged_at: StepRows | None = None
        self._rows = rows
        self._source = source
        self._max_nonfinite_steps = max_nonfinite_steps
        # Counted on from the checkpoint: a run that is restarted at each bad step would never stop.
        self._bad_in_a_row: int = stored["bad_in_a_row"] if stored else 0
        self._first_bad: list[Any] | None = stored["first_bad"] if stored else None

    @property
    def nonfinite_in_a_row(self) -> int:
        """Consecutive non-finite steps up to now."""
        return self._bad_in_a_row

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint: the consecutive non-finite steps up to now."""
        return {"bad_in_a_row": self._bad_in_a_row, "first_bad": self._first_bad}

    def notices(self, outcomes: Sequence[StepOutcome]) -> Iterator[Notice]:
        """The skipped steps of a window, then its spikes; each window is asked about once.

        A spike has more than `SPIKE` times the median loss of its window.
        """
        for outcome in outcomes:
            if outcome.updated:
                self._bad_in_a_row = 0
                continue
            if outcome.nonfinite:
                self._count(outcome)
            reason = NONFINITE if outcome.nonfinite else NO_ANCHOR
            rows = self._rows_of(outcome.step, outcome.rows)
            yield Notice(
                outcome.step,
                "skipped",
                f"update skipped, {REASONS[reason]}; {rows}",
                {"reason": reason, rows.unit: rows.numbers},
            )
        # The sums of skipped steps are 0 and would pull the median down.
        updated = [outcome for outcome in outcomes if outcome.updated]
        if len(updated) < SPIKE_STEPS:
            return
        median = statistics.median(outcome.loss for outcome in updated)
        for outcome in updated:
            if outcome.loss > SPIKE * median:
                rows = self._rows_of(outcome.step, outcome.rows)
                times = outcome.loss / median
                yield Notice(
                    outcome.step,
                    "spike",
                    f"loss {outcome.loss:.3f} is {times:.1f} times the window's median; {rows}",
                    {"loss": outcome.loss, "median": median, rows.unit: rows.numbers},
                )

    def _count(self, outcome: StepOutcome) -> None:
        if self._bad_in_a_row == 0:
            # Numbers and no `StepRows`: a checkpoint holds them as JSON.
            self._first_bad = [outcome.step, outcome.rows]
        self._bad_in_a_row += 1
        if self._bad_in_a_row == self._max_nonfinite_steps and self.diverged_at is None:
            assert self._first_bad is not None
            self.diverged_at = self._rows_of(*self._first_bad)

    def _rows_of(self, step: int, numbers: Sequence[int]) -> StepRows:
        # All lines or none: one message never counts two things.
        known = [self._rows[number].line for number in numbers]
        lines = [line for line in known if line is not None]
        if len(lines) == len(numbers):
            return StepRows(step, self._source, "lines", lines)
        return StepRows(step, self._source, "rows", [number + 1 for number in numbers])


def divergence(
    run_dir: Path, first: StepRows, *, max_nonfinite_steps: int, newest_checkpoint: int | None
) -> str:
    """One line on a run that had to stop: since when, on which rows, what is left, what to do."""
    return (
        f"stopped: {max_nonfinite_steps} updates in a row (train.max_nonfinite_steps) were not "
        f"finite, from step {first.step} on ({first}); {_way_on(run_dir, newest_checkpoint)}"
    )


def overflow(run_dir: Path, step: int, *, newest_checkpoint: int | None) -> str:
    """One line on parameters that an update of finite gradients took past what float32 holds."""
    return (
        f"stopped: the parameters are not finite after step {step}, so they were not saved; "
        f"{_way_on(run_dir, newest_checkpoint)}"
    )


def rollout_failure(run_dir: Path, step: int, reason: str, *, newest_checkpoint: int | None) -> str:
    """Message for a rollout with logits that are not finite: step, reason and remedy."""
    return (
        f"stopped: the rollout after step {step} failed: {reason}; "
        f"{_way_on(run_dir, newest_checkpoint)}"
    )


def no_update(steps: int, *, nonfinite: int) -> str:
    """Message for a run without an update of the draft: reasons and remedies.

    Args:
        steps: of the run up to now, at least 1.
        nonfinite: how many of them were not finite; the others had no anchor.
    """
    reasons, remedies = [], []
    if nonfinite:
        reasons.append(f"{nonfinite} were not finite")
        remedies.append(
            "use another copy of the target or of the captured states, or dtype=float32"
        )
    if nonfinite < steps:
        reasons.append(f"{steps - nonfinite} had no anchor in their batch")
        remedies.append(
            "give longer answers, a larger data.max_length or a smaller draft.block_size"
        )
    return f"none of {steps} steps updated the draft: {', '.join(reasons)}; {'; '.join(remedies)}"


def _way_on(run_dir: Path, newest_checkpoint: int | None) -> str:
    if newest_checkpoint is None:
        return "no checkpoint was written yet; mend the data or lower optimizer.learning_rate"
    return (
        f"the newest checkpoint, of step {newest_checkpoint}, is finite; mend the data or lower "
        "optimizer.learning_rate and start another run_dir from it: "
        f"`domino export {run_dir} DRAFT`, then draft.init_from=DRAFT"
    )
