"""The command line. It stands ready for Ctrl-C before it imports the rest, which takes seconds."""

import os

from domino_jax.cli.interrupts import answered_signals


def main() -> None:
    """The `domino` command, and `python -m domino_jax`."""
    with answered_signals():
        # transformers warns where PyTorch is not installed; nothing here needs it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from domino_jax.cli.verbs import run

        run()


__all__ = ["main"]
