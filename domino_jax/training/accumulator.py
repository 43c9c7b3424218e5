"""The outcomes of the steps since the last line of the log.

Asking the device after each step would make the host wait, so the outcomes of a window of
`train.log_every` steps stay where they are and come over together:

    step 11  step 12  step 13 | checkpoint: fetched, and stored with the state
    step 14  step 15          | line: fetched, added up, told, forgotten

A run that is resumed after step 13 writes the line of step 15 as if it had never stopped, to the
last bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class StepOutcome:
    """What a step was made of and what came of it.

    Attributes:
        step: counted as `TrainState.step` after it.
        rows: numbers of the rows of its batch, in the batch's order.
        sums: what `train_step` returned; float32 scalars.
    """

    step: int
    rows: list[int]
    sums: Mapping[str, Any]

    @property
    def updated(self) -> bool:
        """Whether the step moved the draft."""
        # As the step itself counted it: the state is not looked at again.
        return bool(self.sums["updates"])

    @property
    def nonfinite(self) -> bool:
        """Whether its loss or its gradient was not finite."""
        return bool(self.sums["skipped_nonfinite"])

    @property
    def loss(self) -> float:
        """Mean loss of the batch, weighted."""
        return float(self.sums["loss_sum"] / max(self.sums["loss_weight"], np.float32(1e-6)))

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint. float32 -> float -> JSON -> float32 gives the same bits."""
        return dataclasses.asdict(self) | {
            "sums": {name: float(x) for name, x in self.sums.items()}
        }


class MetricAccumulator:
    """Outcomes that no line tells yet."""

    def __init__(self, stored: Sequence[Mapping[str, Any]] = ()) -> None:
        self._outcomes = []
        for outcome in stored:
            sums = {name: np.float32(x) for name, x in outcome["sums"].items()}
            self._outcomes.append(StepOutcome(outcome["step"], outcome["rows"], sums))

    def add(self, step: int, row_numbers: np.ndarray, sums: dict[str, jax.Array]) -> None:
        """Adds a step: its rows, int [...] with -1 for none; its sums stay on the device."""
        numbers = [int(number) for number in row_numbers.flat if number >= 0]
        self._outcomes.append(StepOutcome(step, numbers, sums))

    def fetch(self) -> list[StepOutcome]:
        """All outcomes, on the host; waits for the device."""
        # All in one transfer, and kept: a checkpoint and then a line ask for the same outcomes.
        sums = jax.device_get([outcome.sums for outcome in self._outcomes])
        pairs = zip(self._outcomes, sums, strict=True)
        self._outcomes = [dataclasses.replace(outcome, sums=values) for outcome, values in pairs]
        return self._outcomes

    def clear(self) -> None:
        """Forgets the outcomes: their line is written."""
        self._outcomes = []


def total(outcomes: Sequence[StepOutcome]) -> dict[str, Any]:
    """The sums of some steps added up in float32, in their order."""
    # In this order: a resumed run must add up to the same bits.
    first, *others = outcomes
    sums = dict(first.sums)
    for outcome in others:
        sums = {name: value + outcome.sums[name] for name, value in sums.items()}
    return sums
