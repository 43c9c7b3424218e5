"""The command line."""

from domino_jax.cli.main import main

__all__ = ["main"]
