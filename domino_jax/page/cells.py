"""A figure on a page can be checked: its text keeps the place in a file that it was made from.

What a table holds, or a sentence, is words and such figures in turn; the page writes the place into
the figure's element:

    cell("tau {:.2f}", evaluation.json at /sets/everyday/ways/serving/tau)
    tau <data value="1.3401" data-file="evaluation.json" data-key="...">1.34</data>
"""

import string
from dataclasses import dataclass

from domino_jax.page.sources import Source

# An interval of 80 prompts is wider than the next digit of a tau.
TAU, COUNT, PLACE, MILLISECONDS, LOSS = "{:.2f}", "{:,.0f}", "{:.0f}", "{:.1f}", "{:.3f}"
INTERVAL = f"{TAU} to {TAU}"
DASH = "–"  # noqa: RUF001  (as tables have it, where there is no figure)
TIMES = "× "  # noqa: RUF001  (the sign, before a factor)


@dataclass(frozen=True)
class Shown:
    """A figure as it is shown, and where it stands."""

    text: str
    source: Source


Cell = tuple[Shown | str, ...]  # empty where there is nothing to show


def sentence(template: str, *sources: Source) -> Cell:
    """A format string of Python, each field filled with a figure; a dash where there is none."""
    left = iter(sources)
    parts: list[Shown | str] = []
    for words, _, form, _ in string.Formatter().parse(template):
        if words:
            parts.append(words)
        if form is not None:  # behind the last field
            source = next(left)
            number = source.number
            parts.append(DASH if number is None else Shown(format(number, form), source))
    return tuple(parts)


def cell(template: str, *sources: Source) -> Cell:
    """The same; nothing where one of the figures is missing."""
    complete = all(source.number is not None for source in sources)
    return sentence(template, *sources) if complete else ()


def words(text: str | None) -> Cell:
    """Text that is no figure."""
    return (text,) if text else ()


def with_interval(figures: Source, key: str) -> Cell:
    """A tau or a ratio of two and behind it, in brackets, its interval where there is one."""
    value, ends = figures[key], figures["interval"]
    return cell(f"{TAU} ({INTERVAL})", value, ends[0], ends[1]) or cell(TAU, value)
