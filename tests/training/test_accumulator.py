"""Outcomes of steps: added up as on the device, and the same after a checkpoint."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from domino_jax.training.accumulator import MetricAccumulator, total


def test_a_window_is_the_same_after_a_checkpoint() -> None:
    rng = np.random.default_rng(0)
    whole, parts = MetricAccumulator(), MetricAccumulator()
    device: Any = None
    for step in range(1, 40):
        values = zip(("loss_sum", "loss_weight"), rng.exponential(size=2) * 1e3, strict=True)
        sums = {name: jnp.float32(value) for name, value in values}
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
