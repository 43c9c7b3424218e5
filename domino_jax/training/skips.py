"""Updates that were skipped: why, on which lines of the data, and when a run has to stop for it.

A step leaves everything as it was where its batch has no anchor, or where its loss or its gradient
is not finite (`training.step`). Whether it did is known on the device
first; asking after every step would make the host wait for each. So the answers are kept beside the
row numbers of their steps and fetched once per window of `train.log_every` steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from domino_jax.config import RunConfig
from domino_jax.data.conversations import Row

NONFINITE, NO_ANCHOR = "nonfinite", "no_anchor"
REASONS = {
    NONFINITE: "its loss or gradient is not finite",
    NO_ANCHOR: "no anchor in its batch",
}
MAX_SHOWN = 16  # lines of one step in a message; metrics.jsonl has all of them


class Diverged(Exception):
    """Too many updates in a row, or the parameters, were not finite; the run stopped, its checkpoints are finite."""


@dataclass(frozen=True)
class Skip:
    """A step without an update.

    Attributes:
        step: counted as `TrainState.step` after it.
        reason: a key of `REASONS`.
        source: the file of conversations, or the directory of a capture.
        unit: "lines" of the file, or "rows" of a capture, which does not know them.
        numbers: which ones were in the batch, counted from 1, in the batch's order.
    """

    step: int
    reason: str
    source: str
    unit: str
    numbers: list[int]

    @property
    def place(self) -> str:
        """Where its rows come from, for a person; long lists are cut."""
        shown = ", ".join(map(str, self.numbers[:MAX_SHOWN]))
        more = len(self.numbers) - MAX_SHOWN
        return f"{self.unit} {shown}{f' and {more} more' if more > 0 else ''} of {self.source}"

    @property
    def words(self) -> str:
        """Why, and on what, for a person."""
        return f"{REASONS[self.reason]}; {self.place}"

    @property
    def record(self) -> dict[str, Any]:
        """What `metrics.jsonl` says of it."""
        return {"reason": self.reason, self.unit: self.numbers}


class SkipWatch:
    """Tells the skipped steps of each window, and the run of non-finite ones that is too long.

    Attributes:
        diverged_at: the first of `max_bad_steps` non-finite steps in a row, once there were as many.
            Batches without anchors say nothing about finiteness: they neither count nor end the
            row. A run that is started again counts from nothing.
    """

    def __init__(self, rows: Sequence[Row], config: RunConfig) -> None:
        self.diverged_at: Skip | None = None
        self._rows, self._max_bad_steps = rows, config.train.max_bad_steps
        self._source = str(config.data.train or config.data.features)
        self._pending: list[tuple[int, np.ndarray, tuple[jax.Array, jax.Array]]] = []
        self._first_bad: Skip | None = None
        self._bad_in_a_row = 0

    def add(self, step: int, row_numbers: np.ndarray, sums: dict[str, jax.Array]) -> None:
        """Takes note of a step: its rows, int [...] with -1 for none, and what `train_step` returned."""
        flags = sums["updates"], sums["skipped_nonfinite"]
        self._pending.append((step, row_numbers, flags))

    def fetch(self) -> Iterator[Skip]:
        """The skipped steps since the last call, in order; waits for the device."""
        pending, self._pending = self._pending, []
        outcomes: list[Any] = jax.device_get([flags for _, _, flags in pending])
        for (step, row_numbers, _), (updated, nonfinite) in zip(pending, outcomes, strict=True):
            if updated:
                self._bad_in_a_row = 0
                continue
            skip = self._skip(step, NONFINITE if nonfinite else NO_ANCHOR, row_numbers)
            if nonfinite:
                self._count(skip)
            yield skip

    def _count(self, skip: Skip) -> None:
        if self._bad_in_a_row == 0:
            self._first_bad = skip
        self._bad_in_a_row += 1
        if self._bad_in_a_row == self._max_bad_steps and self.diverged_at is None:
            self.diverged_at = self._first_bad

    def _skip(self, step: int, reason: str, row_numbers: np.ndarray) -> Skip:
        numbers = [int(number) for number in row_numbers.flat if number >= 0]
        lines = [line for line in (self._rows[number].line for number in numbers) if line is not None]
        if len(lines) == len(numbers):
            return Skip(step, reason, self._source, "lines", lines)
        return Skip(step, reason, self._source, "rows", [number + 1 for number in numbers])


def divergence(config: RunConfig, first: Skip, *, newest_checkpoint: int | None) -> str:
    """One line on a run that had to stop: since when, on which rows, what is left, how to go on."""
    return (
        f"stopped: {config.train.max_bad_steps} updates in a row (train.max_bad_steps) were not "
        f"finite, from step {first.step} on ({first.place}); {_way_on(config, newest_checkpoint)}"
    )


def overflow(config: RunConfig, step: int, *, newest_checkpoint: int | None) -> str:
    """One line on parameters that an update of finite gradients took past what float32 holds."""
    return (
        f"stopped: the parameters are not finite after step {step}, so they were not saved; "
        f"{_way_on(config, newest_checkpoint)}"
    )


def _way_on(config: RunConfig, newest_checkpoint: int | None) -> str:
    if newest_checkpoint is None:
        return "no checkpoint was written yet; mend the data or lower optimizer.learning_rate"
    return (
        f"the newest checkpoint, of step {newest_checkpoint}, is finite; mend the data or lower "
        "optimizer.learning_rate and start another run_dir from it: "
        f"`domino export {config.run_dir} DRAFT`, then draft.init_from=DRAFT"
    )
