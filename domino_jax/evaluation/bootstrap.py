"""Bootstrap intervals of tau and of paired gains, over prompts.

Prompts are drawn again and again with replacement, each with all that was decoded for it. Two ways
to decode are compared on the same prompts, so that what a prompt is worth, easy or hard, cancels:

    prompt       1     2     3   ..          ratio of sums, of each draw of prompts
    one way      c/v   c/v   c/v             tau = sum c / sum v
    another      c/v   c/v   c/v             gain = tau / tau of the other
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 9999
SEED = 0  # the same interval from the same figures


@dataclass(frozen=True)
class PerPrompt:
    """What each prompt of a set took, in its order: tokens committed, and verifications."""

    committed: tuple[int, ...]
    verifications: tuple[int, ...]

    @property
    def tau(self) -> float:
        """Of all prompts together."""
        return sum(self.committed) / max(sum(self.verifications), 1)


@dataclass(frozen=True)
class Gain:
    """Tau over the tau of another way on the same prompts, with its interval where there is one."""

    ratio: float
    interval: tuple[float, float] | None


def tau_interval(one: PerPrompt) -> tuple[float, float] | None:
    """The 95 % interval of a tau over prompts; None where there is one prompt alone."""
    return _interval(_tau, [one.committed, one.verifications])


def gain(one: PerPrompt, other: PerPrompt) -> Gain | None:
    """How much longer one way's tau is than another's, paired over prompts.

    None where the other has no tau: its answers are of one token, which costs no verification.

    Raises:
        ValueError: the two are not of the same number of prompts.
    """
    if len(one.committed) != len(other.committed):
        raise ValueError(f"{len(one.committed)} prompts beside {len(other.committed)}")
    if not other.tau:
        return None
    sums = [one.committed, one.verifications, other.committed, other.verifications]
    return Gain(one.tau / other.tau, _interval(_gain, sums))


def _tau(committed: Any, verifications: Any, axis: int) -> Any:
    return committed.sum(axis=axis) / np.maximum(verifications.sum(axis=axis), 1)


def _gain(committed: Any, verifications: Any, other: Any, of_other: Any, axis: int) -> Any:
    return _tau(committed, verifications, axis) / _tau(other, of_other, axis)


def _interval(statistic: Any, sums: Sequence[Sequence[int]]) -> tuple[float, float] | None:
    if len(sums[0]) < 2:
        return None
    # Here: it takes a second to import, which no other verb should wait for.
    from scipy import stats

    # Of few prompts a draw may hold none with a verification, and so no ratio: nothing is known.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        drawn = stats.bootstrap(
            [np.array(one, float) for one in sums],
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=1000,  # bounds memory, not the result
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    low, high = drawn.confidence_interval
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
