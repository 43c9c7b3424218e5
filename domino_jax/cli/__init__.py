"""The command line must answer Ctrl-C while it still imports what it needs, which takes seconds.

So nothing but the handlers is imported here; `command` imports the verbs once they stand. A module
of a verb imports at its top what needs neither jax nor numpy; a verb imports the rest once its
arguments are checked.
"""

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
        # Only now, behind the handlers: the verb imports jax.
        from domino_jax.cli.verbs import run

        run()
