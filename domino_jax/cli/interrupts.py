"""Python's own answer to Ctrl-C crashed or was lost under jax, so here is one for every verb.

That answer is a KeyboardInterrupt between any two bytecodes of the main thread. Raised inside jax
it was swallowed by a callback, or the process died in its teardown under running threads of XLA
(exit code -11); and while the main thread waits for a compilation it comes minutes late. Here
nothing is raised where nobody expects it, for Ctrl-C (SIGINT) and for SIGTERM:

    signal -> a byte in a pipe -> watcher thread: sets `requested`, says the verb's line;
                                  before the verb has said what it keeps, after GRACE_SECONDS, or
                                  at the next signal, ends the process
    main thread, at its next line or figure -> `safe_point` raises `Stopped`, files are tidied

The process may end at any moment, and always without a teardown: files are written beside their
place and renamed. Training stops by itself: it asks `stop_requested` after each step and saves.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from domino_jax.base.escapes import printable
from domino_jax.base.files import remove_unfinished
from domino_jax.base.lock import release_all

GRACE_SECONDS = 3.0
EXIT_CODE = 130  # what shells report of a program that Ctrl-C ended
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOT_BEGUN = "nothing was begun; the same command starts"
SAVING = "interrupted: stopping after this step, its state will be saved; once more ends at once"


class Stopped(BaseException):
    """Raised by `safe_point`; not an Exception, so that no handler on the way takes it for one."""


@dataclass
class _State:
    requested: bool = False
    # The main thread ends by itself and may take its time: a step, and saving its state.
    saves: bool = False
    # What the verb keeps, once it has begun; nothing is written before.
    kept: str | None = None
    # Nothing is written until the verb asks `stop_requested`: there is no safe point to wait for.
    at_once: bool = True


_state = _State()


@contextmanager
def answered_signals() -> Iterator[None]:
    """Answers both signals while its body, the rest of the program, runs on the main thread.

    The body does not return to its caller after a signal: the process has ended with EXIT_CODE.
    """
    global _state
    _state = _State()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # `set_wakeup_fd` takes no other
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    # Where the pipe is full, signals are in it already.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        # Stands where Python's handler would raise; the watcher answers.
        signal.signal(number, lambda number, frame: None)
    try:
        with suppress(Stopped):
            yield
    finally:
        # What remains is the interpreter's teardown, where Python's own handler would break in. The
        # work is done: the system's would end the process by a signal that came too late to matter.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        watcher.join(GRACE_SECONDS)
        if _state.requested:
            _end()


def keeps(line: str, *, at_once: bool = False) -> None:
    """Sets what is said when the verb is interrupted: what is kept, and how to resume.

    Args:
        line: said after "interrupted: ".
        at_once: the first signal ends the process without a safe point, until `stop_requested` is
            asked.
    """
    _state.kept, _state.at_once = line, at_once


def kept() -> str | None:
    """The line of `keeps`; None before the verb has begun."""
    return _state.kept


def safe_point() -> None:
    """Raises `Stopped` if a signal has come: a place where the work may end and files are whole."""
    if _state.requested:
        raise Stopped


def stop_requested() -> bool:
    """Whether a signal has come; from the first question on, the caller ends the work by itself."""
    _state.saves = True
    return _state.requested


def _watch(reader: int) -> None:
    """Reads one byte per signal until the pipe is closed."""
    while os.read(reader, 1):
        if _state.requested:
            _end()
        # All before the line is written, which a full pipe may hold up and a closed one refuses.
        _state.requested = True
        if not _state.saves:
            timer = threading.Timer(GRACE_SECONDS, _end)
            timer.daemon = True
            timer.start()
        line = SAVING if _state.saves else f"interrupted: {_state.kept or NOT_BEGUN}"
        with suppress(OSError, ValueError):
            print(printable(line), file=sys.stderr, flush=True)
        if _state.at_once and not _state.saves:
            _end()
    os.close(reader)


def _end() -> None:
    """Ends the process without a teardown; verbs flush what they write as they write it."""
    remove_unfinished()
    release_all()
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(EXIT_CODE)
