"""Progress of long work: lines, a bar at a terminal, and a heartbeat in a log.

At a terminal a bar moves and carries the newest figures; in a log a bar would be noise, and each
figure is a line of its own that stays. A heartbeat writes to a log where the work writes nothing,
so that a long step or a compilation differs from a process that hangs:

                           at a terminal                   in a log
    say("compiling")       a line                          a line
    25 s later             nothing                         compiling (25 s so far)
    bar.update(7)          the bar moves                   nothing; 25 s later: step 7/160
    bar.tell(10, figures)  the bar moves, shows figures    step 10/160  loss 2.31
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from domino_jax.base.escapes import printable

# With 5 s to spare: a library may keep Python's lock for seconds.
HEARTBEAT_SECONDS = 25.0  # so that a log has a line at least every 30 s


@dataclass
class _Newest:
    """The newest line or count of a reporter, and when a line was written; for `heartbeat`.

    `event` is the text and its time, None where the heartbeat is paused.
    """

    event: tuple[str, float] | None = None
    written: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def line(self, text: str) -> None:
        """Notes a line that was written."""
        self.written = time.monotonic()
        self.event = text, self.written

    def count(self, text: str) -> None:
        """Notes a count that is not written."""
        self.event = text, time.monotonic()

    def pause(self) -> None:
        """Waits for a line that the heartbeat is writing; it writes none until the next event."""
        self.event = None
        # A full pipe without a reader must not keep the process.
        if self.lock.acquire(timeout=1.0):
            self.lock.release()

    def due(self, seconds: float) -> str | None:
        """The heartbeat's line where none was written for `seconds`, else None."""
        event, now = self.event, time.monotonic()
        if event is None or now - self.written < seconds:
            return None
        self.written = now
        text, since = event
        unchanged = now - since
        return text if unchanged < seconds else f"{text} ({unchanged:.0f} s so far)"


@dataclass(frozen=True)
class Reporter:
    """Progress of long work, on a terminal or in a log.

    Attributes:
        console: where lines and bars go; a bar is drawn at a terminal only.
        safe_point: called before each line and figure. It may raise to end the work there, so
            whoever reports has its files in order.
        newest: the line or count for `heartbeat`; copies of a reporter share it.
    """

    console: Console
    safe_point: Callable[[], None] = lambda: None
    newest: _Newest = field(default_factory=_Newest, repr=False, compare=False)

    def say(self, line: str) -> None:
        """Writes one line, control characters escaped."""
        self.safe_point()
        line = printable(line)
        # Not as `str`, in which rich replaces markup and names of emoji; a path may hold both.
        self.console.print(Text(line), soft_wrap=True)
        self.newest.line(line)

    def pause_heartbeat(self) -> None:
        """No heartbeat until the next line: results are being written."""
        self.newest.pause()

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
        """Moves the bar to `done` things; in a log the heartbeat writes the count."""
        (task,) = self.drawn.tasks
        self.drawn.update(task.id, completed=done)
        self.reporter.newest.count(f"{task.description} {done}/{task.total:.0f}")

    def tell(self, done: int, figures: str = "") -> None:
        """Moves the bar and tells figures: on the bar, or as a line where no bar is drawn."""
        (task,) = self.drawn.tasks
        if self.reporter.console.is_terminal:
            self.reporter.safe_point()
            self.drawn.update(task.id, completed=done, figures=printable(figures))
        else:
            count = f"{task.description} {done}/{task.total:.0f}"
            self.reporter.say(f"{count}  {figures}".rstrip())
            self.reporter.newest.count(count)


@contextmanager
def heartbeat(reporter: Reporter, *, seconds: float = HEARTBEAT_SECONDS) -> Iterator[None]:
    """Writes a line to a log whenever a reporter wrote none for `seconds`, during the body.

    The line repeats the newest line or count, with its age where that is `seconds` or more. A
    thread writes it, so it is no safe point. At a terminal nothing is written.
    """
    if reporter.console.is_terminal:
        yield
        return
    newest, ended = reporter.newest, threading.Event()

    def beat() -> None:
        with suppress(OSError, ValueError):  # a closed pipe
            while not ended.wait(seconds / 25):
                with newest.lock:
                    line = newest.due(seconds)
                    if line is not None:
                        # Not by the console: at a closed pipe it would close standard output too.
                        reporter.console.file.write(f"{line}\n")
                        reporter.console.file.flush()

    newest.line("starting")
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        newest.pause()


# For scripts: what takes long says so on stderr unless it is told otherwise.
STDERR = Reporter(Console(stderr=True))
