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

from domino_jax.page.cells import INTERVAL, TAU, Cell, cell, with_interval
from domino_jax.page.sources import RunFiles, Source, ends

PAYS, DOES_NOT, OPEN, UNKNOWN = "pays", "does not pay", "too close to call", "not known"
_SIDES = {PAYS: "above", DOES_NOT: "below", OPEN: "around"}


@dataclass(frozen=True)
class Verdict:
    """What a set of prompts says of a run.

    Attributes:
        run: the place of the run among those of the page.
        prompts: the name of the set.
        answer: `PAYS`, `DOES_NOT`, `OPEN` or `UNKNOWN`.
        sentence: it, and what it follows from.
        tiles: the figures that it follows from: name, figure, a few words below.
    """

    run: int
    prompts: str
    answer: str
    sentence: Cell
    tiles: list[tuple[str, Cell, Cell]]


def verdicts(runs: Sequence[RunFiles]) -> list[Verdict]:
    """A verdict for each run and each set of prompts that it was evaluated on."""
    found = []
    for place, run in enumerate(runs):
        break_even = run.evaluation["cycle"]["break_even_tau"]
        for name, prompts in run.sets.items():
            serving = prompts["ways"]["serving"]
            # A set without a tau of the headline's way says nothing.
            if serving["tau"].number is not None:
                answer = answer_of(serving, break_even)
                told = _sentence(prompts["ways"], answer, break_even)
                found.append(Verdict(place, name, answer, told, _tiles(prompts, break_even)))
    return found


def answer_of(serving: Source, break_even: Source) -> str:
    """On which side of the break-even the whole interval of a tau lies."""
    bound, tau = break_even.number, serving["tau"].number
    if bound is None or tau is None:
        return UNKNOWN
    low, high = ends(serving, tau)
    if low > bound:
        return PAYS
    return DOES_NOT if high < bound else OPEN


def _sentence(ways: Source, answer: str, break_even: Source) -> Cell:
    serving, floor = ways["serving"], ways["ngram"]["tau"]
    against: list[Cell] = []
    if answer != UNKNOWN:
        against.append(cell(f"{_SIDES[answer]} the break-even of {TAU}", break_even))
    # The interval against the floor, as against the break-even.
    if floor.number is not None:
        side = _SIDES[answer_of(serving, floor)]
        against.append(cell(f"{side} the n-gram floor of {TAU}", floor))
    told: Cell = ("Tau ", *with_interval(serving, "tau"))
    for word, part in zip((" is ", " and "), against, strict=False):
        told = (*told, word, *part)
    told = (*told, *cell(f"; with its head off it is {TAU}", ways["head_off"]["tau"]))
    if answer == UNKNOWN:
        told = (*told, "; no cycle was timed, so no break-even is known")
    return (*told, ".")


def _tiles(prompts: Source, break_even: Source) -> list[tuple[str, Cell, Cell]]:
    serving, speed = prompts["ways"]["serving"], prompts["speed"]
    spread = cell(f"{INTERVAL} (95 %)", serving["interval"][0], serving["interval"][1])
    plain, fast = speed["tokens_per_second_plain"], speed["tokens_per_second"]
    rates = cell("{:.1f} to {:.1f} tokens/s", plain, fast)
    every = [
        ("tau", cell(TAU, serving["tau"]), spread),
        ("break-even", cell(TAU, break_even), ("steps that a cycle costs",)),
        ("n-gram floor", cell(TAU, prompts["ways"]["ngram"]["tau"]), ("prompt look-up, no model",)),
        ("speed-up", cell(TAU, speed["speed_up"]), rates),
    ]
    return [tile for tile in every if tile[1]]
