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


def growths(runs: Sequence[RunFiles], name: str) -> tuple[Growth, ...]:
    """A curve for each kind of draft whose runs differ in answer tokens, on one set of prompts."""
    kinds: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        kinds.setdefault(_kind(run), []).append(place)
    found = (_growth(kind, places, runs, name) for kind, places in kinds.items())
    return tuple(one for one in found if len({tokens for tokens, _ in one.points}) > 1)


def _kind(run: RunFiles) -> str:
    if run.head is None:
        return "no head"
    # Without a curriculum the same draft learns otherwise.
    start = run.config.at("loss", "lambda_start").number
    return f"{run.head} head" + (", no curriculum" if start == 0 else "")


def _growth(kind: str, places: Sequence[int], runs: Sequence[RunFiles], name: str) -> Growth:
    found = []
    for place in places:
        serving = runs[place].evaluation.at("sets", name, "ways", "serving")
        tokens, tau = runs[place].answer_tokens.number, serving["tau"].number
        if tokens is not None and tokens > 0 and tau is not None:
            found.append(((float(tokens), float(tau)), ends(serving, tau), place))
    found.sort()
    points, intervals, sorted_places = zip(*found, strict=True) if found else ((), (), ())
    return Growth(kind, sorted_places, points, intervals)
