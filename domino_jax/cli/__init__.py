"""The command line must answer Ctrl-C while it still imports what it needs, which takes seconds.

So nothing but the handlers is imported here; `command` imports the verbs once they stand. A module
of a verb imports at its top what needs neither jax nor numpy; a verb imports the rest once its
arguments are checked.
"""

import io
import os
import sys
from contextlib import suppress

from domino_jax.cli.interrupts import answered_signals


def main() -> None:
    """The `domino` command, and `python -m domino_jax`."""
    _open_standard_streams()
    try:
        command()
    except SystemExit as stop:
        if not isinstance(stop.code, int) or stop.code == 0:
            raise
        # A save that failed leaves threads of Orbax behind, and Python would wait minutes for them.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it
                stream.flush()
        os._exit(stop.code)


def _open_standard_streams() -> None:
    """Opens each standard stream that the caller has closed, on the null device.

    Otherwise a file that is opened later gets its number, and what a library writes to standard
    error ends inside that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is this one
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115


def command() -> None:
    """What the command does, ended by SystemExit as any other Python program."""
    with answered_signals():
        # An answer may have characters that the encoding of a terminal or a pipe lacks.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        # transformers warns where PyTorch is not installed; nothing here needs it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # Only now, behind the handlers: the verb imports jax.
        from domino_jax.cli.verbs import run

        run()
