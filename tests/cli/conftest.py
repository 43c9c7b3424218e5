"""A finished run for every verb."""

from pathlib import Path

import pytest
from tiny import quiet, run_config, write_conversations, write_target


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a target, a finished run and prompts."""

    from whole_run import train

    from domino_jax.config.run import load_config

    directory = tmp_path_factory.mktemp("trained")
    (directory / "target").mkdir()
    write_target(directory / "target")
    train(load_config(run_config(directory, directory / "target")), reporter=quiet())
    write_conversations(directory / "prompts.jsonl", 3, seed=5, answers=False)
    return directory
