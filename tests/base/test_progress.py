"""Progress in a log: a line per figure, and a heartbeat where nothing else is written."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from domino_jax.base import progress
from domino_jax.base.progress import Reporter, heartbeat


def in_memory(*, terminal: bool = False) -> tuple[Reporter, io.StringIO]:
    """A reporter, and what it writes."""
    text = io.StringIO()
    return Reporter(Console(file=text, force_terminal=terminal, width=100)), text


def wait_for(happened: Callable[[], bool]) -> None:
    """Waits for the heartbeat's thread; a loaded machine may take long."""
    end = time.monotonic() + 20
    while not happened() and time.monotonic() < end:
        time.sleep(0.005)
    assert happened()


def test_heartbeat_repeats_the_newest_line_or_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    reporter, text = in_memory()

    def later(seconds: float) -> str | None:
        clock.now += seconds
        return reporter.newest.due(25)

    assert later(60) is None  # nothing was said
    reporter.say("compiling")
    assert later(24) is None
    assert later(1) == "compiling (25 s so far)"
    assert later(24) is None and later(1) == "compiling (50 s so far)"
    with reporter.bar("rows", total=5000) as bar:
        assert later(25) == "compiling (75 s so far)"  # the bar has no count yet
        for done in range(30):
            bar.update(done)
            assert later(1) == ("rows 24/5000" if done == 24 else None)
        assert later(20) == "rows 29/5000"
        assert later(25) == "rows 29/5000 (46 s so far)"
        bar.tell(1200, "written, 3 rows/s")
        assert later(25) == "rows 1200/5000 (25 s so far)"
    reporter.pause_heartbeat()
    assert later(600) is None
    reporter.say("saving")
    assert later(30) == "saving (30 s so far)"
    assert text.getvalue() == "compiling\nrows 1200/5000  written, 3 rows/s\nsaving\n"


def test_heartbeat_writes_until_its_body_ends() -> None:
    reporter, text = in_memory()
    stops: list[None] = []
    # As in `train`: a copy without a safe point.
    copied = replace(reporter, safe_point=lambda: stops.append(None))
    with heartbeat(reporter, seconds=0.05):
        wait_for(lambda: "starting (0 s so far)\n" in text.getvalue())
        copied.say("compiling")
        wait_for(lambda: text.getvalue().count("compiling (0 s so far)\n") > 1)
        copied.pause_heartbeat()
        written = text.getvalue()
        time.sleep(0.2)
        assert text.getvalue() == written
        copied.say("saving")
        wait_for(lambda: "saving (" in text.getvalue())
    written = text.getvalue()
    time.sleep(0.2)
    assert text.getvalue() == written
    assert len(stops) == 2  # none by the heartbeat


def test_heartbeat_writes_nothing_at_a_terminal() -> None:
    reporter, text = in_memory(terminal=True)
    with heartbeat(reporter, seconds=0.01):
        reporter.say("compiling")
        time.sleep(0.1)
    assert text.getvalue() == "compiling\n"


def test_heartbeat_at_a_closed_pipe_ends_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with heartbeat(Reporter(Console(file=Closed())), seconds=0.01):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")
