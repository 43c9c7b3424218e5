"""Whether a drafter pays is a comparison, not a tau: with what a cycle costs, and with the floor.

A cycle of drafting and verifying takes as long as so many steps of the target alone; a tau above
that number, the break-even, makes decoding faster. Prompt look-up drafts without any model, so a
drafter that stays below its tau, the floor, was trained for nothing.

    break-even 1.73:   interval 1.80 to 1.92   pays
                       interval 1.70 to 1.78   too close to call
                       interval 1.30 to 1.38   does not pay
"""

from collections.abc import Sequence
from dataclasses import dataclass

from domino_jax.page.cells import TAU, Cell, figure, interval, is_missing, with_interval
from domino_jax.page.sources import RunFiles, Source, ends

PAYS, DOES_NOT, OPEN, UNKNOWN = "pays", "does not pay", "too close to call", "not known"
# What a style sheet calls them.
KINDS = {PAYS: "yes", DOES_NOT: "no", OPEN: "open", UNKNOWN: "unknown"}
_SIDES = {PAYS: "above", DOES_NOT: "below", OPEN: "around"}


@dataclass(frozen=True)
class Tile:
    """A figure by itself, with its name above and a few words below."""

    name: str
    value: Cell
    below: Cell = ()


@dataclass(frozen=True)
class Verdict:
    """What a set of prompts says of a run.

    Attributes:
        run: the place of the run among those of the page.
        answer: one of `KINDS`.
        sentence: it, and what it follows from.
        tiles: the figures that it follows from.
    """

    run: int
    prompts: str
    answer: str
    sentence: Cell
    tiles: tuple[Tile, ...]

    @property
    def kind(self) -> str:
        """The answer for a style sheet."""
        return KINDS[self.answer]


def verdicts(runs: Sequence[RunFiles]) -> list[Verdict]:
    """A verdict for each run and each set of prompts that it was evaluated on."""
    found = []
    for place, run in enumerate(runs):
        for prompts in run.sets:
            # A set without a tau of the headline's way says nothing.
            if prompts["ways"]["serving"]["tau"].number is not None:
                found.append(_verdict(place, prompts, run.evaluation["cycle"]["break_even_tau"]))
    return found


def answer_of(serving: Source, break_even: Source) -> str:
    """One of `KINDS`: on which side of the break-even the whole interval of a tau lies."""
    bound, tau = break_even.number, serving["tau"].number
    if bound is None or tau is None:
        return UNKNOWN
    low, high = ends(serving, tau)
    if low > bound:
        return PAYS
    return DOES_NOT if high < bound else OPEN


def _verdict(place: int, prompts: Source, break_even: Source) -> Verdict:
    ways = prompts["ways"]
    serving = ways["serving"]
    name = str(prompts.path[-1])
    answer = answer_of(serving, break_even)
    tau = with_interval(serving["tau"], serving["interval"], TAU)
    bound, floor = figure(break_even, TAU), figure(ways["ngram"]["tau"], TAU)
    against: list[Cell] = []
    if answer != UNKNOWN:
        against.append((f"{_SIDES[answer]} the break-even of ", *bound))
    # The interval against the floor, as against the break-even.
    if not is_missing(floor):
        side = _SIDES[answer_of(serving, ways["ngram"]["tau"])]
        against.append((f"{side} the n-gram floor of ", *floor))
    sentence: Cell = ("Tau ", *tau)
    for word, part in zip((" is ", " and "), against, strict=False):
        sentence = (*sentence, word, *part)
    off = figure(ways["head_off"]["tau"], TAU)
    if not is_missing(off):
        sentence = (*sentence, "; with its head off it is ", *off)
    if answer == UNKNOWN:
        sentence = (*sentence, "; no cycle was timed, so no break-even is known")
    return Verdict(place, name, answer, (*sentence, "."), _tiles(prompts, break_even))


def _tiles(prompts: Source, break_even: Source) -> tuple[Tile, ...]:
    ways, speed = prompts["ways"], prompts["speed"]
    both = interval(ways["serving"]["interval"], TAU)
    spread: Cell = () if is_missing(both) else (*both, " (95 %)")
    plain = figure(speed["tokens_per_second_plain"], ".1f")
    fast = figure(speed["tokens_per_second"], ".1f")
    rates: Cell = () if is_missing(plain) else (*plain, " to ", *fast, " tokens/s")
    every = (
        Tile("tau", figure(ways["serving"]["tau"], TAU), spread),
        Tile("break-even", figure(break_even, TAU), ("steps that a cycle costs",)),
        Tile("n-gram floor", figure(ways["ngram"]["tau"], TAU), ("prompt look-up, no model",)),
        Tile("speed-up", figure(speed["speed_up"], TAU), rates),
    )
    return tuple(tile for tile in every if not is_missing(tile.value))
