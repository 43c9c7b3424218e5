"""A person at a terminal and a log file need different things: one reporter serves both.

At a terminal a bar moves and carries the newest figures; in a log a bar would be noise, and each
figure is a line of its own that stays. Work says what it has done, the reporter knows who listens:

                           at a terminal                   in a log
    say("loading rows")    a line                          a line
    bar.update(7)          the bar moves                   nothing
    bar.tell(10, figures)  the bar moves, shows figures    step 10/160  loss 2.31
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from domino_jax.base.escapes import printable


@dataclass(frozen=True)
class Reporter:
    """Tells the progress of long work.

    Attributes:
        console: where lines and bars go; a bar is drawn at a terminal only.
        safe_point: called before each line and figure. It may raise to end the work there, so
            whoever reports has its files in order.
    """

    console: Console
    safe_point: Callable[[], None] = lambda: None

    def say(self, line: str) -> None:
        """Writes one line; what is not printable in it is escaped."""
        self.safe_point()
        # Not as `str`, in which rich replaces markup and names of emoji; a path may hold both.
        self.console.print(Text(printable(line)), soft_wrap=True)

    @contextmanager
    def bar(self, name: str, *, total: int, done: int = 0) -> Iterator["Bar"]:
        """Gives a bar for the time of the body.

        Args:
            name: of what is counted, said before each count.
            total: how many there are.
            done: how many are done already.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
        )
        in_log = not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=in_log) as drawn:
            drawn.add_task(printable(name), total=total, completed=done, figures="")
            yield Bar(self, drawn)


@dataclass(frozen=True)
class Bar:
    """The bar of `Reporter.bar`."""

    reporter: Reporter
    drawn: Progress

    def update(self, done: int) -> None:
        """Moves the bar to `done` things."""
        (task,) = self.drawn.tasks
        self.drawn.update(task.id, completed=done)

    def tell(self, done: int, figures: str = "") -> None:
        """Moves the bar and tells figures: on the bar, or as a line where no bar is drawn."""
        (task,) = self.drawn.tasks
        if self.reporter.console.is_terminal:
            self.reporter.safe_point()
            self.drawn.update(task.id, completed=done, figures=printable(figures))
        else:
            line = f"{task.description} {done}/{task.total:.0f}  {figures}"
            self.reporter.say(line.rstrip())


# For scripts: what takes long says so on stderr unless it is told otherwise.
STDERR = Reporter(Console(stderr=True))
