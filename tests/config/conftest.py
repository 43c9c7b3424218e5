"""The smallest settings of a run in a file."""

from pathlib import Path

import pytest
import yaml
from trees import SMALLEST


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path
