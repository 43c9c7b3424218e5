"""Outcomes of steps: added up as on the device, the same after a checkpoint, and loss spikes."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.training.accumulator import MetricAccumulator, StepOutcome, spikes, total


def sums_of(loss: float, weight: float = 1.0, *, updates: int = 1) -> dict[str, jax.Array]:
    values = {
        "loss_sum": loss * weight,
        "loss_weight": weight,
        "updates": updates,
        "skipped_nonfinite": 1 - updates,
    }
    return {name: jnp.float32(value) for name, value in values.items()}


def test_a_window_is_the_same_after_a_checkpoint() -> None:
    rng = np.random.default_rng(0)
    whole, parts = MetricAccumulator(), MetricAccumulator()
    device: Any = None
    for step in range(1, 40):
        sums = sums_of(rng.exponential(), rng.exponential() * 1e3)
        device = (
            sums if device is None else {name: device[name] + value for name, value in sums.items()}
        )
        for window in (whole, parts):
            window.add(step, np.array([[step, -1], [step + 1, -1]]), sums)
        if step % 7 == 0:
            stored = json.dumps([outcome.as_json() for outcome in parts.fetch()], allow_nan=False)
            parts = MetricAccumulator(json.loads(stored))
    one, other = whole.fetch(), parts.fetch()
    assert [(x.step, x.rows) for x in one] == [(x.step, x.rows) for x in other]
    assert one[3].rows == [4, 5]
    for added in (total(one), total(other)):
        assert {name: float(x) for name, x in added.items()} == {
            name: float(x) for name, x in device.items()
        }
    whole.clear()
    assert whole.fetch() == []


def outcomes(losses: list[float], **options: Any) -> list[StepOutcome]:
    return [
        StepOutcome(step, [step], jax.device_get(sums_of(x, 7.0, **options)))
        for step, x in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3.0, 3.1, 9.0, 2.9, 3.0], [3]),
        ([3.0, 3.1, 5.9, 2.9, 3.0], []),
        ([12.9, 11.0, 9.5, 8.0, 7.5], []),  # a beginning is no spike
        ([3.0, 9.0, 3.0, 3.0], []),  # too few for a median
    ],
)
def test_spikes_stand_out_of_their_window(losses: list[float], found: list[int]) -> None:
    assert [spike.outcome.step for spike in spikes(outcomes(losses))] == found


def test_steps_without_an_update_are_no_spikes() -> None:
    assert not spikes([*outcomes([3.0] * 5), *outcomes([90.0], updates=0)])
