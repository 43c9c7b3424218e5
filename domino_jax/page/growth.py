"""Does more data help? Asked of runs of one kind that differ in how much they were trained on.

Through a kind's taus goes the straight line of least squares over the logarithm of the tokens:

    tau = a + b log10(answer tokens)    read at ten times the most tokens: an extrapolation
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from domino_jax.page.sources import RunFiles, ends

FACTOR = 10  # how far beyond the largest run the line is read
Point = tuple[float, float]


@dataclass(frozen=True)
class Growth:
    """Tau of one kind of draft over answer tokens, on one set of prompts.

    Attributes:
        kind: what its runs have in common.
        runs: their places on the page, fewest tokens first.
        points: tokens and tau of each.
        intervals: low and high of each tau.
    """

    kind: str
    runs: tuple[int, ...]
    points: tuple[Point, ...]
    intervals: tuple[Point, ...]

    @property
    def beyond(self) -> tuple[Point, Point]:
        """The fitted line, at the most tokens and at `FACTOR` times as many."""
        tokens, taus = zip(*self.points, strict=True)
        line = np.polynomial.Polynomial.fit(np.log10(tokens), taus, 1)
        most, more = tokens[-1], FACTOR * tokens[-1]
        return (most, float(line(math.log10(most)))), (more, float(line(math.log10(more))))


def growths(runs: Sequence[RunFiles], name: str) -> list[Growth]:
    """A curve for each kind of draft whose runs differ in answer tokens, on one set of prompts."""
    kinds: dict[str, list[tuple[Point, Point, int]]] = {}
    for place, run in enumerate(runs):
        serving = run.way(name, "serving")
        tokens, tau = run.answer_tokens.number, serving["tau"].number
        if tokens is not None and tokens > 0 and tau is not None:
            measured = ((float(tokens), float(tau)), ends(serving, tau), place)
            kinds.setdefault(_kind(run), []).append(measured)
    found = []
    for kind, of_kind in kinds.items():
        points, intervals, places = zip(*sorted(of_kind), strict=True)
        if points[0][0] < points[-1][0]:
            found.append(Growth(kind, places, points, intervals))
    return found


def _kind(run: RunFiles) -> str:
    if run.head is None:
        return "no head"
    # Without a curriculum the same draft learns otherwise.
    start = run.config["loss"]["lambda_start"].number
    return f"{run.head} head" + (", no curriculum" if start == 0 else "")
