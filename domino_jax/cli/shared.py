"""Streams that verbs share: results go to stdout, progress and logs to stderr."""

import click
from rich.console import Console

from domino_jax.base.escapes import printable_text
from domino_jax.base.progress import Reporter
from domino_jax.cli.interrupts import safe_point

logs = Console(stderr=True)  # so that stdout holds results alone
# Each line and each figure is a place where an interrupted verb may end.
reporter = Reporter(logs, safe_point=safe_point)
WIDTH = 100  # characters of a table where nothing says how wide the screen is


def results() -> Console:
    """Standard output for tables: as wide as the terminal, elsewhere at least `WIDTH`."""
    # Into a file rich would fold tables at 80 characters, for a screen that is not there.
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def echo(result: object) -> None:
    """Prints a result on standard output, control characters escaped."""
    click.echo(printable_text(str(result)))
