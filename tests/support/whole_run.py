"""A training run from its configuration, as `domino train` starts it."""

from collections.abc import Callable
from pathlib import Path

from domino_jax.base.progress import STDERR, Reporter
from domino_jax.config.run import RunConfig
from domino_jax.training import loop
from domino_jax.training.prepare import prepare


def train(
    config: RunConfig,
    *,
    reporter: Reporter = STDERR,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Path:
    """Prepares and trains a run, or resumes it; returns its directory."""
    run = prepare(config, reporter=reporter)
    return loop.train(run, reporter=reporter, stop_requested=stop_requested)
