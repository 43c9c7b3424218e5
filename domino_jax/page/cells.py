"""A figure on a page can be checked: its text keeps the place in a file that it was made from.

What a table holds, or a sentence, is words and such figures in turn; the page writes the place into
the figure's element:

    ("tau ", Shown("1.34", evaluation.json at /sets/everyday/ways/serving/tau))
    tau <data value="1.3401" data-file="evaluation.json" data-key="...">1.34</data>
"""

from dataclasses import dataclass

from domino_jax.page.sources import Source

GIB = 2**30
# Formats of Python. An interval of 80 prompts is wider than the next digit of a tau.
TAU, COUNT, PLACE, MILLISECONDS, LOSS = ".2f", ",.0f", ".0f", ".1f", ".3f"


@dataclass(frozen=True)
class Shown:
    """A figure as it is shown, and where it stands."""

    text: str
    source: Source


Cell = tuple[Shown | str, ...]
MISSING: Cell = ("–",)  # noqa: RUF001  (a dash as tables have it)
TIMES = "× "  # noqa: RUF001  (the sign, before a factor)


def is_missing(cell: Cell) -> bool:
    """Whether there is nothing to show."""
    return cell == MISSING


def figure(source: Source, form: str) -> Cell:
    """A number in a format of Python, ".0%" for shares."""
    number = source.number
    return MISSING if number is None else (Shown(format(number, form), source),)


def size(source: Source) -> Cell:
    """A number of bytes."""
    number = source.number
    return MISSING if number is None else (Shown(f"{number / GIB:.2f} GiB", source),)


def words(text: str | None) -> Cell:
    """Text that is no figure."""
    return MISSING if text is None else (text,)


def interval(source: Source, form: str) -> Cell:
    """Both ends of an interval."""
    low, high = figure(source[0], form), figure(source[1], form)
    if is_missing(low) or is_missing(high):
        return MISSING
    return (*low, " to ", *high)


def with_interval(value: Source, ends: Source, form: str) -> Cell:
    """A figure and behind it, in brackets, its interval where there is one."""
    shown, both = figure(value, form), interval(ends, form)
    if is_missing(shown) or is_missing(both):
        return shown
    return (*shown, " (", *both, ")")


def times(factor: Source, ends: Source) -> Cell:
    """A factor with its interval."""
    shown = with_interval(factor, ends, TAU)
    return shown if is_missing(shown) else (TIMES, *shown)


def joined(first: Cell, between: str, second: Cell) -> Cell:
    """Two cells as one; the first alone where the second is missing."""
    return first if is_missing(second) else (*first, between, *second)
