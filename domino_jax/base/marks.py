"""Where some tokens of a text are of another kind than the rest, a reader must see which.

a terminal          the marked words in bold green
a file, no colours  the ⟦marked⟧ words
"""

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

MARKS = "⟦⟧"
STYLE = "bold green"


def has_colours(console: Console) -> bool:
    """Whether a console shows colours: NO_COLOR and FORCE_COLOR have their say in it."""
    return console.color_system is not None and not console.no_color


def marked(text: str, *, coloured: bool) -> str:
    """The text, whole, between escapes that colour it or between `MARKS`."""
    if coloured:
        # Not printed by rich, which expands tabs and drops what a terminal would obey.
        return Style.parse(STYLE).render(text, color_system=ColorSystem.STANDARD)
    return f"{MARKS[0]}{text}{MARKS[1]}"
