"""The command line. It stands ready for Ctrl-C before it imports the rest, which takes seconds."""

import os
import sys
from contextlib import suppress

from domino_jax.cli.interrupts import answered_signals


def main() -> None:
    """The `domino` command, and `python -m domino_jax`."""
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


def command() -> None:
    """What the command does, ended by SystemExit as any other Python program."""
    with answered_signals():
        # transformers warns where PyTorch is not installed; nothing here needs it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from domino_jax.cli.verbs import run

        run()


__all__ = ["command", "main"]
