"""Token rows of known contents, and batches compared array by array."""

import numpy as np

from domino_jax.data.conversations import Row

LENGTH = 9


def make_rows(count: int) -> list[Row]:
    """Row i holds i + 1 as its every token, and is 1 to LENGTH tokens long."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH, size=count, endpoint=True)
    return [Row(np.full(n, i + 1, np.int32), rng.random(n) < 0.5) for i, n in enumerate(lengths)]


def assert_equal_batches(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() >= {"input_ids", "loss_mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
