"""Streams and locks that verbs share: results go to stdout, progress and logs to stderr."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import click
from rich.console import Console

from domino_jax.base.escapes import printable_text
from domino_jax.base.progress import Reporter
from domino_jax.cli.interrupts import safe_point
from domino_jax.processes import check_single_process

logs = Console(stderr=True)  # so that stdout holds results alone
# Each line and each figure is a place where an interrupted verb may end.
reporter = Reporter(logs, safe_point=safe_point)
WIDTH = 100  # characters of a table where nothing says how wide the screen is


def results() -> Console:
    """Standard output for tables: as wide as the terminal, elsewhere at least `WIDTH`.

    Ends the heartbeat, which would write between the lines of a table.
    """
    reporter.pause_heartbeat()
    # Into a file rich would fold tables at 80 characters, for a screen that is not there.
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def own(lock: Callable[..., AbstractContextManager[None]], output: str | Path) -> None:
    """Makes this process the only writer of an output until the verb ends.

    Called before the verb imports jax, so that a second process is refused at once.

    Args:
        lock: `lock_inside` or `lock_beside`.
        output: what the verb writes.
    Raises:
        InputError: a launcher started several processes, or as `lock`.
    """
    context = click.get_current_context()
    command = f"domino {context.info_name}"
    check_single_process(command)
    context.with_resource(lock(output, command=command))


def echo(result: object) -> None:
    """Prints a result on standard output, control characters escaped."""
    click.echo(printable_text(str(result)))
