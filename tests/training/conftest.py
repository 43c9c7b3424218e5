"""The tiny target that runs of a file share."""

from pathlib import Path

import pytest
from tiny import write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))
